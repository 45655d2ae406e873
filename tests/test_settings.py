"""Settings: their rules, types and text, and the flags made from them."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from mnist_ray.config import OutputConfig, TrainConfig, WorkerConfig
from mnist_ray.errors import UsageError
from mnist_ray.flags import Parser, peek
from mnist_ray.references import references_of, split_call
from mnist_ray.settings import (
    at_least,
    build,
    declared,
    fraction,
    positive,
    setting,
    values_of,
    within,
)

CLASSES = (TrainConfig, WorkerConfig, OutputConfig)


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
    times: tuple[int, ...] = setting(
        (10, 20), "minutes", check=lambda times: len(set(times)) == len(times), must="must be different"
    )
    sizes: tuple[int, ...] | None = setting(None, "grams")
    baker: str | None = setting(None, "who bakes")
    timer: str = setting("off", "when it rings", bare="on")


@dataclass(frozen=True)
class Shop:
    """Other settings."""

    city: str = setting("Rome", "where it is")


@dataclass(frozen=True)
class Kitchen:
    """Settings whose values have no flag, and one that is repeated."""

    cook: str = setting("", "who cooks", word="COOK")
    dishes: tuple[str, ...] = setting((), "what is cooked", word="DISH")
    set: tuple[str, ...] = setting((), "other settings", is_repeated=True)


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
def test_rules_accept_and_refuse(rule: dict[str, Any], good: list[Any], bad: list[Any], must: str) -> None:
    assert rule["must"] == must
    assert all(rule["check"](value) for value in good)
    assert not any(rule["check"](value) for value in bad)


def test_missing_values_get_defaults_and_other_classes_values_are_ignored() -> None:
    assert build(Oven, {"trays": 3, "batch_size": -1}) == Oven(trays=3)


def test_every_default_passes_its_own_check() -> None:
    for config_class in CLASSES:
        assert build(config_class, dataclasses.asdict(config_class())) == config_class()


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("most_trays", None, None),
        ("heat", 200, 200.0),
        ("is_on", True, True),
        ("shelf", 3, 3),
        ("recipe", "/bread.txt", Path("/bread.txt")),
        ("times", [1, 2, 3], (1, 2, 3)),
        ("sizes", [1, 2], (1, 2)),
        ("sizes", None, None),
        ("baker", "", ""),
        ("baker", Path("/baker"), "/baker"),
        ("trays", np.int64(4), 4),
        ("heat", np.int32(200), 200.0),
        ("is_on", np.bool_(True), True),
    ],
)
def test_values_are_converted_to_the_settings_type(name: str, value: Any, expected: Any) -> None:
    built = getattr(build(Oven, {name: value}), name)
    assert built == expected
    assert type(built) is type(expected)


@pytest.mark.parametrize(
    ("config_class", "name", "value", "message"),
    [
        (Oven, "trays", 0, "--trays must be at least 1, not 0"),
        (Oven, "trays", "2", "--trays must be of type int, not '2'"),
        (Oven, "trays", True, "--trays must be of type int, not True"),
        (Oven, "trays", np.array([2, 3]), "--trays must be of type int, not array([2, 3])"),
        (Oven, "trays", 10**400, f"--trays must be of type int, not 1{'0' * 39}"),
        (TrainConfig, "momentum", 10**400, f"--set momentum must be of type float, not 1{'0' * 39}"),
        (Oven, "heat", math.nan, "--heat must be of type float, not nan"),
        (Oven, "steam", 1, "--steam must be in [0, 1), not 1.0"),
        (Oven, "mode", "boil", "--mode must be one of bake, grill, not 'boil'"),
        (Oven, "mode", None, "--mode must be of type str, not None"),
        (Oven, "shelf", 4, "--shelf must be one of 1, 2, 3, not 4"),
        (Oven, "recipe", 5, "--recipe must be of type Path, not 5"),
        (Oven, "recipe", "/tmp", f"--recipe must be kept, not {Path('/tmp')!r}"),
        (Oven, "times", "12", "--times must be a list of int, not '12'"),
        (Oven, "times", [1, "2"], "--times must be a list of int, not [1, '2']"),
        (Oven, "times", [1, 1], "--times must be different, not (1, 1)"),
        (TrainConfig, "limit", 0.0, "--limit must be in (0, 1], not 0.0"),
        (TrainConfig, "num_chunks", 10**9, "--set num_chunks must be 1 to 1,024, not 1000000000"),
        (OutputConfig, "run_name", "", "--run-name must be at most 200 letters, digits, '.', '_' or '-', not ''"),
    ],
)
def test_wrong_values_are_refused_by_name(config_class: type, name: str, value: Any, message: str) -> None:
    with pytest.raises(UsageError) as raised:
        build(config_class, {name: value})
    assert str(raised.value) == message


def test_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/baker")
    assert build(Oven, {"recipe": "bread.txt"}).recipe == tmp_path / "bread.txt"
    assert build(Oven, {"recipe": "~/bread.txt"}).recipe == Path("/home/baker/bread.txt")


def test_values_are_written_flat_and_read_back() -> None:
    oven, shop = Oven(recipe=Path("/bread.txt"), times=(1, 2), heat=0.1 + 0.2), Shop(city="Oslo")
    values = values_of(oven, shop)
    assert values["recipe"] == "/bread.txt"
    assert values.keys() == declared(Oven, Shop).keys()
    assert (build(Oven, values), build(Shop, values)) == (oven, shop)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("", " is empty; name a file or a folder"),
        ("~nosuchuser/x", " ~nosuchuser/x: Could not determine home directory"),
        ("a" * 300, f" {'a' * 300}: File name too long"),
        ("a\0b", "embedded null"),
    ],
)
def test_impossible_paths_are_refused(given: str, reason: str) -> None:
    with pytest.raises(UsageError) as raised:
        build(Oven, {"recipe": given})
    assert str(raised.value).startswith("--recipe")
    assert reason in str(raised.value)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--epochs", "3"], "unrecognized arguments: --epochs 3; did you mean --num-epochs?"),
        (["--learning_rate", "0.1"], "unrecognized arguments: --learning_rate 0.1; did you mean --learning-rate?"),
        (["--quiet", "--workers=2"], "unrecognized arguments: --workers=2; did you mean --num-workers?"),
        (["--frobnicate"], "unrecognized arguments: --frobnicate"),
        (["--lr", "3"], "unrecognized arguments: --lr 3; see --help"),
        (["--train-size"], "unrecognized arguments: --train-size; see --help"),
        (["--batchsize", "3"], "unrecognized arguments: --batchsize 3; did you mean --batch-size?"),
        (["--gpu"], "unrecognized arguments: --gpu; did you mean --use-gpu?"),
        (["--set", "momentun=1"], "unrecognized arguments: --set momentun=1; did you mean --set momentum?"),
        (["--precison=fp32"], "unrecognized arguments: --precison=fp32; did you mean --precision?"),
        (
            ["--storage-pth=http://user:pw@host", "\x1b\n"],
            r"unrecognized arguments: --storage-pth=http://***@host \x1b\n; did you",
        ),
    ],
)
def test_unknown_flags_are_one_line_with_a_suggestion_and_without_secrets(
    wrong: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        Parser("It does something.", *CLASSES).read_flags(wrong)
    printed = capsys.readouterr().err
    assert f": error: {said}" in printed
    assert printed.endswith("; see --help\n")
    assert printed.count("\n") == 1


def test_a_flag_can_undo_what_a_recipe_or_a_file_has_set() -> None:
    given = Parser("", TrainConfig).read_flags(
        ["--no-compile", "--ema-decay", "none", "--early-stopping-patience", "none"]
    )
    assert given == {"compile": False, "ema_decay": None, "early_stopping_patience": None}


@pytest.mark.parametrize(
    ("line", "timer"), [("", None), ("--timer", "on"), ("--timer --trays 3", "on"), ("--timer 12:00", "12:00")]
)
def test_a_flag_without_a_word_has_the_value_that_its_setting_declares(
    line: str, timer: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Parser("", Oven).read_flags(line.split()).get("timer") == timer
    monkeypatch.setattr("sys.argv", ["bake.py", *line.split(), "--unknown", "5"])
    assert peek(Oven).get("timer") == timer


def test_a_misspelled_property_of_a_setting_is_an_error_where_it_is_declared() -> None:
    with pytest.raises(TypeError, match="decide_data"):
        setting(32, "units of the hidden layer", decide_data=True)


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("momentum=0.5", "momentum", 0.5),
        ("hang_timeout_s=60", "hang_timeout_s", 60.0),
        ("fold=none", "fold", None),
        ("compile=true", "compile", True),
        ("fork_workers=no", "fork_workers", "no"),
        ("weight_decay=0.5", "weight_decay", 0.5),
    ],
)
def test_any_setting_is_set_by_its_name(text: str, name: str, value: Any) -> None:
    given = Parser("", TrainConfig, WorkerConfig).read_flags(["--set", text, "--batch-size", "8"])
    assert given == {name: value, "batch_size": 8}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "momentum"], "--set momentum must be NAME=VALUE"),
        (["--set", "momentum=high"], "--set momentum must be of type float, not 'high'"),
        (["--set", "momentum=" + "[" * 10**5], f"--set momentum must be of type float, not '{'[' * 39}"),
    ],
)
def test_a_wrong_word_after_set_is_one_line(words: list[str], message: str) -> None:
    with pytest.raises(UsageError) as raised:
        Parser("", TrainConfig).read_flags(words)
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("words", "name"),
    [(["--momentum", "0.5"], "momentum"), (["--no-momentum"], "momentum")],
)
def test_a_setting_that_is_no_flag_says_how_it_is_set(
    words: list[str], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        Parser("", TrainConfig).read_flags(words)
    assert f"{words[0]} is no flag; use --set {name}=VALUE, or a settings file; see --help" in capsys.readouterr().err


def test_the_usage_names_only_what_is_no_flag(capsys: pytest.CaptureFixture[str]) -> None:
    parser = Parser("", Kitchen)
    with pytest.raises(SystemExit):
        parser.read_flags(["--help"])
    assert capsys.readouterr().out.splitlines()[0].endswith(" COOK [DISH] [FLAGS]")


@pytest.mark.parametrize(
    ("line", "given"),
    [
        ("Anna", {"cook": "Anna"}),
        ("soup --set a=1 Anna", {"cook": "soup", "dishes": ("Anna",), "set": ("a=1",)}),
        ("Anna soup --set a=1 --set b= pie", {"cook": "Anna", "dishes": ("soup", "pie"), "set": ("a=1", "b=")}),
    ],
)
def test_words_stand_between_flags(line: str, given: dict[str, Any]) -> None:
    assert Parser("", Kitchen).read_flags(line.split()) == given


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, ()),
        ("freeze.py", ("freeze.py",)),
        (Path("freeze.py"), ("freeze.py",)),
        (["freeze.py:Freeze(num_epochs=2)", "watch.py"], ("freeze.py:Freeze(num_epochs=2)", "watch.py")),
        ({"freeze.py:Freeze": {"num_epochs": 2}, "watch.py": {}}, ("freeze.py:Freeze(num_epochs=2)", "watch.py")),
        (
            {"package.module": {"names": ["it's"], "by": {"a": None}}},
            ("package.module(names=[\"it's\"], by={'a': None})",),
        ),
        ("/my(copy)/a.py:Of(text='x(y)')", ("/my(copy)/a.py:Of(text='x(y)')",)),
    ],
)
def test_references_keep_their_arguments_in_every_form(value: Any, expected: tuple[str, ...]) -> None:
    assert references_of(value) == expected
    if isinstance(value, dict):
        assert dict(map(split_call, expected)) == value


def test_a_parenthesis_in_a_path_begins_no_arguments() -> None:
    assert split_call("/my(copy)/a.py:Of(text='x(y)')") == ("/my(copy)/a.py:Of", {"text": "x(y)"})
    assert split_call("/my (copy)/a.py") == ("/my (copy)/a.py", {})


NO_ARGUMENTS, NO_REFERENCE = "arguments must be NAME=VALUE, and values numbers, strings", "must be FILE.py:NAME, a list"


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("a.py:F(1)", NO_ARGUMENTS),
        ("a.py:F(x=y)", NO_ARGUMENTS),
        ("a.py:F(**{})", NO_ARGUMENTS),
        ("a.py:F(1) + f(2)", NO_ARGUMENTS),
        ({"a.py": {"x": float("inf")}}, NO_ARGUMENTS),
        ({"a.py": {"x y": 1}}, NO_ARGUMENTS),
        (5, NO_REFERENCE),
        ([3], NO_REFERENCE),
        ({"a.py": 3}, NO_REFERENCE),
        ({3: {}}, NO_REFERENCE),
    ],
)
def test_wrong_references_are_one_line(value: Any, said: str) -> None:
    with pytest.raises(UsageError) as raised:
        build(TrainConfig, {"callback": value})
    assert str(raised.value).startswith("--callback ")
    assert said in str(raised.value)
