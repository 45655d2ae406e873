"""``--dry-run``: prints how a run would go, and checks every node."""

from __future__ import annotations

import math

from mnist_ray import extras
from mnist_ray.cluster.devices import check_nodes
from mnist_ray.cluster.plan import WorkerPlan
from mnist_ray.job.find import read_initial
from mnist_ray.job.session import Session
from mnist_ray.provenance import versions
from mnist_ray.storage import INITIAL_FILE
from mnist_ray.text import count, format_settings


def check_nodes_for(session: Session, plan: WorkerPlan) -> None:
    """Print where a job would run, and check every node. Raises JobError if a node cannot take part."""
    job, console = session.job, session.console
    own_versions, batch_size = versions(), job.train.batch_size
    if job.initial is not None and not job.initial.exists(INITIAL_FILE):
        console.say("init from", read_initial(job)[1])
    hosts = ["this process"] if session.is_here else check_nodes(job.run, plan, own_versions)
    slices = f"{math.ceil(batch_size / max(1, plan.num_workers))} of a step's {batch_size} {job.workload.nouns} each"
    where = ", ".join([plan.placement, *map("=".join, plan.labels.items())])
    console.say("plan", f"{count(plan.num_workers, 'worker')} ({where}); {slices}")
    console.say("storage", f"{job.run.storage_path}: read by {', '.join(hosts) or 'no node yet'}")
    console.say("versions", ", ".join(f"{name} {version}" for name, version in own_versions.items()))
    if not session.is_here:
        found = extras.listed(plain=job.workers.plain_ray)
        groups = [f"{state}: {', '.join(extra.gain for extra in group)}" for state, group in found.items() if group]
        console.say("extras", "; ".join(groups))
    if plan.must_scale_up:
        console.say("note", "this check cannot tell whether the cluster can start nodes for these workers")
    for place, values in job.layers.decided():
        console.say("settings", f"{format_settings(values)} (from {place})")
    console.say("check", "this job would run")
