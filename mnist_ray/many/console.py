"""The console of a job of many runs: a table redrawn in place on a terminal; elsewhere, a line per finished run."""

from __future__ import annotations

import math
from collections import Counter

from rich.console import Group
from rich.table import Table as View
from rich.text import Text

from mnist_ray.many.rungs import Averaged, find_best, ranked
from mnist_ray.many.table import Many, Member, Table
from mnist_ray.report.console import RunConsole
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
        elif ended is not None:
            *_, epochs, value, _, state = self._row(table, ended, None)
            line = f"{table.workload.monitor.name} {value} after {epochs} epochs, {state} · {self._summary(table)}"
            if self._many.is_sweep:
                line = f"{format_settings(ended.point.values)}, {ended.point.label}: {line}"
            self.say(self._many.label_of(ended), line)

    def show_result(self, table: Table) -> None:
        """Print the whole table, sorted, and the epochs that stopping early has saved."""
        self.rest()
        if not self._quiet:
            self._console.print(self._table(table))
        trained = sum(member.epochs for member in table.members)
        full = self._num_epochs * len(table.members)
        self.say("epochs", f"{trained:.4g} trained; {full} if no trial had stopped early")

    def _table(self, table: Table) -> View:
        view, metric = View(box=None, padding=(0, 1, 0, 0)), table.workload.monitor.name
        names = ["run", *map(in_words, table.space.spaces), "seed", "fold", "epochs", metric]
        for name in (*names, f"{table.workload.nouns}/s"):
            view.add_column(name, justify="right", no_wrap=True)
        view.add_column("state")
        best = find_best(table) if self._many.is_sweep else None
        for member in ranked(table):
            view.add_row(*map(redact, self._row(table, member, best)))
        return view

    def _row(self, table: Table, member: Member, best: Averaged | None) -> tuple[str, ...]:
        point, rate = member.point, member.figures.get(RATE, math.nan)
        is_best = best is not None and point.configuration == best.configuration
        return (
            str(member.number),
            *map(format_value, point.values.values()),
            str(point.seed),
            str(point.fold or "-"),
            f"{member.epochs:.3g}/{self._num_epochs}",
            table.workload.monitor.format(table.value(member)),
            "-" if math.isnan(rate) else f"{rate:,.0f}",
            member.state + (f": {member.reason}" if member.reason else "") + (" · best" if is_best else ""),
        )

    def _summary(self, table: Table) -> str:
        counts = Counter(member.state for member in table.members)
        text = ", ".join(f"{number} {state}" for state, number in sorted(counts.items()))
        if self._many.is_sweep and (best := find_best(table)):
            text += f"; best {table.workload.monitor.format(best.val_monitor)} ({best.mean_of})"
        return text
