"""Keeps a run's files, trackers and console up to date, and writes the run's report, however the run ends."""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
import threading
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

from mnist_ray.checkpoints.find import Fitted, read_initial
from mnist_ray.checkpoints.saved_model import weights_digest
from mnist_ray.checkpoints.state_file import read_state
from mnist_ray.cluster.nodes import check_nodes
from mnist_ray.cluster.plan import WorkerPlan
from mnist_ray.data.digests import digests_of
from mnist_ray.errors import JobError, with_place
from mnist_ray.job.session import Session
from mnist_ray.output import finite
from mnist_ray.provenance import origin
from mnist_ray.record.header import say_plan
from mnist_ray.record.history import History
from mnist_ray.record.time_spent import TimeSpent, notes_on, shares_of
from mnist_ray.report.run_files import FORMAT_VERSION
from mnist_ray.settings import json_lines
from mnist_ray.signals import first_only_noted, if_ended
from mnist_ray.storage import CONFIG_FILE, INITIAL_FILE, ORIGIN_FILE, REPORT_FILE, RESULT_FILE
from mnist_ray.text import count
from mnist_ray.trackers import Ending, start
from mnist_ray.training.events import EpochFinished, Event, Progress, Saved, Started, Validated
from mnist_ray.training.metrics import Evaluation
from mnist_ray.workload.figures import RATE, formatted

_GROWN = 10.0  # times the first step's loss: a training that diverges without numbers that are not finite
_LEARNED = 0.1  # examples count as learned if the loss falls to this fraction of the first loss
_MAX_TRACKING = 0.05  # of the run's time, spent waiting for trackers; more is noted


@contextlib.contextmanager
def recorded(session: Session, plan: WorkerPlan, *, is_end: bool = True) -> Iterator[Recorder]:
    """Show a run and write its files. However the run ends, write its report and close its trackers.

    An interrupt waits until both are done. Before the ``is_end`` of its training, a sweep's trial has no report.
    """
    num_parameters = say_plan(session, plan)
    write_settings(session, plan, session.job.values)
    record = Recorder(session, plan, num_parameters)
    has_failed = True
    try:
        with logs_named(session):
            yield record
        has_failed = False
    finally:
        with first_only_noted() as interrupted:
            record.close(has_report=is_end, has_failed=has_failed)
    record.print_files()
    if interrupted.is_set:
        raise KeyboardInterrupt


@contextlib.contextmanager
def logs_named(session: Session) -> Iterator[None]:
    """Add the folder of Ray's logs to an error."""
    try:
        yield
    except JobError as error:
        if not (logs := session.cluster.log_folder):
            raise
        error.hints += f" (logs: {logs})"
        raise


def write_settings(session: Session, plan: WorkerPlan, settings: Mapping[str, Any]) -> None:
    """Write a run's settings and origin. From then on, a terminated process prints how to resume the run.

    A resumed run keeps its origin. Raises JobError if a node cannot use the storage.
    """
    job, run, workload = session.job, session.job.run, session.job.workload
    if len(session.cluster.nodes) > 1:  # with one node, only this machine writes
        check_nodes(run)
    weights = b""
    if job.initial is not None and not job.initial.exists(INITIAL_FILE):
        weights, fits = read_initial(job.workload, job.asked["init_from"], job.run.storage_path)
        session.console.say("init from", fits)
    run.write_text(CONFIG_FILE, json_lines(settings))  # from here on, the run can be resumed
    if job.initial is not None and weights:
        job.initial.write_bytes(INITIAL_FILE, weights)
    if run.read_json(ORIGIN_FILE) is None:
        about = {
            "started": datetime.now().astimezone().isoformat(" ", "minutes"),
            "workload_sha256": workload.source.sha256,
            "workload_code": workload.source.text.splitlines(),  # for people to read; never loaded
            "metadata": workload.metadata,
            "data_name": session.data.name,
            "data": digests_of(session.data),
            "unused_settings": sorted(session.unused),
            "repository": session.repository.result(),
        }
        run.write_text(ORIGIN_FILE, json_lines({**origin(), **about}))
    if_ended(f"; to resume: {job.resume_with}")


class Recorder:
    """The record of one run; ``fit`` calls ``on_event``."""

    def __init__(self, session: Session, plan: WorkerPlan, num_parameters: int) -> None:
        self._session, self._plan = session, plan
        self._job, self._clock, self._console = session.job, session.clock, session.console
        self._origin = {**self._job.run.require_json(ORIGIN_FILE), "parameters": f"{num_parameters:,}"}
        self._result: dict[str, Any] | None = None
        self._has_report = False
        self._first_loss, self._has_grown = math.nan, False
        self._validated = set[int]()  # epochs whose validation is recorded; restarted workers report the last one again
        self._is_slow = False  # and lines have said so
        run, workload = self._job.run, self._job.workload
        self._warn = functools.partial(self._console.say, "note")
        self._history, self._times = History(run, workload, self._job.train), TimeSpent()
        self._trackers = start(run, workload, self._job.values, self._job.output.tracker, self._warn)

    def on_event(self, event: Event) -> None:
        """Record an event from a worker or a task."""
        if isinstance(event, Validated) and event.epoch in self._validated:
            return
        if isinstance(event, EpochFinished) and event.last.epoch == self._job.train.num_epochs:
            # Imports matplotlib while the last validation and the workers finish.
            threading.Thread(target=importlib.import_module, args=["mnist_ray.report.page"], daemon=True).start()
        if isinstance(event, Progress) and event.total_step == len(event.losses):
            self._first_loss = event.losses[0]
        if isinstance(event, Validated):
            self._validated.add(event.epoch)
        if isinstance(event, Started):
            self._validated = {epoch for epoch in self._validated if epoch <= event.epoch}
            worker = f"{event.device} with {count(event.threads, 'thread')}, {event.precision}"
            place = f"{event.processor} on {', '.join(dict.fromkeys(event.hosts))}"
            before = self._origin.get("precision", event.precision)
            if event.total_step and before != event.precision:
                self._warn(f"the run has trained in {before}, and continues in {event.precision} (--precision auto)")
            self._origin |= {"workers": f"{event.num_workers} × {worker} ({place})", "precision": event.precision}
            self._job.run.write_text(ORIGIN_FILE, json_lines(self._origin))
        self._clock.note(event)
        self._history.add(event)
        self._times.add(event)
        if isinstance(event, Saved) and event.epoch == 1 < self._job.train.num_epochs:
            self._note_slowness()
        if isinstance(event, EpochFinished) and not self._has_grown:
            self._note_growth(event.last.so_far["loss"])
        if isinstance(event, Progress) and (event.saves or event.step == event.epoch_steps):
            self._history.write_steps()  # a checkpoint follows, from which a killed run continues
        self._console.show(event)
        self._trackers.log(event)

    def _note_growth(self, loss: float) -> None:
        """Print a note, once, if the loss has grown far above the first step's: it may stay finite for long."""
        self._has_grown = loss > _GROWN * abs(self._first_loss)
        if self._has_grown:
            first, now = (formatted(value, "number") for value in (self._first_loss, loss))
            self._warn(f"the training loss has grown from {first} to {now}; lower --learning-rate, or fix the data")

    def _note_slowness(self) -> None:
        """Print a line for each cause of slow training, unless lines were printed before."""
        if self._is_slow or not self._times.of_workers:
            return
        notes = notes_on(self._times.of_workers, self._times.hosts, self._job, self._session.data.train)
        self._is_slow = len(notes) > 0
        for note in notes:
            self._warn(note)

    def begin_test(self, fitted: Fitted) -> None:
        """Print which checkpoint is tested, unless it is that of the last epoch."""
        self._clock.mark("saving")
        if fitted.metrics.epoch < max(self._history.rows, default=0):
            monitor = self._job.workload.monitor.name
            is_known = not math.isnan(fitted.metrics.values.get(f"val_{monitor}", math.nan))
            why = "the best by validation" if is_known else f"the first: {monitor} is NaN in each validation"
            self._console.say("testing", f"the checkpoint of epoch {fitted.metrics.epoch}, {why}")

    def add_test(self, fitted: Fitted, tested: Evaluation) -> None:
        """Write and show the result on the test set."""
        self._clock.mark("evaluation")
        job, workload = self._job, self._job.workload
        self._result = self._result_of(fitted, tested)
        if tested.columns:
            from mnist_ray.report.columns import write_columns  # imports pyarrow's Parquet, for 0.1 s

            columns = {"index": self._session.data.test.all_places, **tested.losses, **tested.columns}
            if note := write_columns(job.run, columns):
                self._warn(note)
        job.run.write_text(RESULT_FILE, json_lines(self._result))
        self._console.show_evaluation(tested)
        if job.train.overfit_batches is not None and not math.isnan(self._first_loss):  # NaN in a resumed run
            verdict = overfit_verdict(self._first_loss, tested.values(workload)["loss"])
            self._console.result("overfit", verdict)

    def _result_of(self, fitted: Fitted, tested: Evaluation) -> dict[str, Any]:
        """Return the content of result.json."""
        workload = self._job.workload
        rate = self._history.mean_rate() or fitted.metrics.values.get(RATE, math.nan)
        values = {"format_version": FORMAT_VERSION, **tested.to_dict(workload)} | {
            "formats": {figure.name: figure.form for figure in self._history.figures},
            "checkpoint": fitted.checkpoint.name,
            "weights_sha256": weights_digest(read_state(fitted.checkpoint)),
            "checkpoint_metrics": fitted.metrics.to_dict(),
            RATE: rate,
            "seconds": self._clock.seconds(),
            "is_resumed": self._job.is_resumed,
            "num_workers": self._history.num_workers or self._plan.num_workers,
            "workers": self._origin.get("workers"),
            **origin(),
        }
        return finite(values)

    def close(self, *, has_report: bool, has_failed: bool) -> None:
        """Write the report and close the trackers. If either fails, print a note: the run has not failed."""
        pictures: Mapping[str, bytes] = {}
        try:
            self._history.write_steps()
            if has_report:
                pictures = self._draw_report()
                self._has_report = True
        except (Exception, SystemExit) as error:  # must not hide the exception that has ended the run
            reason = str(error) if isinstance(error, JobError) else with_place(error, self._job.workload.source.folder)
            self._warn(f"no report: {reason}")
        self._clock.mark("report")
        self._trackers.close(Ending(self._result, pictures, has_failed))
        self._clock.mark("trackers")
        seconds = self._clock.seconds()
        if seconds["trackers"] > max(_MAX_TRACKING * seconds["total"], 1.0):
            self._warn(
                f"the tracker finished {seconds['trackers']:.1f} s after the training; it takes too long per event"
            )

    def _draw_report(self) -> dict[str, bytes]:
        from mnist_ray.report import page  # imports matplotlib

        job, test = self._job, self._session.data.test
        return page.write(job.run, job.workload, job.resume_with, test, self._warn)

    def print_files(self) -> None:
        """Print where the time went, and the paths of the run's files, if it is tested."""
        if self._result is None:
            return
        console, run, parts = self._console, self._job.run, self._clock.seconds()
        total, tested = parts.pop("total"), self._result["seconds"]["total"]
        if of_workers := self._times.of_workers:
            console.say("time", shares_of(of_workers))
            self._note_slowness()
        of_parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in parts.items() if seconds >= 0.05)
        console.say("seconds", f"{tested:.1f} until tested, {total:.1f} in all: {of_parts}")
        if self._job.train.reproducible:
            console.say("weights", f"SHA-256 {self._result['weights_sha256']}")
        console.result("checkpoint", run.inside(self._result["checkpoint"]).uri)
        console.result("result", run.inside(RESULT_FILE).uri)
        if self._has_report:
            console.result("report", run.inside(REPORT_FILE).uri)


def overfit_verdict(loss_before: float, loss_after: float) -> str:
    """Return the verdict of ``--overfit-batches``, from the first and the final loss on the same examples."""
    losses = f"the loss went from {loss_before:.4g} to {loss_after:.4g}"
    if loss_after <= _LEARNED * loss_before:
        return f"{losses}: the model can learn these examples"
    return (
        f"{losses}: the model has not learned even these examples; either something is broken (the targets, prepare, "
        "the loss, a layer), or training needs more --num-epochs or a different --learning-rate"
    )
