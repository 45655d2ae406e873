"""A run's files, trackers and console as it goes; and its report, however it ends."""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from mnist_ray.cluster.remote_data import check_nodes
from mnist_ray.errors import JobError, count, with_place
from mnist_ray.provenance import origin, versions
from mnist_ray.run.console import RunConsole
from mnist_ray.run.evaluate import evaluate, evaluate_here
from mnist_ray.run.failures import TrainingStoppedError
from mnist_ray.run.fit import Fitted
from mnist_ray.run.history import History, write_predictions
from mnist_ray.run.job import Job
from mnist_ray.run.session import Session, say_plan
from mnist_ray.settings import json_lines
from mnist_ray.signals import if_ended
from mnist_ray.storage import (
    CONFIG_FILE,
    ORIGIN_FILE,
    REPORT_FILE,
    RESULT_FILE,
    TRACE_FILE,
    WORKLOAD_FILE,
    RunFolder,
)
from mnist_ray.trackers import start
from mnist_ray.trackers.tracker import Ending
from mnist_ray.training.checkpoint import MODEL_FILE, read_state
from mnist_ray.training.events import EpochFinished, Event, Progress, Validated
from mnist_ray.training.metrics import Evaluation
from mnist_ray.workload.base import Workload
from mnist_ray.workload.data import Splits
from mnist_ray.workload.loading import digests_of

_LEARNED = 0.1  # of the loss before
MoreSections = Callable[[RunFolder], Any]  # returns the ``Sections`` that a report adds, as of a sweep's trials


@contextlib.contextmanager
def recorded(session: Session, sections: MoreSections | None = None) -> Iterator[Record]:
    """Show and keep how a run goes. However it ends, its report is written and its trackers are closed.

    Adds to an exception that is raised meanwhile what the user can do about it.
    """
    record, job, logs = Record(session, sections), session.job, session.cluster.log_folder
    say_plan(session)
    record.begin()
    if_ended(f"; to go on: {job.resume_with}")
    try:
        yield record
    except TrainingStoppedError as error:
        raise JobError(f"{error} (logs: {logs})") from error
    except JobError as error:
        raise type(error)(f"{error} (logs: {logs}; to go on: {job.resume_with})") from error
    finally:
        record.close()
    session.clock.mark("report")
    record.print_files()


class Record:
    """One run as it goes. ``on_event`` is what ``fit`` tells."""

    def __init__(self, session: Session, sections: MoreSections | None) -> None:
        self._session, self._sections = session, sections
        self._job, self._clock, self._console = session.job, session.clock, session.console
        self._result: dict[str, Any] | None = None
        self._fitted: Fitted | None = None
        self._has_report = False
        self._live_report = LiveReport(functools.partial(self._draw_report, is_running=True))
        self._first_loss = math.nan

    def begin(self) -> None:
        """Write the files that are known before the first step. Raises JobError if the storage cannot be used."""
        run, workload = self._job.run, self._job.workload
        if len(self._session.cluster.nodes) > 1:  # else nobody but this machine writes
            check_nodes(run)
        run.write_text(CONFIG_FILE, json_lines(self._job.values))
        write_origin(self._job, self._session.data)
        warn = functools.partial(self._console.say, "note")
        self._history = History(run, workload, warn)
        self._trackers = start.start(run, workload, self._job.values, self._job.output, warn)

    def on_event(self, event: Event) -> None:
        """Take an event of a worker or task."""
        if isinstance(event, EpochFinished) and event.last.epoch == self._job.train.num_epochs:
            # Imports matplotlib, while the last validation and the workers' end are waited for.
            threading.Thread(target=importlib.import_module, args=["mnist_ray.report.page"], daemon=True).start()
        if isinstance(event, Progress) and event.total_step == len(event.losses):
            self._first_loss = event.losses[0]
        self._clock.note(event)
        self._history.add(event)
        self._console.show(event)
        self._trackers.log(event)
        if isinstance(event, (EpochFinished, Validated)):
            self._live_report.refresh()

    def test(self, fitted: Fitted, *, is_last: bool = True) -> float:
        """Evaluate the fitted checkpoint on the test set; show and write the result. Return the monitor's value.

        ``is_last``: the cluster is left then, while the report is written.
        """
        workload, test, loader_workers = self._job.workload, self._session.data.test, self._job.workers.loader_workers
        self._clock.mark("validation")
        if self._session.is_here:
            tested = evaluate_here(fitted.checkpoint, workload, test, loader_workers)
        else:
            tested = evaluate(workload, fitted.checkpoint, test, loader_workers=loader_workers)
        self._clock.mark("evaluation")
        if is_last:
            self._session.cluster.leave()
        return self._finish(fitted, tested)

    def _finish(self, fitted: Fitted, tested: Evaluation) -> float:
        job, workload = self._job, self._job.workload
        if len(self._session.data.validation) and (epochs := self._history.unvalidated):
            shown = ", ".join(map(str, epochs))
            self._console.say("note", f"not validated, since the task failed or the run was interrupted: epoch {shown}")
        result = tested.to_dict(workload) | {
            "checkpoint": fitted.checkpoint.name,
            "weights_sha256": read_state(fitted.checkpoint)["sha256"][MODEL_FILE],
            "checkpoint_metrics": fitted.metrics,
            workload.rate: self._history.mean_rate() or fitted.metrics[workload.rate],
            "seconds": self._clock.seconds(),
            "num_workers": self._history.num_workers,
            **origin(),
        }
        write_predictions(job.run, workload, tested)
        job.run.write_text(RESULT_FILE, json_lines(result))
        print_evaluation(self._console, workload, tested)
        if job.train.overfit_batches is not None:
            self._console.result("overfit", overfit_verdict(self._first_loss, result["test_loss"]))
        self._fitted, self._result = fitted, result
        return float(result[f"test_{workload.monitor.name}"])

    def close(self) -> None:
        """Write the report and close the trackers. A failure of these is a note: the run is not lost for it."""
        pictures: Mapping[str, bytes] = {}
        self._live_report.close()
        try:
            self._history.flush()
            pictures = self._draw_report(warn=functools.partial(self._console.say, "note"))
            self._has_report = True
        except Exception as error:  # the run's own exception, if there is one, is not to be hidden by another
            said = str(error) if isinstance(error, JobError) else with_place(error, self._job.workload.source.folder)
            self._console.say("note", f"no report: {said}")
        self._trackers.close(Ending(self._result, pictures, self._fitted.checkpoint if self._fitted else None))

    def _draw_report(self, *, is_running: bool = False, warn: Callable[[str], None] = lambda note: None) -> Any:
        from mnist_ray.report import page  # imports matplotlib

        job, sections = self._job, self._sections(self._job.run) if self._sections else None
        test = self._session.data.test
        return page.write(job.run, job.workload, job.resume_with, test, sections, warn, is_running=is_running)

    def print_files(self) -> None:
        """Say where the seconds went, and where the files are."""
        assert self._result is not None
        console, run, parts = self._console, self._job.run, self._clock.seconds()
        total, tested = parts.pop("total"), self._result["seconds"]["total"]
        each = ", ".join(f"{name} {seconds:.1f}" for name, seconds in parts.items())
        console.say("seconds", f"{tested:.1f} until tested, {total:.1f} in all: {each}")
        if self._job.train.reproducible:
            console.say("weights", f"SHA-256 {self._result['weights_sha256']}")
        console.result("checkpoint", run.inside(self._result["checkpoint"]).uri)
        console.result("result", run.inside(RESULT_FILE).uri)
        if self._job.output.profile is not None and run.exists(TRACE_FILE):
            console.result("profile", f"{run.inside(TRACE_FILE).uri}, for ui.perfetto.dev")
        if self._has_report:
            console.result("report", run.inside(REPORT_FILE).uri)


def write_origin(job: Job, data: Splits) -> None:
    """Write how a run begins; a resumed run keeps the file that is there.

    Raises JobError if the storage cannot be used.
    """
    workload = job.workload
    if job.run.read_json(ORIGIN_FILE) is None:
        about = {
            "workload_sha256": workload.source.sha256,
            "metadata": workload.metadata,
            "data_name": data.name,
            "data": digests_of(data),
        }
        job.run.write_text(ORIGIN_FILE, json_lines({**origin(), **about}))
        job.run.write_text(WORKLOAD_FILE, workload.source.text)  # to be read by people; it is never loaded from there


def overfit_verdict(loss_before: float, loss_after: float) -> str:
    """Return what ``--overfit-batches`` has shown, by the loss of the first step and that on the same examples now."""
    went = f"the loss went from {loss_before:.4g} to {loss_after:.4g}"
    if loss_after <= _LEARNED * loss_before:
        return f"{went}: the model can learn these examples"
    return (
        f"{went}: the model has not learned even these examples; either something is broken (the targets, prepare, the "
        "loss, a layer), or it takes more --num-epochs or another --learning-rate"
    )


def print_evaluation(console: RunConsole, workload: Workload, tested: Evaluation) -> None:
    """Print the result on the test set."""
    for label, line in workload.lines(tested.columns):
        console.say(label, line)
    values = tested.values(workload)
    shown = [*workload.metrics, *(metric for metric in workload.all_metrics if metric not in workload.metrics)]
    said = ", ".join(f"{metric.name} {metric.format(values[metric.name])}" for metric in shown)
    console.result("test", f"{said} on {tested.num_examples:,} {workload.nouns}")


def check(session: Session) -> None:
    """Print how a job would run; every node proves that it can take part. Raises JobError if one cannot."""
    job, console, plan = session.job, session.console, session.plan
    own_versions, batch_size = versions(), job.train.batch_size
    hosts = ["this process"] if session.is_here else check_nodes(job.run, own_versions)
    each = f"a step's {batch_size} {job.workload.nouns} are {math.ceil(batch_size / max(1, plan.num_workers))} a worker"
    console.say("plan", f"{count(plan.num_workers, 'worker')} ({plan.placement}); {each}")
    console.say("storage", f"{job.run.storage_path}: read by {', '.join(hosts)}")
    console.say("versions", ", ".join(f"{name} {version}" for name, version in own_versions.items()))
    if plan.must_scale_up:
        console.say("note", "whether the cluster can start nodes for these workers is only seen when it is asked to")
    console.say("check", "this job would run")


_EVERY_S = 30.0  # at the most


class LiveReport:
    """Writes a report in a thread of its own, whenever it is asked to, but not for half a minute after the last."""

    def __init__(self, write: Callable[[], object]) -> None:
        self._write = write
        self._next = time.monotonic() + _EVERY_S
        self._thread: threading.Thread | None = None

    def refresh(self) -> None:
        """Write it soon, unless it is being written or was so just now."""
        if time.monotonic() > self._next and not (self._thread and self._thread.is_alive()):
            self._thread = threading.Thread(target=self._work, daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Wait for a report that is being written; write none from now on."""
        if self._thread is not None:
            self._thread.join()
        self._next = math.inf

    def _work(self) -> None:
        with contextlib.suppress(Exception):  # the last report, which the run ends with, says what is wrong
            self._write()
        self._next = time.monotonic() + _EVERY_S
