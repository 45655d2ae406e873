import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from mnist_ray.errors import UsageError
from mnist_ray.flags import Parser
from mnist_ray.settings import (
    at_least,
    build,
    fraction,
    names_of,
    positive,
    read_config_file,
    setting,
    values_of,
    within,
)


def _different() -> dict[str, Any]:
    return {"check": lambda values: len(set(values)) == len(values), "must": "must be different"}


@dataclass(frozen=True, kw_only=True)
class Oven:
    """One setting of each kind."""

    trays: int = setting(2, "trays in the oven", **at_least(1))
    most_trays: int | None = setting(None, "trays at the most", **at_least(1))
    heat: float = setting(180.0, "degrees", **positive())
    steam: float = setting(0.0, "part of the air that is steam", **fraction(with_one=False))
    is_on: bool = setting(False, "whether it is on")
    mode: Literal["bake", "grill"] = setting("bake", "how it heats")
    shelf: Literal[1, 2, 3] | None = setting(None, "where the tray goes")
    recipe: Path | None = setting(None, "a file", check=lambda path: path.name != "tmp", must="must be kept")
    times: tuple[int, ...] = setting((10, 20), "minutes", **_different())
    weights: tuple[float, ...] = setting((0.5,), "kilograms")
    sizes: tuple[int, ...] | None = setting(None, "grams")
    baker: str | None = setting(None, "who bakes")


@dataclass(frozen=True)
class Shop:
    """Other settings."""

    city: str = setting("Rome", "where it is")


def message_of(**values: Any) -> str:
    """Return what is said of values that an oven cannot have."""
    with pytest.raises(UsageError) as raised:
        build(Oven, values)
    return str(raised.value)


# --- declaring


@pytest.mark.parametrize(
    ("rule", "good", "bad", "must"),
    [
        (at_least(1), [1, 7, None], [0, -1], "must be at least 1"),
        (at_least(0.5), [0.5, math.inf], [0.49, math.nan], "must be at least 0.5"),
        (positive(), [1e-300, 3], [0, -1, math.inf, math.nan], "must be a positive number"),
        (fraction(), [0, 0.5, 1], [-0.01, 1.01, math.nan], "must be in [0, 1]"),
        (fraction(with_one=False), [0, 0.999, None], [-0.01, 1, math.nan], "must be in [0, 1)"),
        (within(1, 1000), [1, 1000], [0, 1001, math.nan], "must be 1 to 1,000"),
    ],
)
def test_a_rule_takes_what_it_says(rule: dict[str, Any], good: list[Any], bad: list[Any], must: str) -> None:
    assert rule["must"] == must
    assert all(rule["check"](value) for value in good)
    assert not any(rule["check"](value) for value in bad)


# --- building


def test_what_is_not_given_has_its_default_and_what_is_of_other_classes_is_left_alone() -> None:
    assert build(Oven, {"trays": 3, "batch_size": -1}) == Oven(trays=3)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("most_trays", None, None),
        ("heat", 200, 200.0),
        ("is_on", True, True),
        ("shelf", 3, 3),
        ("recipe", "/bread.txt", Path("/bread.txt")),
        ("recipe", Path("/bread.txt"), Path("/bread.txt")),
        ("times", [1, 2, 3], (1, 2, 3)),
        ("times", [], ()),
        ("weights", [1, 2.5], (1.0, 2.5)),
        ("sizes", [1, 2], (1, 2)),
        ("sizes", None, None),
        ("baker", "", ""),
    ],
)
def test_a_value_of_the_right_kind_is_taken(name: str, value: Any, expected: Any) -> None:
    taken = getattr(build(Oven, {name: value}), name)
    assert taken == expected
    assert type(taken) is type(expected)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("trays", 0, "--trays must be at least 1, not 0"),
        ("trays", "2", "--trays must be of type int, not '2'"),
        ("trays", True, "--trays must be of type int, not True"),
        ("trays", None, "--trays must be of type int, not None"),
        ("most_trays", 0, "--most-trays must be at least 1, not 0"),
        ("steam", 1, "--steam must be in [0, 1), not 1.0"),
        ("mode", "boil", "--mode must be one of bake, grill, not 'boil'"),
        ("mode", None, "--mode must be of type str, not None"),
        ("shelf", 4, "--shelf must be one of 1, 2, 3, not 4"),
        ("recipe", 5, "--recipe must be of type Path, not 5"),
        ("recipe", "/tmp", f"--recipe must be kept, not {Path('/tmp')!r}"),
        ("times", "12", "--times must be a list of int, not '12'"),
        ("times", [1, "2"], "--times must be a list of int, not [1, '2']"),
        ("times", [1, True], "--times must be a list of int, not [1, True]"),
        ("times", [1, 1], "--times must be different, not (1, 1)"),
    ],
)
def test_a_value_of_another_kind_is_refused(name: str, value: Any, expected: str) -> None:
    assert message_of(**{name: value}) == expected


def test_a_path_is_made_absolute_for_whoever_reads_it_from_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/baker")
    assert build(Oven, {"recipe": "bread.txt"}).recipe == tmp_path / "bread.txt"
    assert build(Oven, {"recipe": "~/bread.txt"}).recipe == Path("/home/baker/bread.txt")


def test_values_are_written_flat_and_read_back() -> None:
    oven, shop = Oven(recipe=Path("/bread.txt"), times=(1, 2), heat=0.1 + 0.2), Shop(city="Oslo")
    values = values_of(oven, shop)
    assert values["recipe"] == "/bread.txt"
    assert values.keys() == names_of([Oven, Shop])
    assert (build(Oven, values), build(Shop, values)) == (oven, shop)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("", "--recipe is empty; name a file or a folder"),
        ("~nosuchuser/x", "--recipe ~nosuchuser/x: there is no such user, or no home folder"),
        ("a" * 300, f"--recipe {'a' * 300}: File name too long"),
        ("a\0b", "embedded null"),
    ],
)
def test_a_path_that_there_cannot_be_is_refused(given: str, message: str) -> None:
    assert message in message_of(recipe=given)
    with pytest.raises(UsageError, match=r"^--config"):
        read_config_file(given)


def test_an_empty_path_is_refused_as_a_flag() -> None:
    with pytest.raises(UsageError, match="--recipe is empty"):
        Parser("It bakes.", Oven).read_flags(["--recipe", ""])
