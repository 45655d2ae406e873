"""Trains a run again from its files, and compares the weights to the bit."""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

from pyarrow import fs

from mnist_ray import provenance, repository
from mnist_ray.config import ReproductionConfig
from mnist_ray.data.data import Splits
from mnist_ray.data.digests import digests_of
from mnist_ray.errors import UsageError
from mnist_ray.job.job import Job, read_job
from mnist_ray.job.job_data import load_splits
from mnist_ray.output import say
from mnist_ray.process import usable_cores
from mnist_ray.report.run_files import settings_of, workload_of
from mnist_ray.storage import (
    CONFIG_FILE,
    INITIAL_FILE,
    ORIGIN_FILE,
    RESULT_FILE,
    SWEEP_FILE,
    RunFolder,
    new_name,
    write_file,
)
from mnist_ray.text import command, count
from mnist_ray.tools.differences import Difference, as_dict, both, first_of, lines_of, pairs_differ
from mnist_ray.workload import loading
from mnist_ray.workload.base import Workload

_NO_RECORD = "the run has no record to compare with"


def reproduce(
    run: RunFolder,
    storage_path: str,
    reference: loading.Reference | None,
    config: ReproductionConfig,
    train: Callable[[Job, Callable[[Splits], object]], None],
) -> int:
    """Print what differs here, ``train`` again, compare the weights. Return 0 if they are the same, else 1.

    ``reference``: the workload's code, if it has moved. With ``dry_run``, train nothing and return 0. Raises
    UsageError, also if the run is unfinished or its code may have come with it, and the errors of ``train``.
    """
    result = _result_of(run, is_needed=not config.dry_run)
    origin = run.read_json(ORIGIN_FILE) or {}
    workload = workload_of(run, reference, storage_path)
    with _config_file(run) as file:
        job = read_job(_settings(run, file, storage_path, workload, config, result), is_call=False)
    found: dict[str, Difference] = {
        "code": _code_differs(origin, job),
        "data": None,  # not loaded yet
        "repository": _repository_differs(origin, job),
        "versions": _versions_differ(origin),
        "packages": _packages_differ(run.read_text(provenance.PACKAGES_FILE)),
        "processor": _processor_differs(origin),
    }

    def say_differences(splits: Splits) -> None:
        found["data"] = _data_differ(origin, splits)
        for label, text in lines_of(found, _NO_RECORD):
            say(f"{label:<10} {text}")

    if config.dry_run:
        say_differences(load_splits(job))
        return 0
    train(job, say_differences)
    again, differing = job.run.require_json(RESULT_FILE), [name for name, difference in found.items() if difference]
    before, after = result["weights_sha256"], again["weights_sha256"]
    if before == after:
        say(f"weights    SHA-256 {after}: the same as {run.name}'s, bit for bit")
        return 0
    reasons = [*differing, *_workers_differ(result, again, is_reproducible=job.train.reproducible)]
    unknown = "none that is known; kernels may sum in another order each time, above all on GPUs"
    say(f"weights    SHA-256 {after}, not {before} as {run.name}; possible reasons: {', '.join(reasons) or unknown}")
    return 1


def _result_of(run: RunFolder, *, is_needed: bool) -> dict[str, Any]:
    """Return a run's result. Raises UsageError if the run is a sweep or, if the result ``is_needed``, unfinished."""
    if run.exists(SWEEP_FILE):
        remedy = f"{command('train')} --config {run.inside('best.json').uri}"
        raise UsageError(f"{run.uri} is a sweep; name a run, such as one that {remedy} has trained")
    result = run.read_json(RESULT_FILE)
    if not is_needed:
        return result or {}
    settings_of(run)  # raises an error if it is no run
    if result is None:
        raise UsageError(f"run {run.uri} is not finished: it has no {RESULT_FILE}; --dry-run only compares what it has")
    if not isinstance(result.get("weights_sha256"), str):
        raise UsageError(f"{run.inside(RESULT_FILE).uri} has no weights_sha256, as an older version wrote it")
    return result


@contextlib.contextmanager
def _config_file(run: RunFolder) -> Iterator[str]:
    """Yield the path of a run's settings: for a run in an object store, that of a copy."""
    if isinstance(run.filesystem, fs.LocalFileSystem):
        yield f"{run.path}/{CONFIG_FILE}"
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / CONFIG_FILE
        write_file(file, (run.read_text(CONFIG_FILE) or "").encode())
        yield str(file)


def _settings(
    run: RunFolder,
    file: str,
    storage_path: str,
    workload: Workload,
    config: ReproductionConfig,
    result: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the settings of the new run: the old one's, with its numbers of workers and threads as they were."""
    name = re.sub(r"^[^A-Za-z0-9]+|[^A-Za-z0-9._-]", "", run.name)[:150] or "run"
    given: dict[str, Any] = {
        "config": file,
        "workload": workload.source.reference,
        "run_name": new_name(f"{name}_again"),
        "storage_path": storage_path,
    }
    saved, threads = settings_of(run), re.search(r"cpu with (\d{1,9}) thread", str(result.get("workers")))
    if config.num_workers is not None:
        given["num_workers"] = config.num_workers
    elif saved.get("num_workers") != 0 and isinstance(result.get("num_workers"), int):
        given["num_workers"] = result["num_workers"]
    if threads and not saved.get("reproducible") and int(threads[1]) <= usable_cores():
        given["cpus_per_worker"] = int(threads[1])  # else a worker may choose another number, by a timing
    if config.callback:
        given["callback"] = config.callback
    if saved.get("init_from") is not None and run.exists(INITIAL_FILE):
        given["init_from"] = run.inside(INITIAL_FILE).uri  # the original may have changed
    return given


def _code_differs(origin: Mapping[str, Any], job: Job) -> Difference:
    """Compare the workload's file, the modules that it had imported, the callback, and this package's code."""
    source, code = job.workload.source, as_dict(origin.get("code"))
    if origin.get("workload_sha256") is None:
        return None
    differing = [Path(source.reference).name] if origin["workload_sha256"] != source.sha256 else []
    if modules := _changed(source.home, as_dict(code.get("modules"))):
        differing.append(f"{count(len(modules), 'module')} ({first_of(modules)})")
    if code.get("callbacks", []) != [callback.sha256 for callback in job.callbacks] and "callbacks" in code:
        differing.append("the callbacks")
    if code.get("package_sha256") not in (None, provenance.package_sha256()):
        commits = both(origin.get("git_commit"), provenance.git_commit())
        differing.append(f"mnist_ray itself (commit {commits})")
    return ", ".join(differing)


def _repository_differs(origin: Mapping[str, Any], job: Job) -> Difference:
    """Compare the commit of the workload's repository, and uncommitted changes."""
    if not (then := as_dict(as_dict(origin.get("code")).get("repository"))):
        return None
    try:
        now = repository.state_of(job.workload.source.place)
    except repository.GitError as error:
        return str(error)
    if now is None:
        return f"there is none at {job.workload.source.place}"
    differing = []
    if then.get("commit") != now.commit:
        differing.append(f"commit {both(then.get('commit'), now.commit)}")
    if then.get("changes_sha256") != now.changes_sha256:
        differing.append(f"uncommitted changes ({_about_changes(then)})")
    if untracked := _changed(Path(now.folder), as_dict(then.get("untracked"))):
        differing.append(f"{count(len(untracked), 'untracked file')} ({first_of(untracked)})")
    return ", ".join(differing)


def _about_changes(then: Mapping[str, Any]) -> str:
    """Return where a run's uncommitted changes are, if it had any."""
    if then.get("changes_sha256") is None:
        return "the run had none"
    num_bytes = then.get("changes_bytes")
    is_kept = isinstance(num_bytes, int) and num_bytes <= repository.MAX_DIFF_BYTES
    return f"the run's are in its {provenance.CHANGES_FILE}" if is_kept else "the run's were too many to keep"


def _versions_differ(origin: Mapping[str, Any]) -> Difference:
    return pairs_differ(then, provenance.versions()) if (then := origin.get("versions")) else None


def _packages_differ(text: str | None) -> Difference:
    """Compare all packages except those of ``versions``."""
    if text is None:
        return None
    then = dict(line.split("==", 1) for line in text.splitlines() if "==" in line)
    first = {*provenance.versions()}
    others = [
        {name: version for name, version in packages.items() if name.replace("-", "_") not in first}
        for packages in (then, provenance.packages())
    ]
    return pairs_differ(*others)


def _processor_differs(origin: Mapping[str, Any]) -> Difference:
    """Compare what decides the last bits of a result."""
    if not (then := as_dict(origin.get("arithmetic"))):
        return None
    now, differing = provenance.arithmetic(), []
    for name in ("processor", "caches"):
        before, after = then.get(name), now[name]
        before = [*map(str, before)] if isinstance(before, list) else []
        if before != after:
            lost = [value for value in before if value not in after]
            new = [value for value in after if value not in before]
            differing.append(f"{name} {both(' '.join(lost), ' '.join(new))}")
    return ", ".join(differing)


def _data_differ(origin: Mapping[str, Any], splits: Splits) -> Difference:
    then, now = as_dict(origin.get("data")), digests_of(splits)
    known = [name for name in then if None not in (then[name], now.get(name))]
    if not known:
        return None
    differing = [name for name in known if then[name] != now[name]]
    return f"{', '.join(differing)} of {splits.name}" if differing else ""


def _workers_differ(before: Mapping[str, Any], after: Mapping[str, Any], *, is_reproducible: bool) -> list[str]:
    """Return whether the numbers of workers and threads, devices or precision differ, as a list of none or one."""
    then, now = (str(result.get("workers")).partition(" (")[0] for result in (before, after))
    if then == now or is_reproducible:
        return []
    return [f"workers ({both(then, now)}: without --reproducible, the number of workers and threads matters)"]


def _changed(folder: Path, fingerprints: Mapping[str, Any]) -> list[str]:
    """Return the files, by path within a folder, whose fingerprints differ now."""
    return [
        name
        for name, fingerprint in fingerprints.items()
        # A damaged or forged file must not make this process read elsewhere.
        if PurePath(name).is_absolute()
        or ".." in PurePath(name).parts
        or repository.fingerprint(folder / name) != fingerprint
    ]
