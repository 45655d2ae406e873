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

from mnist_ray.checkpoints.find import read_initial, weights_digest
from mnist_ray.checkpoints.state_file import read_metrics, read_state
from mnist_ray.cluster.nodes import check_nodes
from mnist_ray.cluster.plan import WorkerPlan
from mnist_ray.data.digests import digests_of
from mnist_ray.errors import JobError, with_place
from mnist_ray.job.session import Session
from mnist_ray.output import finite
from mnist_ray.provenance import origin
from mnist_ray.record.header import say_plan
from mnist_ray.record.history import History
from mnist_ray.record.time_spent import TimeSpent
from mnist_ray.report.run_files import FORMAT_VERSION
from mnist_ray.schema import CONFIG_FILE, INITIAL_FILE, ORIGIN_FILE, REPORT_FILE, RESULT_FILE
from mnist_ray.settings import json_lines
from mnist_ray.signals import defer_first_interrupt, if_ended
from mnist_ray.storage import RunFolder
from mnist_ray.text import count
from mnist_ray.trackers import Ending, start
from mnist_ray.training.events import EpochFinished, Event, Note, Progress, Saved, Started, Validated
from mnist_ray.training.metrics import Evaluation
from mnist_ray.workload.figures import DONE_ON, RATE


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
        with defer_first_interrupt() as interrupted:
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
            "unused_settings": sorted(job.unused),
            "repository": session.repository.result(),
        }
        run.write_text(ORIGIN_FILE, json_lines({**origin(), **about}))
    if_ended(f"; to resume: {job.resume_with}")


class Recorder:
    """Keeps a run's files, and passes each of the run's events on to all that show it."""

    def __init__(self, session: Session, plan: WorkerPlan, num_parameters: int) -> None:
        self._session, self._plan = session, plan
        self._job, self._clock, self._console = session.job, session.clock, session.console
        job, run, workload = session.job, session.job.run, session.job.workload
        self._origin = {**run.require_json(ORIGIN_FILE), "parameters": f"{num_parameters:,}"}
        self._result: dict[str, Any] = {}
        self._has_report = False
        self._validated = set[int]()  # total steps at recorded validations; restarted workers report the last one again
        self._warn = functools.partial(self._console.say, "note")
        self._history, self._times = History(run, workload, job.train), TimeSpent()
        self._trackers = start(run, workload, job.values, job.output.tracker, self._warn)

    def on_event(self, event: Event) -> None:
        """Record an event from a worker or a task, and show it."""
        notes = list[str]()
        match event:
            case Started():
                self._validated = {step for step in self._validated if step <= event.total_step}
                notes = self._describe_workers(event)
            case EpochFinished(last) if last.epoch == self._job.train.num_epochs:
                # Imports matplotlib while the last validation and the workers finish.
                threading.Thread(target=importlib.import_module, args=["mnist_ray.report.page"], daemon=True).start()
            case Validated():
                if event.total_step in self._validated:
                    return
                self._validated.add(event.total_step)
            case Saved(epoch) if epoch == 1 < self._job.train.num_epochs:
                notes = self._times.new_notes()
        self._clock.note(event)
        self._history.add(event)
        self._times.add(event)
        self._console.show(event)
        self._trackers.log(event)
        if isinstance(event, Progress) and (event.saves or event.step == event.epoch_steps):
            self._history.write_steps()  # a checkpoint follows, from which a killed run continues
        for note in notes:
            self.on_event(Note(note))

    def _describe_workers(self, event: Started) -> list[str]:
        """Write which workers train to origin.json; return a note if their precision has changed."""
        worker = f"{event.device} with {count(event.threads, 'thread')}, {event.precision}"
        place = f"{event.processor} on {', '.join(dict.fromkeys(event.hosts))}"
        before = self._origin.get("precision", event.precision)
        self._origin |= {"workers": f"{event.num_workers} × {worker} ({place})", "precision": event.precision}
        self._job.run.write_text(ORIGIN_FILE, json_lines(self._origin))
        if not event.total_step or before == event.precision:
            return []
        return [f"the run has trained in {before}, and continues in {event.precision} (--precision auto)"]

    def begin_test(self, checkpoint: RunFolder) -> None:
        """Print which checkpoint is tested, unless it is that of the last epoch."""
        self._clock.mark("saving")
        metrics = read_metrics(checkpoint)
        if metrics.epochs < max(self._history.rows, default=0):
            monitor = self._job.workload.monitor.name
            is_known = not math.isnan(metrics.values.get(f"val_{monitor}", math.nan))
            why = "the best by validation" if is_known else f"the first: {monitor} is NaN in each validation"
            self._console.say("testing", f"the checkpoint of epoch {metrics.epochs:.4g}, {why}")

    def add_test(self, checkpoint: RunFolder, tested: Evaluation) -> None:
        """Write and show the result on the test set; without one, on the validation set."""
        self._clock.mark("evaluation")
        job, test = self._job, self._session.data.test
        self._result = self._result_of(checkpoint, tested)
        if tested.columns:
            from mnist_ray.report.columns import write_columns  # imports pyarrow's Parquet, for 0.1 s

            if note := write_columns(job.run, {"index": test.all_indices, **tested.losses, **tested.columns}):
                self._warn(note)
        job.run.write_text(RESULT_FILE, json_lines(self._result))
        self._console.show_evaluation(tested, self._session.data.evaluated)
        for note in self._result["notes"]:
            self._warn(note)

    def _result_of(self, checkpoint: RunFolder, tested: Evaluation) -> dict[str, Any]:
        """Return the content of result.json."""
        workload, metrics = self._job.workload, read_metrics(checkpoint)
        rate = self._history.mean_rate() or metrics.values.get(RATE, math.nan)
        values = {"format_version": FORMAT_VERSION, **tested.to_dict(workload, self._session.data.evaluated)} | {
            "formats": {figure.name: figure.form for figure in self._history.figures},
            "notes": tested.notes(self._session.data.test, workload.nouns),
            "checkpoint": checkpoint.name,
            "weights_sha256": weights_digest(read_state(checkpoint)),
            "checkpoint_metrics": metrics.to_dict(),
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
        job, pictures = self._job, dict[str, bytes]()
        try:
            self._history.write_steps()
            if has_report:
                from mnist_ray.report import page  # imports matplotlib

                pictures = page.write(job.run, job.workload, job.resume_with, self._session.data.test, self._warn)
                self._has_report = True
        except (Exception, SystemExit) as error:  # must not hide the exception that has ended the run
            reason = str(error) if isinstance(error, JobError) else with_place(error, job.workload.source.folder)
            self._warn(f"no report: {reason}")
        self._clock.mark("report")
        self._trackers.close(Ending(self._result or None, pictures, has_failed))
        self._clock.mark("trackers")

    def print_files(self) -> None:
        """Print where the time went, and the paths of the run's files, if it is tested."""
        if not self._result:
            return
        console, run, parts = self._console, self._job.run, self._clock.seconds()
        total, tested = parts.pop("total"), self._result["seconds"]["total"]
        if self._times.shares:
            console.say("time", self._times.shares)
        for note in self._times.new_notes():
            self._warn(note)
        of_parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in parts.items() if seconds >= 0.05)
        done = DONE_ON[self._session.data.evaluated]
        console.say("seconds", f"{tested:.1f} until {done}, {total:.1f} in all: {of_parts}")
        if self._job.train.reproducible:
            console.say("weights", f"SHA-256 {self._result['weights_sha256']}")
        console.result("checkpoint", run.inside(self._result["checkpoint"]).uri)
        console.result("result", run.inside(RESULT_FILE).uri)
        if self._has_report:
            console.result("report", run.inside(REPORT_FILE).uri)
