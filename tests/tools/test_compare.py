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
from mnist_ray.tools.verdict import Gain
from tests.conftest import folder_at

NUM_TEST = 400
LABELS = np.random.default_rng(0).integers(3, size=NUM_TEST)
WORKLOAD = """
import numpy as np
from torch import nn
from mnist_ray.workload import Arrays, Classification, Data

class Shades(Classification):
    noun = "shade"
    recipes = {"default": {"num_epochs": 2, "validation_size": 30}}
    def load_data(self):
        rng = np.random.default_rng(0)
        targets = rng.integers(2, size=200)
        inputs = (targets[:, None, None] * 60 + rng.integers(150, size=(200, 4, 4))).astype(np.uint8)
        return Data(Arrays(inputs[:120], targets[:120]), Arrays(inputs[120:], targets[120:]), name="shades")
    def create_model(self): return nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    def prepare(self, inputs, generator): return inputs.float() / 100 - 1
    def as_picture(self, inputs): return inputs
"""


def write_run(folder: Path, columns: dict[str, np.ndarray], **changes: Any) -> Path:
    """Write the files of a finished run that compare reads. ``changes``: its settings, or its ``data``."""
    data = changes.pop("data", "0")
    run = folder_at(folder)
    metrics = {name: float(np.mean(values)) for name, values in columns.items() if name == "loss"}
    if "label" in columns:
        metrics["accuracy"] = float(np.mean(columns["label"] == columns["prediction"]))
    result = {"checkpoint": "checkpoint_epoch-001_step-000000", "seconds": {"total": 2.0}, "examples_per_s": 100.0}
    result |= {f"test_{name}": value for name, value in metrics.items()}
    run.write_text("result.json", json_lines({**result, "formats": {"test_accuracy": "fraction"}}))
    run.write_text("config.json", json_lines({"num_epochs": 1, "seed": 0, **changes}))
    run.write_text("origin.json", json_lines({"data": {"test": data}, "versions": {"torch": "2.9"}}))
    run.write_text("metrics.csv", f"epoch,val_loss,val_accuracy\n1,{metrics['loss']},{metrics.get('accuracy', '')}\n")
    write_columns(run, {"index": np.arange(len(columns["loss"])), **columns})
    return folder


def classes(wrong: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
    """Return the columns of a classification whose predictions of the ``wrong`` examples are wrong."""
    is_wrong = np.isin(np.arange(NUM_TEST), wrong)
    return {"label": LABELS, "prediction": (LABELS + is_wrong) % 3, "loss": np.where(is_wrong, 2.0, 0.1)}


def write_members(folder: Path, members: dict[str, dict[str, np.ndarray]]) -> Path:
    """Write a run of several members by their names."""
    folder.mkdir()
    for name, columns in members.items():
        seed, _, fold = name.removeprefix("seed-").partition("_fold-")
        write_run(folder / "members" / name, columns, seed=int(seed), **({"fold": int(fold)} if fold else {}))
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


def gain_of(first: Path, second: Path) -> Gain:
    (verdict,) = compare(first, second).verdicts
    assert verdict.gain is not None, verdict.sentence
    return verdict.gain


def test_one_run_a_side_is_decided_by_mcnemars_exact_test(tmp_path: Path) -> None:
    first = write_run(tmp_path / "first", classes(range(31)))
    second = write_run(tmp_path / "second", classes([*range(26, 31), *range(50, 55)]), learning_rate=0.1)
    comparison = compare(first, second)
    (verdict,), (lines,) = comparison.verdicts, comparison.lines
    said = "B is better than A by 5.25 points (95 %: 2.47 to 7.98); 31 examples changed: 26 won, 5 lost"
    assert verdict.sentence == said
    assert sorted(verdict.won) == [*range(26)]
    unknown = "the spread between seeds of A and B is unknown: train with --num-seeds 6"
    assert lines[0] == ("differs", "settings: learning_rate none in A, 0.1 in B")
    assert lines[-2:] == [("verdict", said), ("method", f"McNemar's exact test, p = 0.00019; {unknown}")]
    assert "B  second  1 seed   0.1475     97.50%         100             2.0" in str(comparison)


def test_a_commit_that_one_side_does_not_know_is_no_difference(tmp_path: Path) -> None:
    commits: list[str | None] = ["1", "2", None]
    for number, commit in enumerate(commits):
        folder = write_run(tmp_path / str(number), classes([1]))
        code = {"package_sha256": "0", "repository": commit and {"commit": commit, "changes_sha256": None}}
        (folder / "origin.json").write_text(json.dumps({"code": code}))
    first, second, submitted = (tmp_path / str(number) for number in range(3))
    assert ("differs", "code: the commit") in compare(first, second).lines[0]
    assert not [line for line in compare(first, submitted).lines[0] if line[0] == "differs"]


def test_the_seconds_of_a_resumed_run_are_unknown(tmp_path: Path) -> None:
    first, second = (write_run(tmp_path / name, classes([1])) for name in ("a", "b"))
    result = json.loads((second / "result.json").read_text())
    (second / "result.json").write_text(json.dumps({**result, "is_resumed": True}))
    table = str(compare(first, second)).splitlines()
    assert [line.split()[-1] for line in table if line.startswith(("A  ", "B  "))] == ["2.0", "-"]


def test_a_worse_run_is_called_worse_and_a_small_difference_is_not_shown(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / str(wrong), classes(range(wrong))) for wrong in (10, 40, 42)]
    worse, none = (compare(*pair).verdicts[0].sentence for pair in (runs[:2], runs[1:]))
    assert worse.startswith("B is worse than A by 7.50 points (95 %: ")
    assert worse.endswith("; 30 examples changed: 0 won, 30 lost")
    assert none.startswith("no significant difference: B is behind A by 0.50 points (95 %: -")


def test_the_spread_between_seeds_decides_if_both_sides_have_several(tmp_path: Path) -> None:
    steady = [of_seeds(tmp_path / f"steady{n}", share, range(10 * n, 10 * n + 5)) for n, share in enumerate((0.2, 0.1))]
    varied = [of_seeds(tmp_path / f"varied{n}", 0.2, range(10 * n, 10 * n + 5), spread=0.1) for n in range(2)]
    sure, unsure = gain_of(*steady), gain_of(*varied)
    assert (sure.is_sure, unsure.is_sure) == (True, False)
    assert sure.how == "Welch's interval over 5 and 5 seeds, and the spread over the test examples"
    assert unsure.high - unsure.low > 2 * (sure.high - sure.low)


def test_seeds_of_one_side_alone_leave_the_other_sides_spread_unknown(tmp_path: Path) -> None:
    gain = gain_of(of_seeds(tmp_path / "several", 0.2, range(3)), write_run(tmp_path / "one", classes(range(9))))
    assert gain.p is None
    assert gain.how.endswith("the spread between seeds of B is unknown: train with --num-seeds 6")


def test_a_table_has_the_mean_and_the_spread_of_the_members(tmp_path: Path) -> None:
    several = write_members(tmp_path / "several", {f"seed-{n}": classes(range(4 * n)) for n in range(3)})
    comparison = compare(several, write_run(tmp_path / "one", classes(range(9))))
    assert "3 seeds  0.1190 ± 0.0190  99.00% ± 1.00%" in str(comparison)
    assert comparison.to_dict()["runs"]["A"]["test_accuracy"] == pytest.approx([1.0, 0.99, 0.98])
    assert comparison.lines[0][0] == ("differs", "settings: seed 0 1 2 in A, 0 in B")


def folds(share: float) -> dict[str, dict[str, np.ndarray]]:
    """Return the columns of five folds of the examples, with wrong answers."""
    places, wrong = np.arange(NUM_TEST) % 5, np.flatnonzero(np.random.default_rng(1).random(NUM_TEST) < share)
    whole = {**classes(wrong), "index": np.arange(NUM_TEST)}
    return {f"seed-0_fold-{n}": {name: values[places == n] for name, values in whole.items()} for n in range(5)}


def test_folds_are_paired_and_their_variance_is_corrected(tmp_path: Path) -> None:
    first, second = folds(0.3), folds(0.05)
    runs = write_members(tmp_path / "first", first), write_members(tmp_path / "second", second)
    (verdict,), gain = compare(*runs).verdicts, gain_of(*runs)
    right = [[100 * np.mean(fold["label"] == fold["prediction"]) for fold in side.values()] for side in (first, second)]
    gains = np.subtract(right[1], right[0])
    half = 2.77645 * np.sqrt((1 / 5 + 1 / 4) * gains.var(ddof=1))
    assert (gain.value, gain.high - gain.low) == pytest.approx((gains.mean(), 2 * half), rel=1e-4)
    assert gain.is_sure
    assert len(verdict.won) - len(verdict.lost) == pytest.approx(gains.mean() * NUM_TEST / 100)


def test_a_regression_is_compared_by_the_loss_and_always_with_the_same_interval(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    first = {"target": rng.normal(size=NUM_TEST), "prediction": rng.normal(size=NUM_TEST), "loss": rng.random(NUM_TEST)}
    runs = [write_run(tmp_path / "first", first), write_run(tmp_path / "second", {**first, "loss": first["loss"] / 2})]
    sentences = [compare(*runs).verdicts[0].sentence for _ in range(2)]
    assert sentences[0] == sentences[1]
    assert sentences[0].startswith("B is better than A by 0.2")
    assert "in loss (95 %: 0.2" in sentences[0]
    assert "changed" not in sentences[0]


def test_losses_with_weights_are_compared_by_their_weighted_mean(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weights = rng.integers(1, 50, size=NUM_TEST).astype(float)
    losses = [weights * 2.0, weights * 2.0 + rng.normal(0.1, 0.2, NUM_TEST)]  # of an example's tokens
    columns = [{"loss": loss, "weight": weights} for loss in losses]
    gain = gain_of(*(write_run(tmp_path / str(number), each) for number, each in enumerate(columns)))
    assert gain.value == pytest.approx(-(losses[1].sum() - losses[0].sum()) / weights.sum())
    assert gain.high < 0


@pytest.mark.parametrize(
    ("columns", "changes", "reason"),
    [
        (classes([]), {"data": "other"}, "their test sets differ"),
        ({**classes([]), "index": np.arange(NUM_TEST) + 1}, {}, "their test sets differ"),
        ({**classes([]), "label": LABELS[::-1]}, {}, "their test sets differ"),
        ({"loss": np.zeros(NUM_TEST)}, {}, "their metrics differ: accuracy"),
        ({**classes([]), "weight": np.ones(NUM_TEST)}, {}, "only one of them predicts classes"),
        ({**classes([]), "loss": np.full(NUM_TEST, np.nan)}, {}, "some losses are not finite"),
    ],
)
def test_what_cannot_be_compared_is_one_line_and_the_rest_is_shown(
    tmp_path: Path, columns: dict[str, np.ndarray], changes: dict[str, Any], reason: str
) -> None:
    comparison = compare(write_run(tmp_path / "a", classes([1])), write_run(tmp_path / "b", columns, **changes))
    assert comparison.lines[0][-1] == ("verdict", f"A and B cannot be compared by example: {reason}")
    assert "test loss" in str(comparison)


def test_folds_are_not_compared_with_a_run_or_with_other_folds(tmp_path: Path) -> None:
    first, one = write_members(tmp_path / "first", folds(0.1)), write_run(tmp_path / "one", classes([]))
    renamed = {name.replace("seed-0", "seed-1"): columns for name, columns in folds(0.1).items()}
    other = write_members(tmp_path / "other", renamed)
    assert [verdict.sentence.partition(": ")[2] for verdict in compare(first, one, other).verdicts] == [
        "only A is a cross-validation",
        "their seeds or folds differ",
    ]


def test_a_run_without_whole_predictions_has_no_verdict(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, classes([])) for name in ("first", "second")]
    (runs[1] / "predictions.parquet").unlink()
    verdict = compare(*runs).verdicts[0]
    assert verdict.gain is None
    assert verdict.sentence.endswith("by example: B has no predictions.parquet with the loss of each example")


def test_misuse_is_one_line(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", classes([]))
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "config.json").write_text('{"num_epochs": 1}')
    (tmp_path / "forged").mkdir()
    forged = {"checkpoint": "checkpoint_epoch-001_step-000000", "seconds": {}, "members": ["../run"]}
    (tmp_path / "forged" / "result.json").write_text(json.dumps(forged))
    for runs, said in {
        (run,): "compare takes 2 to 26 runs, not 1",
        (run, str(run)): "run is given twice; name each run once",
        (run, tmp_path / "none"): "is not a run, or is an unfinished sweep: it has no config.json",
        (run, tmp_path / "unfinished"): "is not finished: it has no result.json yet",
    }.items():
        with pytest.raises(UsageError, match=said):
            compare(*runs)
    with pytest.raises(JobError, match=r"members is \["):
        compare(run, tmp_path / "forged")


def test_a_page_has_rows_if_the_workload_cannot_be_loaded(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / str(wrong), classes(range(wrong)), workload="gone.py") for wrong in (10, 40)]
    compare(*runs, output=tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "examples are rows, not images: " in page
    assert "Worse in B than in A: 30" in page
    assert f"<td>10</td><td>{LABELS[10]}</td><td>{LABELS[10]}</td><td>{(LABELS[10] + 1) % 3}</td>" in page


def test_a_setting_of_a_run_makes_no_line_of_its_own(tmp_path: Path) -> None:
    forged = {"x\nverdict    B is better": "\x1b[31m\u2028"}
    comparison = compare(write_run(tmp_path / "a", classes([1])), write_run(tmp_path / "b", classes([1]), **forged))
    assert r"settings: x\nverdict    B is better none in A, \x1b[31m\u2028 in B" in str(comparison)
    assert str(comparison).isprintable() or {*str(comparison)} - {"\n"} <= {*filter(str.isprintable, str(comparison))}


def damaged_columns(folder: Path, **columns: Any) -> Path:
    """Write a run whose predictions.parquet has these columns instead of its own."""
    run = write_run(folder, classes([1]))
    table = parquet.read_table(run / "predictions.parquet")
    for name, values in columns.items():
        table = table.drop_columns(name) if name in table.column_names else table
        table = table.append_column(name, pa.array(values))
    parquet.write_table(table, run / "predictions.parquet")
    return run


STRANGE = {"lists": [[1]], "texts": ["a"], "structs": [{"a": 1}], "dates": [datetime.date(2026, 1, 1)]}


@pytest.mark.parametrize("column", ["index", "loss", "weight"])
@pytest.mark.parametrize("values", STRANGE.values(), ids=STRANGE)
def test_a_column_without_numbers_is_damage_where_numbers_are_needed(
    tmp_path: Path, column: str, values: list[Any]
) -> None:
    run = damaged_columns(tmp_path / "b", **{column: values * NUM_TEST})
    with pytest.raises(JobError, match=f"predictions.parquet is damaged: its column {column} does not have a number"):
        compare(write_run(tmp_path / "a", classes([1])), run)


@pytest.mark.parametrize("column", ["label", "prediction", "target"])
@pytest.mark.parametrize("values", [*STRANGE.values(), [-10]], ids=[*STRANGE, "a negative"])
def test_other_columns_may_hold_anything(tmp_path: Path, column: str, values: list[Any]) -> None:
    runs = [damaged_columns(tmp_path / name, **{column: values * NUM_TEST}) for name in ("a", "b")]
    runs.append(write_run(tmp_path / "c", classes([2])))
    assert "A  a" in str(compare(*runs, output=tmp_path / "page.html"))


def test_predictions_that_would_not_fit_into_memory_are_not_read(tmp_path: Path) -> None:
    run, values = write_run(tmp_path / "b", classes([1])), pa.array(np.zeros(10**6, np.int8))
    table = pa.table({"loss": pa.chunked_array([values] * 300)})
    parquet.write_table(table, run / "predictions.parquet", compression="zstd")
    with pytest.raises(JobError, match=r"predictions\.parquet is damaged: it has 300,000,000 values"):
        compare(write_run(tmp_path / "a", classes([1])), run)


def test_a_single_fold_is_not_compared(tmp_path: Path) -> None:
    runs = [write_members(tmp_path / name, {"seed-0_fold-1": classes([1])}) for name in ("a", "b")]
    assert compare(*runs).verdicts[0].sentence.endswith("all of their folds test the same examples")
