"""Runs are compared by their files: what differs, which is better, and how sure that is."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from mnist_ray import compare
from mnist_ray.errors import JobError, UsageError
from mnist_ray.report.columns import write_columns
from mnist_ray.settings import json_lines
from mnist_ray.tools.compare import Verdict
from tests.conftest import folder_at

NUM_TEST = 400
LABELS = np.random.default_rng(0).integers(3, size=NUM_TEST)


def write_run(folder: Path, columns: dict[str, np.ndarray], **changes: Any) -> Path:
    """Write the files of a finished run that compare reads. ``changes``: its settings, or its ``data``."""
    data = changes.pop("data", "0")
    run = folder_at(folder)
    metrics = {"loss": float(np.mean(columns["loss"]))}
    if "label" in columns:
        metrics["accuracy"] = float(np.mean(columns["label"] == columns["prediction"]))
    result = {"checkpoint": "checkpoint_epoch-001_step-000000", "seconds": {}, "examples_per_s": 100.0}
    result |= {f"test_{name}": value for name, value in metrics.items()}
    run.write_text("result.json", json_lines({**result, "formats": {"test_accuracy": "fraction"}}))
    run.write_text("config.json", json_lines({"num_epochs": 1, "seed": 0, **changes}))
    run.write_text("origin.json", json_lines({"data": {"test": data}, "versions": {"torch": "2.9"}}))
    write_columns(
        run,
        {"index": np.arange(len(columns["loss"])), **{name: np.asarray(values) for name, values in columns.items()}},
    )
    return folder


def classes(wrong: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
    """Return the columns of a classification whose predictions of the ``wrong`` examples are wrong."""
    is_wrong = np.isin(np.arange(NUM_TEST), wrong)
    return {"label": LABELS, "prediction": (LABELS + is_wrong) % 3, "loss": np.where(is_wrong, 2.0, 0.1)}


def write_members(folder: Path, members: dict[str, dict[str, np.ndarray]]) -> Path:
    """Write a run of several members by their names."""
    folder.mkdir()
    table = ["member,run,seed,fold,state"]
    for number, (name, columns) in enumerate(members.items(), 1):
        seed, _, fold = name.removeprefix("seed-").partition("_fold-")
        write_run(folder / "members" / name, columns, seed=int(seed), **({"fold": int(fold)} if fold else {}))
        table.append(f"{number},{name},{seed},{fold},done")
    (folder / "config.json").write_text('{"num_epochs": 1}')
    (folder / "members.csv").write_text("\n".join([*table, ""]))
    result = {"checkpoint": "checkpoint_epoch-001_step-000000", "seconds": {}}
    named = [f"members/{name}" for name in members]
    (folder / "result.json").write_text(json.dumps({**result, "members": named}))
    return folder


def of_seeds(folder: Path, share: float, seeds: Sequence[int], spread: float = 0.0) -> Path:
    """Write a run of several seeds, each with other wrong answers; their share varies with the seed."""
    members = {}
    for seed in seeds:
        rng = np.random.default_rng(seed)
        members[f"seed-{seed}"] = classes(np.flatnonzero(rng.random(NUM_TEST) < share + spread * rng.normal()))
    return write_members(folder, members)


def test_one_run_a_side_is_decided_by_mcnemars_exact_test(tmp_path: Path) -> None:
    first = write_run(tmp_path / "first", classes(range(31)))
    second = write_run(tmp_path / "second", classes([*range(26, 31), *range(50, 55)]), learning_rate=0.1)
    comparison = compare(first, second)
    table = """\
   run     members  test loss  test accuracy  examples per s
A  first   1 seed   0.2472     92.25%         100
B  second  1 seed   0.1475     97.50%         100
settings   learning_rate None in A, 0.1 in B
code       unknown: A or B has no record of it
the same   data, versions
verdict    B is better than A by 5.25 points (95 %: 2.56 to 7.94); 31 examples changed: 26 won, 5 lost
method     McNemar's exact test, p = 0.00019; the spread between seeds of A and B is unknown: """
    assert str(comparison) == f"{table}train with --num-seeds 6"
    assert comparison.verdict.won == [*range(26)]
    assert comparison.to_dict()["runs"]["B"]["test_accuracy"] == [0.975]


def test_runs_without_a_test_set_are_compared_on_their_validation_sets_which_is_said(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "a", classes([1])), write_run(tmp_path / "b", classes([2, 3]))]
    for run in runs:
        result = (run / "result.json").read_text().replace("test_", "val_").replace("{", '{"evaluated": "val", ', 1)
        (run / "result.json").write_text(result)
    said = str(compare(*runs))
    assert "val loss" in said
    assert said.endswith("; the validation examples also chose each checkpoint")
    tested = write_run(tmp_path / "c", classes([2, 3]))
    assert "the sets that they were evaluated on differ" in str(compare(runs[0], tested))


def test_a_commit_that_one_run_does_not_know_is_no_difference(tmp_path: Path) -> None:
    known: list[dict[str, Any] | None] = [
        {"commit": "1"},
        {"commit": "2"},
        {"commit": "1", "changes_sha256": "3"},
        None,
    ]
    for number, repository in enumerate(known):
        folder = write_run(tmp_path / str(number), classes([1]))
        (folder / "origin.json").write_text(json.dumps({"workload_sha256": "0", "repository": repository}))
    found = [compare(tmp_path / "0", tmp_path / str(number)).differences["code"] for number in (1, 2, 3)]
    assert found == ["the commit", "uncommitted changes", "the same"]


def test_a_worse_run_is_called_worse_and_a_small_difference_is_not_shown(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / str(wrong), classes(range(wrong))) for wrong in (10, 40, 42)]
    worse, none = (compare(*pair).verdict.sentence for pair in (runs[:2], runs[1:]))
    assert worse.startswith("B is worse than A by 7.50 points (95 %: ")
    assert worse.endswith("; 30 examples changed: 0 won, 30 lost")
    assert none.startswith("no significant difference: B is behind A by 0.50 points (95 %: -")


def test_the_spread_between_seeds_decides_if_both_sides_have_several(tmp_path: Path) -> None:
    steady = [of_seeds(tmp_path / f"steady{n}", share, range(10 * n, 10 * n + 5)) for n, share in enumerate((0.2, 0.1))]
    varied = [of_seeds(tmp_path / f"varied{n}", 0.2, range(10 * n, 10 * n + 5), spread=0.1) for n in range(2)]
    sure, unsure = compare(*steady).verdict, compare(*varied).verdict
    assert (sure.is_sure, unsure.is_sure) == (True, False)
    assert sure.method == "Welch's interval over 5 and 5 seeds, and the spread over the test examples"
    assert unsure.interval is not None
    assert sure.interval is not None
    assert np.ptp(unsure.interval) > 2 * np.ptp(sure.interval)


def test_seeds_of_one_side_alone_leave_the_other_sides_spread_unknown(tmp_path: Path) -> None:
    verdict = compare(
        of_seeds(tmp_path / "several", 0.2, range(3)), write_run(tmp_path / "one", classes(range(9)))
    ).verdict
    unknown = "the spread between seeds of B is unknown: train with --num-seeds 6"
    assert verdict.method == f"Student's interval over the test examples; {unknown}"


def test_a_table_has_the_mean_and_the_spread_of_the_members(tmp_path: Path) -> None:
    several = write_members(tmp_path / "several", {f"seed-{n}": classes(range(4 * n)) for n in range(3)})
    comparison = compare(several, write_run(tmp_path / "one", classes(range(9))))
    assert "3 seeds  0.1190 ± 0.0190  99.00% ± 1.00%" in str(comparison)
    assert comparison.to_dict()["runs"]["A"]["test_accuracy"] == pytest.approx([1.0, 0.99, 0.98])
    assert comparison.differences["settings"] == "seed 0 1 2 in A, 0 in B"


def folds(share: float) -> dict[str, dict[str, np.ndarray]]:
    """Return the columns of five folds of the examples, with wrong answers."""
    places, wrong = np.arange(NUM_TEST) % 5, np.flatnonzero(np.random.default_rng(1).random(NUM_TEST) < share)
    whole = {**classes(wrong), "index": np.arange(NUM_TEST)}
    return {f"seed-0_fold-{n}": {name: values[places == n] for name, values in whole.items()} for n in range(5)}


def test_folds_are_paired_and_their_variance_is_corrected(tmp_path: Path) -> None:
    first, second = folds(0.3), folds(0.05)
    verdict = compare(write_members(tmp_path / "first", first), write_members(tmp_path / "second", second)).verdict
    right = [[100 * np.mean(fold["label"] == fold["prediction"]) for fold in side.values()] for side in (first, second)]
    gains = np.subtract(right[1], right[0])
    half = 2.77645 * np.sqrt((1 / 5 + 1 / 4) * gains.var(ddof=1))
    assert verdict.gain == pytest.approx(gains.mean())
    assert verdict.interval == pytest.approx((gains.mean() - half, gains.mean() + half), rel=1e-4)
    assert verdict.is_sure
    assert len(verdict.won) - len(verdict.lost) == pytest.approx(gains.mean() * NUM_TEST / 100)


def test_a_regression_is_compared_by_the_loss(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    first = {"target": rng.normal(size=NUM_TEST), "prediction": rng.normal(size=NUM_TEST), "loss": rng.random(NUM_TEST)}
    runs = [write_run(tmp_path / "first", first), write_run(tmp_path / "second", {**first, "loss": first["loss"] / 2})]
    sentence = compare(*runs).verdict.sentence
    assert sentence.startswith("B is better than A by 0.2")
    assert "in loss (95 %: 0.2" in sentence
    assert "changed" not in sentence


def test_losses_with_weights_are_compared_by_their_weighted_mean(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weights = rng.integers(1, 50, size=NUM_TEST).astype(float)
    losses = [weights * 2.0, weights * 2.0 + rng.normal(0.1, 0.2, NUM_TEST)]  # of an example's tokens
    columns = [{"loss": loss, "weight": weights} for loss in losses]
    verdict = compare(*(write_run(tmp_path / str(number), each) for number, each in enumerate(columns))).verdict
    assert verdict.gain == pytest.approx(-(losses[1].sum() - losses[0].sum()) / weights.sum())
    assert verdict.is_sure


@pytest.mark.parametrize(
    ("columns", "changes", "reason"),
    [
        (classes([]), {"data": "other"}, "the sets that they were evaluated on differ"),
        ({**classes([]), "index": np.arange(NUM_TEST) + 1}, {}, "the sets that they were evaluated on differ"),
        ({**classes([]), "label": LABELS[::-1]}, {}, "the sets that they were evaluated on differ"),
        ({"loss": np.zeros(NUM_TEST)}, {}, "only one of them predicts classes"),
        ({**classes([]), "weight": np.ones(NUM_TEST)}, {}, "only one of them predicts classes"),
        ({**classes([]), "loss": [[1.0]] * NUM_TEST}, {}, "B has no predictions.parquet with the loss of each example"),
    ],
)
def test_what_cannot_be_compared_is_one_line_and_the_rest_is_shown(
    tmp_path: Path, columns: dict[str, Any], changes: dict[str, Any], reason: str
) -> None:
    comparison = compare(write_run(tmp_path / "a", classes([1])), write_run(tmp_path / "b", columns, **changes))
    assert comparison.verdict == Verdict(f"A and B cannot be compared by example: {reason}")
    assert "test loss" in str(comparison)


def test_losses_that_are_not_finite_are_not_compared(tmp_path: Path) -> None:
    losses = [np.zeros(NUM_TEST), np.full(NUM_TEST, np.nan)]
    runs = [write_run(tmp_path / str(number), {"loss": loss}) for number, loss in enumerate(losses)]
    assert compare(*runs).verdict.sentence.endswith(": some losses are not finite")


def test_folds_are_not_compared_with_a_run_or_with_other_folds(tmp_path: Path) -> None:
    first, one = write_members(tmp_path / "first", folds(0.1)), write_run(tmp_path / "one", classes([]))
    renamed = {name.replace("seed-0", "seed-1"): columns for name, columns in folds(0.1).items()}
    for other in (one, write_members(tmp_path / "other", renamed)):
        assert compare(first, other).verdict.sentence.endswith(": their seeds or folds differ")
    single = [write_members(tmp_path / name, {"seed-0_fold-1": classes([1])}) for name in ("a", "b")]
    assert compare(*single).verdict.sentence.endswith(": all of their folds test the same examples")


def test_misuse_is_one_line(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", classes([]))
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "config.json").write_text('{"num_epochs": 1}')
    (tmp_path / "forged").mkdir()
    (tmp_path / "forged" / "config.json").write_text('{"num_epochs": 1}')
    forged = {"checkpoint": "checkpoint_epoch-001_step-000000", "seconds": {}, "members": ["../run"]}
    (tmp_path / "forged" / "result.json").write_text(json.dumps(forged))
    with pytest.raises(UsageError, match=r"is not a run: it has no config\.json"):
        compare(run, tmp_path / "none")
    with pytest.raises(UsageError, match=r"is not finished: it has no result\.json yet"):
        compare(run, tmp_path / "unfinished")
    with pytest.raises(JobError, match="its members are not runs of this job"):
        compare(run, tmp_path / "forged")


def test_a_setting_of_a_run_makes_no_line_of_its_own(tmp_path: Path) -> None:
    forged = {"x\nverdict    B is better": "\x1b[31m\u2028"}
    comparison = compare(write_run(tmp_path / "a", classes([1])), write_run(tmp_path / "b", classes([1]), **forged))
    assert r"settings   x\nverdict    B is better None in A, \x1b[31m\u2028 in B" in str(comparison)


@pytest.mark.parametrize("values", [[1], "a", {"a": 1}, datetime.date(2026, 1, 1), -10])
def test_columns_may_hold_anything(tmp_path: Path, values: Any) -> None:
    run = write_run(tmp_path / "b", classes([1]))
    table = parquet.read_table(run / "predictions.parquet")
    for name in ("index", "loss", "weight", "label", "prediction"):
        table = table.drop_columns(name) if name in table.column_names else table
        parquet.write_table(table.append_column(name, pa.array([values] * NUM_TEST)), run / "predictions.parquet")
        assert compare(write_run(tmp_path / "a", classes([1])), run).verdict.gain is None
