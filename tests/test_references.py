"""References to a user's classes with keyword arguments."""

from pathlib import Path
from typing import Any

import pytest

from mnist_ray.references import references_of, split_call


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


@pytest.mark.parametrize(
    "value", ["a.py:F(1)", "a.py:F(x=y)", "a.py:F(**{})", "x)", {"a.py": {"x": float("inf")}}, {"a.py": {"x y": 1}}]
)
def test_arguments_that_cannot_be_written_down_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="arguments must be NAME=VALUE"):
        references_of(value)


def test_a_reference_that_would_take_long_to_read_is_refused() -> None:
    with pytest.raises(ValueError, match="it has 200,001 characters; 4,096 are allowed"):
        split_call("(" * 200_000 + ")")


@pytest.mark.parametrize("value", [5, [3], {"a.py": 3}, {3: {}}])
def test_other_types_are_refused(value: Any) -> None:
    with pytest.raises(TypeError):
        references_of(value)
