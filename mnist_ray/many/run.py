"""A job of many runs on a connected Ray: the training of its members, the choice, and the test of the best."""

from __future__ import annotations

import dataclasses
import functools
import sys

import ray

from mnist_ray.checkpoints.find import best_of
from mnist_ray.cluster.plan import Cluster, WorkerPlan
from mnist_ray.cluster.remote_data import may_be_stored
from mnist_ray.data.data import Data, Split
from mnist_ray.job.session import Clock, Session, console_of
from mnist_ray.many import summary
from mnist_ray.many.console import ManyConsole
from mnist_ray.many.executor import at_a_time, train_members
from mnist_ray.many.member import MemberSpec, NotesConsole
from mnist_ray.many.points import Configuration
from mnist_ray.many.ranking import Averaged, averaged, find_best
from mnist_ray.many.rungs import error_of_fraction
from mnist_ray.many.table import Many, Table
from mnist_ray.record.header import say_plan
from mnist_ray.record.recorder import known_repository, logs_named, write_settings
from mnist_ray.report.run_files import DONE
from mnist_ray.run import fit
from mnist_ray.settings import json_lines
from mnist_ray.storage import BEST_FILE, MEMBERS_FILE, MEMBERS_FOLDER, RESULT_FILE
from mnist_ray.text import count, format_settings
from mnist_ray.workload.calls import splits_for

_LARGE_ERROR = 0.01  # of the validation, as a fraction: smaller ones need no words


def train_many(session: Session, plan: WorkerPlan, many: Many, data: Data) -> None:
    """Train the members that are not finished; of a sweep, choose and test the best; write the result.

    A sweep that has chosen its best configuration runs no more trials, so that the choice does not change. Raises
    JobError and TrainingStoppedError.
    """
    run, configuration = many.job.run, Configuration()
    say_plan(session, plan)
    write_settings(session, plan, many.values)
    run.check_subfolders(MEMBERS_FOLDER)
    with logs_named(session):
        table = many.table() if run.exists(BEST_FILE) else _train_all(session, plan, many, data)
        if many.is_sweep:
            configuration = _choose(session, many, table)
            _test(session, plan, many, data, table, configuration)
    summary.write(session, many, [many.member(point) for point in many.points(configuration)])


def _train_all(session: Session, plan: WorkerPlan, many: Many, data: Data) -> Table:
    """Train the members, and show them; return their table."""
    console = session.console
    assert isinstance(console, ManyConsole)
    fields = [field for field in (data.train, data.validation, data.test) if field is not None]
    are_stored = not session.is_here and all(may_be_stored(Split(field)) for field in fields)
    spec = MemberSpec(
        many,
        plan,
        Cluster(session.cluster.is_local, session.cluster.nodes, session.cluster.log_folder),
        known_repository(session),
        session.own_unused,
        tuple(sys.argv),
        ray.put(data) if are_stored else None,  # else, each process loads them
    )
    concurrent = at_a_time(many, plan, session.cluster)
    console.say("at a time", count(concurrent, "run"))
    console.waiting("starting …")
    table = train_members(spec, data, concurrent, console.show_table, console.say)
    if many.is_sweep:
        console.show_result(table)
    session.clock.mark("runs")
    return table


def _choose(session: Session, many: Many, table: Table) -> Configuration:
    """Choose the best configuration; write it, and print it and the default."""
    console, run, monitor, chosen = session.console, many.job.run, many.job.workload.monitor, find_best(table)
    assert chosen is not None  # else train_members has raised
    run.write_text(BEST_FILE, json_lines(many.job.with_values(dict(chosen.configuration)).values))
    console.say("files", f"{run.inside(MEMBERS_FILE).uri}, {BEST_FILE}")

    def said(each: Averaged) -> str:
        value = f"{monitor.format(each.val_monitor)} validation {monitor.name}, {each.mean_of}"
        return f"{value}: {format_settings(dict(each.configuration))}"

    console.say("best", said(chosen))
    default = None if many.space.default is None else averaged(table, many.space.default)
    if default is not None and default.configuration != chosen.configuration:
        console.say("default", said(default))
    elif default is not None:
        console.say("default", "it is the best")
    number = many.num_validation
    fraction = (chosen.val_monitor * number + 1) / (number + 2)  # else 100 % of few would have no error
    if monitor.is_fraction and (error := error_of_fraction(fraction, number)) > _LARGE_ERROR:
        few = f"on {count(number, many.job.workload.noun)} of validation"
        console.say("note", f"{few}, configurations that differ by less than {error:.0%} may be as good")
    return chosen.configuration


def _test(
    session: Session, plan: WorkerPlan, many: Many, data: Data, table: Table, configuration: Configuration
) -> None:
    """Test the runs of the chosen configuration; first train again one that was lost."""
    for point in many.points(configuration):
        job, member = many.member(point), table.by_point.get(point)
        if job.run.exists(RESULT_FILE):
            continue
        is_done = member is not None and member.state == DONE
        note = functools.partial(session.console.say, "note")
        console = NotesConsole(job, note) if is_done else console_of(job)
        splits = splits_for(job.workload, data, job.train)
        own = dataclasses.replace(session, job=job, data=splits, console=console, clock=Clock())
        with console:
            fit.train_run(own, plan, trained=best_of(job.run) if is_done else None, is_last=False)
