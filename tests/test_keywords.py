"""The types of the settings as keyword arguments. `python -m tests.test_keywords` writes the module again."""

import dataclasses
from pathlib import Path

from mnist_ray import keywords, train, tune
from mnist_ray.config import OutputConfig, SourceConfig, SweepConfig, TrainConfig, WorkerConfig
from mnist_ray.layers import ONLY_FLAGS
from mnist_ray.mnist import MNIST
from tests.conftest import ROOT

HEAD = '''"""The settings of ``train`` and ``tune`` as keyword arguments, for type checkers. Written by a test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict

from mnist_ray.config import Precision
from mnist_ray.report.run_files import Run

# Files or modules with classes, such as ``freeze.py:Freeze(num_epochs=2)``.
UserCode = str | Path | Sequence[str | Path] | None
'''
CLASSES = {
    "TrainKeywords(TypedDict, total=False)": (TrainConfig, WorkerConfig, OutputConfig, SourceConfig),
    "TuneKeywords(TrainKeywords, total=False)": (SweepConfig,),
}
TYPES = {
    "init_from": "Run | str | Path | None",
    "sweep": "Sequence[str] | Mapping[str, Any] | None",
    "storage_path": "str | Path",
}


def type_of(field: dataclasses.Field) -> str:
    """Return the type that a call accepts, which is wider than the field's."""
    kind = TYPES.get(field.name, str(field.type).replace("'", '"'))
    if field.metadata["setting"].code:
        return "UserCode"
    if field.name == "config":
        return "str | Path | Sequence[str | Path]"
    return f"{kind} | bool" if '"yes"' in kind else kind


def text() -> str:
    lines = HEAD.splitlines()
    for head, classes in CLASSES.items():
        lines += ["", "", f"class {head}:", '    """The settings, by name. What is not given keeps its default."""', ""]
        fields = [field for config_class in classes for field in dataclasses.fields(config_class)]
        known = [field for field in fields if field.name not in {*ONLY_FLAGS, "workload"}]
        lines += [f"    {field.name}: {type_of(field)}" for field in known]
    return "\n".join(lines) + "\n"


def test_the_keywords_are_those_of_the_settings() -> None:
    assert Path(keywords.__file__).read_text() == text(), "run: python -m tests.test_keywords"


def users_script() -> None:
    """What mypy accepts and rejects: if it accepts a line that it must reject, its `type: ignore` is an error."""
    train(num_workers=2, batch_size=64, resume=True, callback=None)
    train(MNIST, settings=MNIST.Settings(), use_gpu="auto", storage_path="runs")
    tune(num_trials=4, sweep={"batch_size": [16, 32]}, learning_rate=1e-3)
    train(num_epoch=3)  # type: ignore[call-arg]
    train(batch_size="64")  # type: ignore[arg-type]
    train(num_trials=4)  # type: ignore[call-arg]
    tune(search_algorithm="genetic")  # type: ignore[arg-type]


if __name__ == "__main__":
    Path(ROOT / "mnist_ray" / "keywords.py").write_text(text())
