"""The console of a job of many runs: a table redrawn in place on a terminal; elsewhere, a line per finished run."""

from __future__ import annotations

import math

from rich.console import Group
from rich.table import Table as View
from rich.text import Text

from mnist_ray.many.rungs import Averaged, find_best, ranked
from mnist_ray.many.table import Many, Member, Table
from mnist_ray.report.console import RunConsole
from mnist_ray.report.run_files import DONE, FAILED, LOST, RUNNING, STOPPED, WAITING, number_of
from mnist_ray.storage import RESULT_FILE
from mnist_ray.text import format_settings, format_value, in_words, redact
from mnist_ray.workload.figures import RATE


class ManyConsole(RunConsole):
    """Prints the members of a job."""

    def __init__(self, many: Many) -> None:
        super().__init__(many.job.workload, many.job.train.num_epochs, quiet=many.job.output.quiet)
        self._many = many

    def show_table(self, table: Table, ended: Member | None = None) -> None:
        """Show the members after one of them has reported or ``ended`` a segment."""
        if self._live.is_started:
            self._live.update(Group(self._table(table), Text(self._summary(table))), refresh=True)
        elif ended is not None and ended.state != STOPPED:  # it had a line as "waiting"
            self.say(*self._line_of(table, ended))

    def _line_of(self, table: Table, member: Member) -> tuple[str, str]:
        """Return the label and the line of a member that has ended."""
        *_, epochs, value, _, state = self._row(table, member, None)
        if self._many.is_sweep:
            tried = f"{format_settings(member.point.values)}, {member.point.label}"
            done = f"{table.workload.monitor.name} {value} after {epochs} epochs"
            return f"trial {member.number}", f"{tried}: {done}, {state} · {self._summary(table)}"
        result = self._many.member(member.point).run.read_json(RESULT_FILE) or {}
        tests = {metric.name: number_of(result.get(f"test_{metric.name}")) for metric in table.workload.all_metrics}
        seconds = number_of(result.get("seconds", {}).get("total"))
        return member.point.label, f"{table.workload.format(tests)} in the test, after {seconds:.1f} s"

    def show_result(self, table: Table) -> None:
        """Print the whole table, sorted, and the epochs that stopping early has saved."""
        self.rest()
        if not self._quiet:
            self._console.print(self._table(table))
        trained = sum(member.epochs for member in table.by_point.values())
        full = self._num_epochs * len(table.by_point)
        self.say("epochs", f"{trained:.4g} trained; {full} if no trial had stopped early")

    def _table(self, table: Table) -> View:
        view, folds = View(box=None, padding=(0, 1, 0, 0)), ["fold"] * any(point.fold for point in table.by_point)
        searched, metric, rate = map(in_words, table.space.spaces), table.workload.monitor.name, table.workload.nouns
        for column in ("run", *searched, "seed", *folds, "epochs", metric, f"{rate}/s", "state"):
            view.add_column(column, justify="left" if column == "state" else "right", no_wrap=column != "state")
        best = find_best(table) if self._many.is_sweep else None
        for member in ranked(table):
            view.add_row(*map(redact, self._row(table, member, best)))
        return view

    def _row(self, table: Table, member: Member, best: Averaged | None) -> tuple[str, ...]:
        is_best, rate = best is not None and member.point.configuration == best.configuration, member.figures.get(RATE)
        return (
            str(member.number),
            *map(format_value, member.point.values.values()),
            str(member.point.seed),
            *([str(member.point.fold)] if member.point.fold else []),
            f"{member.epochs:.3g}/{self._num_epochs}",
            table.workload.monitor.format(table.value(member)),
            "-" if rate is None or math.isnan(rate) else f"{rate:,.0f}",
            member.state + (f": {member.reason}" if member.reason else "") + (" · best" if is_best else ""),
        )

    def _summary(self, table: Table) -> str:
        counts = {
            "done": table.count(DONE),
            STOPPED: table.count(STOPPED),
            "failed": table.count(FAILED, LOST),
            "going on": 0 if self._many.is_sweep else table.count(RUNNING, WAITING),
        }
        text = ", ".join(f"{number} {state}" for state, number in counts.items() if number or state == "done")
        if self._many.is_sweep and (best := find_best(table)):
            text += f"; best {table.workload.monitor.format(best.val_monitor)} ({best.mean_of})"
        return text
