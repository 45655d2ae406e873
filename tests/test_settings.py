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
from mnist_ray.settings import at_least, build, declared, fraction, positive, setting, split_call, values_of, within

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


def test_every_default_passes_its_own_check_and_other_classes_values_are_ignored() -> None:
    for config_class in CLASSES:
        assert build(config_class, {**dataclasses.asdict(config_class()), "trays": 3}) == config_class()


@pytest.mark.parametrize(
    ("config_class", "name", "value", "expected"),
    [
        (Oven, "most_trays", None, None),
        (Oven, "most_trays", "none", None),
        (Oven, "heat", 200, 200.0),
        (Oven, "is_on", True, True),
        (Oven, "shelf", 3, 3),
        (Oven, "recipe", "/bread.txt", Path("/bread.txt")),
        (Oven, "recipe", "~/bread.txt", Path("/home/baker/bread.txt")),
        (Oven, "recipe", "bread.txt", Path("/current/bread.txt")),
        (Oven, "times", [1, 2, 3], (1, 2, 3)),
        (Oven, "sizes", None, None),
        (Oven, "baker", "none", "none"),
        (Oven, "baker", Path("/baker"), "/baker"),
        (Oven, "trays", np.int64(4), 4),
        (Oven, "heat", np.int32(200), 200.0),
        (Oven, "is_on", np.bool_(True), True),
        (WorkerConfig, "use_gpu", True, "yes"),
        (TrainConfig, "callback", None, ()),
        (TrainConfig, "callback", Path("freeze.py"), ("freeze.py",)),
        (TrainConfig, "callback", ["/a(b)/a.py:F(x='x(y)')", "b.py"], ("/a(b)/a.py:F(x='x(y)')", "b.py")),
    ],
)
def test_values_are_converted_to_the_settings_type(
    config_class: type, name: str, value: Any, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/baker")
    monkeypatch.setattr("os.getcwd", lambda: "/current")
    built = getattr(build(config_class, {name: value}), name)
    assert built == expected
    assert type(built) is type(expected)


NO_ARGUMENTS, NO_REFERENCE = (
    "arguments must be NAME=VALUE, and values numbers, strings",
    "must be FILE.py:NAME or a list",
)


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
        (Oven, "recipe", "", "--recipe is empty; name a file or a folder"),
        (Oven, "recipe", "~nosuchuser/x", "--recipe ~nosuchuser/x: Could not determine home directory"),
        (Oven, "recipe", "a" * 300, f"--recipe {'a' * 300}: File name too long"),
        (Oven, "recipe", "a\0b", "--recipe a\0b: "),
        (Oven, "times", "12", "--times must be a list of int, not '12'"),
        (Oven, "times", [1, "2"], "--times must be a list of int, not [1, '2']"),
        (Oven, "times", [1, 1], "--times must be different, not (1, 1)"),
        (TrainConfig, "limit", 0.0, "--limit must be in (0, 1], not 0.0"),
        (TrainConfig, "num_chunks", 10**9, "--set num_chunks must be 1 to 1,024, not 1000000000"),
        (OutputConfig, "run_name", "", "--run-name must be at most 200 letters, digits, '.', '_' or '-', not ''"),
        (TrainConfig, "callback", "a.py:F(1)", f"--callback a.py:F(1): {NO_ARGUMENTS}"),
        (TrainConfig, "callback", "a.py:F(x=y)", f"--callback a.py:F(x=y): {NO_ARGUMENTS}"),
        (TrainConfig, "callback", "a.py:F(**{})", f"--callback a.py:F(**{{}}): {NO_ARGUMENTS}"),
        (TrainConfig, "callback", "a.py:F(1) + f(2)", f"--callback a.py:F(1) + f(2): {NO_ARGUMENTS}"),
        (TrainConfig, "callback", 5, f"--callback {NO_REFERENCE}"),
        (TrainConfig, "callback", [3], f"--callback {NO_REFERENCE}"),
        (TrainConfig, "callback", {"a.py": {}}, f"--callback {NO_REFERENCE}"),
    ],
)
def test_wrong_values_are_refused_by_name(config_class: type, name: str, value: Any, message: str) -> None:
    with pytest.raises(UsageError) as raised:
        build(config_class, {name: value})
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)


def test_values_are_written_flat_and_read_back() -> None:
    oven, shop = Oven(recipe=Path("/bread.txt"), times=(1, 2), heat=0.1 + 0.2), Shop(city="Oslo")
    values = values_of(oven, shop)
    assert values["recipe"] == "/bread.txt"
    assert values.keys() == declared(Oven, Shop).keys()
    assert (build(Oven, values), build(Shop, values)) == (oven, shop)


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("/my(copy)/a.py:Of(text='x(y)', by={'a': None})", ("/my(copy)/a.py:Of", {"text": "x(y)", "by": {"a": None}})),
        ("package.module(names=['b'])", ("package.module", {"names": ["b"]})),
        ("/my (copy)/a.py", ("/my (copy)/a.py", {})),
    ],
)
def test_a_reference_has_arguments_after_its_path(reference: str, expected: tuple[str, dict[str, Any]]) -> None:
    assert split_call(reference) == expected


def test_a_misspelled_property_of_a_setting_is_an_error_where_it_is_declared() -> None:
    with pytest.raises(TypeError, match="decide_data"):
        setting(32, "units of the hidden layer", decide_data=True)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--epochs 3", "unrecognized arguments: --epochs 3; did you mean --num-epochs?; see"),
        ("--learning_rate 0.1", "unrecognized arguments: --learning_rate 0.1; did you mean --learning-rate?; see"),
        ("--quiet --workers=2", "unrecognized arguments: --workers=2; did you mean --num-workers?; see"),
        ("--frobnicate", "unrecognized arguments: --frobnicate; see"),
        ("--train-size", "unrecognized arguments: --train-size; see"),
        ("--gpu", "unrecognized arguments: --gpu; did you mean --use-gpu?; see"),
        ("--set momentun=1", "unrecognized arguments: --set momentun=1; did you mean --set momentum?; see"),
        ("--momentum 0.5", "--momentum is no flag; use --set momentum=VALUE, or a settings file; see"),
        ("--no-momentum", "--no-momentum is no flag; use --set momentum=VALUE, or a settings file; see"),
        ("--seed", "argument --seed: expected one argument; see"),
        (
            "--storage-pth=http://user:pw@host \x1b",
            r"unrecognized arguments: --storage-pth=http://***@host \x1b; did you mean --storage-path?; see",
        ),
    ],
)
def test_unknown_flags_are_one_line_with_a_suggestion_and_without_secrets(
    words: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        Parser("It does something.", *CLASSES).read_flags(words.split(" "))
    printed = capsys.readouterr().err
    assert printed.endswith(f": error: {said} --help\n")
    assert printed.count("\n") == 1


@pytest.mark.parametrize(
    ("config_class", "words", "given"),
    [
        (TrainConfig, "--no-compile --ema-decay none", {"compile": False, "ema_decay": "none"}),
        (TrainConfig, "--set momentum=0.5 --batch-size 8", {"momentum": 0.5, "batch_size": 8}),
        (TrainConfig, "--set fold=none", {"fold": "none"}),
        (TrainConfig, "--set compile=true", {"compile": True}),
        (TrainConfig, "--set weight_decay=0.5 --seed high", {"weight_decay": 0.5, "seed": "high"}),
        (TrainConfig, f"--set momentum={'[' * 10**5}", {"momentum": "[" * 10**5}),
        (TrainConfig, "--callback a.py --callback b.py", {"callback": ["a.py", "b.py"]}),
        (Oven, "--times 1 2 --is-on", {"times": [1, 2], "is_on": True}),
        (Oven, "", {}),
        (Oven, "--timer", {"timer": "on"}),
        (Oven, "--timer --trays 3", {"timer": "on", "trays": 3}),
        (Oven, "--timer 12:00", {"timer": "12:00"}),
        (Kitchen, "Anna", {"cook": "Anna"}),
        (Kitchen, "soup --set a=1 Anna", {"cook": "soup", "dishes": ["Anna"], "set": ["a=1"]}),
        (Kitchen, "A b --set a=1 --set b= c", {"cook": "A", "dishes": ["b", "c"], "set": ["a=1", "b="]}),
    ],
)
def test_flags_and_words_are_read(
    config_class: type, words: str, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Parser("", config_class).read_flags(words.split()) == given
    monkeypatch.setattr("sys.argv", ["bake.py", *words.split(), "--unknown", "5"])
    if config_class is not Kitchen:  # whose words would take the 5
        assert peek(config_class) == given


def test_what_is_set_needs_a_value() -> None:
    with pytest.raises(UsageError, match="--set momentum must be NAME=VALUE"):
        Parser("", TrainConfig).read_flags(["--set", "momentum"])


def test_the_usage_names_only_what_is_no_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        Parser("", Kitchen).read_flags(["--help"])
    assert capsys.readouterr().out.splitlines()[0].endswith(" COOK [DISH] [FLAGS]")
