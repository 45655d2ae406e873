import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from mnist_ray.config import TrainConfig, WorkerConfig
from mnist_ray.errors import UsageError
from mnist_ray.flags import Parser
from mnist_ray.mnist.problem import Settings as MNISTSettings
from mnist_ray.run.job import merged
from mnist_ray.settings import (
    Choice,
    Range,
    at_least,
    build,
    flag,
    fraction,
    item_type,
    names_of,
    positive,
    read_config_file,
    setting,
    value_type,
    values_of,
)


def _different() -> dict[str, Any]:
    return {"check": lambda values: len(set(values)) == len(values), "must": "must be different"}


@dataclass(frozen=True, kw_only=True)
class Oven:
    """One setting of each kind."""

    trays: int = setting(2, "trays in the oven", **at_least(1))
    most_trays: int | None = setting(None, "trays at the most", **at_least(1))
    heat: float = setting(180.0, "degrees", **positive())
    fan: float = setting(0.5, "part of the air that is moved", **fraction())
    steam: float = setting(0.0, "part of the air that is steam", **fraction(with_one=False))
    is_on: bool = setting(False, "whether it is on")
    mode: Literal["bake", "grill"] = setting("bake", "how it heats")
    shelf: Literal[1, 2, 3] | None = setting(None, "where the tray goes")
    recipe: Path | None = setting(None, "a file")
    times: tuple[int, ...] = setting((10, 20), "minutes", **_different())
    weights: tuple[float, ...] = setting((0.5,), "kilograms")
    baker: str | None = setting(None, "who bakes", resets=("mode",))


@dataclass(frozen=True)
class Shop:
    """Settings that depend on others'."""

    city: str = setting("Rome", "where it is", resets=("street", "number"))
    street: str | None = setting(None, "its street", resets=("number",))
    number: int = setting(1, "its house")


def message_of(**values: Any) -> str:
    """Return what is said of values that an oven cannot have."""
    with pytest.raises(UsageError) as raised:
        build(Oven, values)
    return str(raised.value)


# --- declaring


def test_a_setting_is_a_field_with_all_that_was_said_of_it() -> None:
    space = Range(1, 5)
    field: Any = setting(3, "units", search=space, resets=("other",), **at_least(2))
    assert field.default == 3
    assert field.metadata["help"] == "units"
    assert field.metadata["must"] == "must be at least 2"
    assert field.metadata["search"] is space
    assert field.metadata["resets"] == ("other",)
    assert [field.metadata["check"](value) for value in (1, 2, 3)] == [False, True, True]


@pytest.mark.parametrize(
    ("rule", "good", "bad", "must"),
    [
        (at_least(1), [1, 7, None], [0, -1], "must be at least 1"),
        (at_least(0.5), [0.5, math.inf], [0.49, math.nan], "must be at least 0.5"),
        (positive(), [1e-300, 3], [0, -1, math.inf, math.nan], "must be a positive number"),
        (fraction(), [0, 0.5, 1], [-0.01, 1.01, math.nan], "must be in [0, 1]"),
        (fraction(with_one=False), [0, 0.999], [-0.01, 1, math.nan], "must be in [0, 1)"),
    ],
)
def test_a_rule_takes_what_it_says(rule: dict[str, Any], good: list[Any], bad: list[Any], must: str) -> None:
    assert rule["must"] == must
    assert all(rule["check"](value) for value in good)
    assert not any(rule["check"](value) for value in bad)


def test_a_settings_flag_has_dashes() -> None:
    assert flag("most_trays_of_all") == "--most-trays-of-all"


@pytest.mark.parametrize(
    ("annotation", "expected"),
    [
        (int, (int, None)),
        (int | None, (int, None)),
        (None | float, (float, None)),
        (Literal["a", "b"], (str, ("a", "b"))),
        (Literal[1, 2] | None, (int, (1, 2))),
        (tuple[int, ...], (tuple, None)),
        (Path | None, (Path, None)),
    ],
)
def test_a_settings_type_is_plain(annotation: Any, expected: tuple[type, tuple[Any, ...] | None]) -> None:
    assert value_type(annotation) == expected


def test_a_tuples_items_have_a_type() -> None:
    assert item_type(tuple[float, ...]) is float


# --- building


def test_what_is_not_given_has_its_default() -> None:
    assert build(Oven, {}) == Oven()


def test_values_of_other_classes_are_left_alone() -> None:
    assert build(Oven, {"trays": 3, "batch_size": -1}) == Oven(trays=3)


def test_every_default_passes_its_own_check() -> None:
    assert build(Oven, dataclasses.asdict(Oven())) == Oven()


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("trays", 1, 1),
        ("most_trays", None, None),
        ("most_trays", 3, 3),
        ("heat", 200, 200.0),
        ("fan", 1, 1.0),
        ("is_on", True, True),
        ("mode", "grill", "grill"),
        ("shelf", 3, 3),
        ("shelf", None, None),
        ("recipe", None, None),
        ("recipe", "/bread.txt", Path("/bread.txt")),
        ("recipe", Path("/bread.txt"), Path("/bread.txt")),
        ("times", (1, 2, 3), (1, 2, 3)),
        ("times", [1, 2, 3], (1, 2, 3)),
        ("times", [], ()),
        ("weights", [0.5, 1.5], (0.5, 1.5)),
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
        ("trays", 2.0, "--trays must be of type int, not 2.0"),
        ("trays", True, "--trays must be of type int, not True"),
        ("trays", None, "--trays must be of type int, not None"),
        ("most_trays", 0, "--most-trays must be at least 1, not 0"),
        ("heat", 0, "--heat must be a positive number, not 0.0"),
        ("heat", math.inf, "--heat must be a positive number, not inf"),
        ("heat", True, "--heat must be of type float, not True"),
        ("fan", 1.5, "--fan must be in [0, 1], not 1.5"),
        ("steam", 1, "--steam must be in [0, 1), not 1.0"),
        ("is_on", 1, "--is-on must be of type bool, not 1"),
        ("mode", "boil", "--mode must be one of bake, grill, not 'boil'"),
        ("mode", None, "--mode must be of type str, not None"),
        ("shelf", 4, "--shelf must be one of 1, 2, 3, not 4"),
        ("shelf", "1", "--shelf must be of type int, not '1'"),
        ("recipe", 5, "--recipe must be of type Path, not 5"),
        ("times", 5, "--times must be a list of int, not 5"),
        ("times", "12", "--times must be a list of int, not '12'"),
        ("times", [1, "2"], "--times must be a list of int, not (1, '2')"),
        ("times", [1, True], "--times must be a list of int, not (1, True)"),
        ("times", [1, 1], "--times must be different, not (1, 1)"),
        ("baker", 1, "--baker must be of type str, not 1"),
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


@dataclass(frozen=True)
class Odd:
    """Settings of kinds that no job has yet, and a workload may have."""

    sizes: tuple[int, ...] | None = setting(None, "grams")
    folder: Path = setting(Path("/"), "a folder", check=lambda path: path.name != "tmp", must="must be kept")
    shares: tuple[float, ...] = setting((0.5,), "parts", search=Choice(((0.5,), (1.0,))))


def test_a_tuple_that_may_be_none_is_taken() -> None:
    assert build(Odd, {"sizes": [1, 2]}).sizes == (1, 2)


def test_a_path_is_checked() -> None:
    with pytest.raises(UsageError) as raised:
        build(Odd, {"folder": "/tmp"})
    assert str(raised.value) == f"--folder must be kept, not {Path('/tmp')!r}"


def test_whole_numbers_are_taken_for_floats_in_a_tuple() -> None:
    assert build(Odd, {"shares": [1, 2.5]}).shares == (1.0, 2.5)


# --- layers


def test_a_later_layer_takes_the_place_of_an_earlier_one() -> None:
    assert merged((Shop,), {"city": "Rome", "number": 3}, {"number": 4}, {}) == {"city": "Rome", "number": 4}


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ([{"street": "Corso", "number": 3}, {"city": "Oslo"}], {"city": "Oslo"}),
        ([{"city": "Oslo", "number": 3}, {"street": "Corso"}], {"city": "Oslo", "street": "Corso"}),
        ([{"street": "Corso"}, {"city": "Oslo", "street": "Karl Johan"}], {"city": "Oslo", "street": "Karl Johan"}),
        ([{"city": "Oslo", "street": "Corso", "number": 3}], {"city": "Oslo", "street": "Corso", "number": 3}),
        ([{"city": "Oslo"}, {"street": "Corso"}, {"number": 3}], {"city": "Oslo", "street": "Corso", "number": 3}),
        ([{"street": "Corso"}, {}, {"city": "Oslo"}], {"city": "Oslo"}),
    ],
)
def test_a_setting_resets_what_earlier_layers_say_of_others(
    layers: list[dict[str, Any]], expected: dict[str, Any]
) -> None:
    assert merged((Shop,), *layers) == expected


def test_the_layers_are_left_as_they_are() -> None:
    file = {"street": "Corso", "number": 3}
    merged((Shop,), file, {"city": "Oslo"})
    assert file == {"street": "Corso", "number": 3}


def test_a_setting_resets_one_of_another_class() -> None:
    assert merged((Oven,), {"mode": "grill"}, {"baker": "Ada"}) == {"baker": "Ada"}
    assert merged((Shop,), {"mode": "grill"}, {"baker": "Ada"}) == {"mode": "grill", "baker": "Ada"}


def test_another_dataset_leaves_the_folder_of_a_config_file() -> None:
    file = {"data_dir": "/images", "batch_size": 8}
    classes = (TrainConfig, MNISTSettings, WorkerConfig)
    assert merged(classes, file, {"dataset": "kmnist"}) == {"batch_size": 8, "dataset": "kmnist"}


def test_another_number_of_workers_leaves_the_fewest_of_a_config_file() -> None:
    file = {"num_workers": 4, "min_workers": 2}
    assert merged((WorkerConfig,), file, {"num_workers": 3}) == {"num_workers": 3}
    assert merged((WorkerConfig,), file, {"num_workers": 3, "min_workers": 1}) == {"num_workers": 3, "min_workers": 1}


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
