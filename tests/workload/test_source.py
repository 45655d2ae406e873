import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from ray import cloudpickle

from mnist_ray.errors import UsageError
from mnist_ray.settings import build
from mnist_ray.workload import Workload, source
from mnist_ray.workload.source import create, is_shipped, load
from mnist_ray.workload.user_code import Source

Write = Callable[..., Path]
ROOT = Path(__file__).parents[2]

METHODS = """
    def load_data(self): ...
    def create_model(self): ...
    def loss(self, outputs, targets): ...
"""
IMPORTS = "from mnist_ray.workload import Workload\n"
DIGITS = f"{IMPORTS}class Digits(Workload):{METHODS}"
LETTERS = f"class Letters(Workload):{METHODS}"
BOTH = DIGITS + LETTERS


def message_of(reference: str | Path) -> str:
    """Return what is said of a workload that cannot be loaded."""
    with pytest.raises(UsageError) as raised:
        load(str(reference))
    return str(raised.value)


def with_settings(settings: str) -> str:
    """Return the text of a workload with the body of a class of settings."""
    return (
        "from dataclasses import dataclass, field\nfrom mnist_ray.workload import Choice, Range, setting\n"
        f"{IMPORTS}{settings}\nclass Digits(Workload):\n    Settings = Settings{METHODS}"
    )


# --- files


def test_a_file_gives_the_workload_that_it_holds(write: Write) -> None:
    file = write(DIGITS)
    workload_class = load(str(file))
    assert workload_class.__name__ == "Digits"
    assert workload_class.source == Source(str(file), str(file), DIGITS)
    assert workload_class.source.is_file
    assert workload_class.source.folder == file.parent
    assert not is_shipped(workload_class)


def test_a_relative_path_is_kept_as_an_absolute_one(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(DIGITS)
    monkeypatch.chdir(file.parent)
    found = load("problem.py:Digits").source
    assert found is not None
    assert found.reference == f"{file}:Digits"


def test_a_tilde_stands_for_the_home_folder(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(DIGITS)
    monkeypatch.setenv("HOME", str(file.parent))
    found = load("~/problem.py").source
    assert found is not None
    assert found.path == str(file)


@pytest.mark.parametrize("name", ["Digits", "Letters"])
def test_a_name_chooses_among_several_workloads(write: Write, name: str) -> None:
    assert load(f"{write(BOTH)}:{name}").__name__ == name


def test_several_workloads_without_a_name_are_listed(write: Write) -> None:
    file = write(BOTH)
    assert message_of(file) == f"--workload {file} holds several workloads; add one's name: :Digits, :Letters"


def test_the_workload_that_others_are_not_derived_from_is_meant(write: Write) -> None:
    assert load(str(write(DIGITS + "class Better(Digits): ...\n"))).__name__ == "Better"


def test_a_workload_that_others_are_derived_from_is_had_by_its_name(write: Write) -> None:
    assert load(f"{write(DIGITS + 'class Better(Digits): ...')}:Digits").__name__ == "Digits"


def test_a_workload_that_is_only_imported_does_not_count(write: Write) -> None:
    text = "from mnist_ray.mnist import MNIST\nclass Mine(MNIST): ...\n"
    assert load(str(write(text))).__name__ == "Mine"


def test_a_second_name_of_a_workload_is_no_second_workload(write: Write) -> None:
    assert load(str(write(DIGITS + "Default = Digits\n"))).__name__ == "Digits"


@pytest.mark.parametrize("text", ["", "from mnist_ray.workload import Workload, Classification", "class Digits: ..."])
def test_a_file_without_a_workload_is_refused(write: Write, text: str) -> None:
    file = write(text)
    expected = f"--workload {file} holds no workload: a class derived from mnist_ray.workload.Workload"
    assert message_of(file) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "it has no workload Numbers"),
        (DIGITS, "it has no workload Numbers; there is Digits"),
        (BOTH, "it has no workload Numbers; there are Digits, Letters"),
    ],
)
def test_a_wrong_name_is_answered_with_those_that_are_there(write: Write, text: str, expected: str) -> None:
    file = write(text)
    assert message_of(f"{file}:Numbers") == f"--workload {file}:Numbers: {expected}"


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    file = tmp_path / "nowhere.py"
    assert message_of(file) == f"--workload {file} cannot be read: No such file or directory"
    assert message_of(f"{file}:Digits") == f"--workload {file} cannot be read: No such file or directory"


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "folder.py").mkdir()
    assert message_of(tmp_path / "folder.py").endswith("folder.py cannot be read: Is a directory")


def test_a_file_that_is_no_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "latin.py").write_bytes("# é".encode("latin-1"))
    assert "latin.py cannot be read: 'utf-8' codec" in message_of(tmp_path / "latin.py")


def test_a_syntax_error_is_named_with_its_line(write: Write) -> None:
    file = write("import math\nclass Digits(:\n")
    assert message_of(file) == f"--workload {file}: SyntaxError: invalid syntax (problem.py, line 2)"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("import math\nmath.sqrt(-1)\n", "ValueError: math domain error (problem.py, line 2)"),
        ("def fail():\n    return 1 / 0\n\nfail()\n", "ZeroDivisionError: division by zero (problem.py, line 2)"),
        ("import not_here\n", "ModuleNotFoundError: No module named 'not_here' (problem.py, line 1)"),
        ("raise KeyError", "KeyError: KeyError (problem.py, line 1)"),
    ],
)
def test_an_exception_at_import_is_named_with_its_line(write: Write, text: str, expected: str) -> None:
    file = write(text)
    assert message_of(file) == f"--workload {file}: {expected}"


def test_an_exception_in_a_sibling_is_named_with_the_siblings_line(write: Write) -> None:
    write("\n\nundefined\n", "faulty_sibling.py")
    message = message_of(write("import faulty_sibling\n" + DIGITS))
    assert message.endswith("NameError: name 'undefined' is not defined (faulty_sibling.py, line 3)")


def test_a_file_that_failed_can_be_loaded_once_it_is_put_right(write: Write) -> None:
    message_of(write("raise ValueError"))
    assert load(str(write(DIGITS))).__name__ == "Digits"


def test_a_file_that_failed_leaves_its_name_to_others(write: Write) -> None:
    message_of(write("raise ValueError", "one/problem.py"))
    assert load(str(write(DIGITS, "other/problem.py"))).__name__ == "Digits"


def test_a_file_that_has_changed_is_loaded_anew(write: Write) -> None:
    first = load(str(write(DIGITS + "    noun = 'digit'\n")))
    second = load(str(write(DIGITS + "    noun = 'letter'\n")))
    assert (first.noun, second.noun) == ("digit", "letter")
    assert first.source is not None
    assert second.source is not None
    assert first.source.sha256 != second.source.sha256


def test_a_file_that_has_not_changed_is_loaded_once(write: Write) -> None:
    file = write(DIGITS)
    assert load(str(file)) is load(str(file))


def test_what_lies_beside_a_file_can_be_imported(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    write("NOUN = 'numeral'\n", "project/sibling_of_digits.py")
    file = write("from sibling_of_digits import NOUN\n" + DIGITS + "    noun = NOUN\n", "project/problem.py")
    monkeypatch.chdir(ROOT)
    assert load(str(file)).noun == "numeral"


def test_a_dash_in_a_files_name_is_no_hindrance(write: Write) -> None:
    workload_class = load(str(write(DIGITS, "my-digits.py")))
    assert workload_class.__module__ == "my_digits"


def test_a_colon_in_a_folders_name_is_no_hindrance(write: Write) -> None:
    file = write(DIGITS, "a:b/problem.py")
    assert load(str(file)).__name__ == load(f"{file}:Digits").__name__ == "Digits"


def test_a_file_that_is_named_like_an_imported_module_is_refused(write: Write) -> None:
    file = write(DIGITS, "json.py")
    expected = f"--workload {file}: Python has another module json; give the file another name"
    assert message_of(file) == expected
    assert sys.modules["json"] is __import__("json")


def test_two_files_of_one_name_are_refused(write: Write) -> None:
    load(str(write(DIGITS, "one/problem.py")))
    assert "Python has another module problem" in message_of(write(DIGITS, "other/problem.py"))


def test_a_file_that_is_named_like_a_module_to_be_imported_later_is_refused(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "wave", raising=False)
    file = write(DIGITS, "wave.py")
    assert message_of(file) == f"--workload {file}: Python has another module wave; give the file another name"


def test_a_file_that_python_would_find_by_itself_is_no_other(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(DIGITS)
    monkeypatch.syspath_prepend(file.parent)
    assert load(str(file)).__name__ == "Digits"


@pytest.mark.parametrize("other", ["../project/problem.py", "../link/problem.py"])
def test_another_way_to_a_file_that_python_would_find_leads_to_no_other(
    write: Write, monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    folder = write(DIGITS, "project/problem.py").parent
    (folder.parent / "link").symlink_to(folder)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.chdir(folder)
    assert load(other).__name__ == "Digits"


def test_a_dot_in_a_files_name_is_no_traceback(write: Write) -> None:
    file = write(DIGITS, "v1.2.py")
    try:
        assert load(str(file)).__name__ == "Digits"
    except UsageError as error:
        assert str(error).startswith(f"--workload {file}: ")  # noqa: PT017  # either answer will do


# --- modules


@pytest.fixture
def bakery(write: Write, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write into a package of the folder that Python works in."""
    monkeypatch.chdir(write("", "bakery/__init__.py").parents[1])
    return write


def test_a_module_gives_its_workload(bakery: Write) -> None:
    file = bakery(DIGITS, "bakery/cakes.py")
    workload_class = load("bakery.cakes")
    assert workload_class.__name__ == "Digits"
    assert workload_class.source == Source("bakery.cakes", str(file), DIGITS)
    assert not workload_class.source.is_file


def test_a_name_chooses_among_a_modules_workloads(bakery: Write) -> None:
    bakery(BOTH, "bakery/cakes.py")
    assert load("bakery.cakes:Letters").__name__ == "Letters"
    expected = "--workload bakery.cakes holds several workloads; add one's name: :Digits, :Letters"
    assert message_of("bakery.cakes") == expected


def test_a_package_gives_the_workload_that_it_takes_from_its_modules(bakery: Write) -> None:
    file = bakery(DIGITS, "bakery/cakes.py")
    bakery("from bakery.cakes import Digits\n", "bakery/__init__.py")
    found = load("bakery").source
    assert found == Source("bakery", str(file), DIGITS)


def test_a_module_of_a_package_may_import_another(bakery: Write) -> None:
    bakery("NOUN = 'bun'\n", "bakery/buns.py")
    bakery("from .buns import NOUN\n" + DIGITS + "    noun = NOUN\n", "bakery/cakes.py")
    assert load("bakery.cakes").noun == "bun"


@pytest.mark.parametrize("name", ["nowhere", "nowhere.cakes", "bakery.nowhere"])
def test_a_module_that_is_not_there_is_named(bakery: Write, name: str) -> None:
    assert message_of(name) == f"--workload {name}: there is no such module; a file ends in .py"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\nimport not_here\n", "ModuleNotFoundError: No module named 'not_here' (cakes.py, line 2)"),
        ("\n\n1 / 0\n", "ZeroDivisionError: division by zero (cakes.py, line 3)"),
        ("class Digits(:\n", "SyntaxError: invalid syntax (cakes.py, line 1)"),
    ],
)
def test_an_exception_in_a_module_is_named_with_its_line(bakery: Write, text: str, expected: str) -> None:
    bakery(text, "bakery/cakes.py")
    assert message_of("bakery.cakes") == f"--workload bakery.cakes: {expected}"


def test_a_missing_package_is_named_though_the_modules_name_begins_with_it(bakery: Write) -> None:
    bakery("import nowhere\n", "nowhere_to_go.py")
    expected = "ModuleNotFoundError: No module named 'nowhere' (nowhere_to_go.py, line 1)"
    assert message_of("nowhere_to_go") == f"--workload nowhere_to_go: {expected}"


def test_the_default_is_the_workload_that_ships() -> None:
    workload_class = load(source.DEFAULT)
    assert workload_class.__name__ == "MNIST"
    assert is_shipped(workload_class)


# --- what every workload must have


@pytest.mark.parametrize("method", ["load_data", "create_model", "loss"])
def test_a_method_that_is_missing_is_named(write: Write, method: str) -> None:
    lines = [line for line in METHODS.splitlines(keepends=True) if f"def {method}(" not in line]
    assert message_of(write(f"{IMPORTS}class Digits(Workload):{''.join(lines)}")) == (
        f"workload Digits has no method {method}"
    )


def test_settings_that_are_no_dataclass_are_refused(write: Write) -> None:
    message = message_of(write(with_settings("class Settings:\n    width: int = 3")))
    assert message == "Digits.Settings is to be a dataclass: put @dataclass(frozen=True) above it"


@pytest.mark.parametrize("field", ["width: int", "widths: list = field(default_factory=list)"])
def test_a_setting_without_a_default_is_named(write: Write, field: str) -> None:
    message = message_of(write(with_settings(f"@dataclass(frozen=True)\nclass Settings:\n    {field}")))
    name = field.split(":")[0]
    assert message == f"Digits.Settings: {name} needs a default, as setting(DEFAULT, HELP) gives one"


@pytest.mark.parametrize(
    ("name", "flag"),
    [
        ("batch_size", "--batch-size"),
        ("num_workers", "--num-workers"),
        ("run_name", "--run-name"),
        ("num_trials", "--num-trials"),
        ("threshold", "--threshold"),
        ("workload", "--workload"),
        ("recipe", "--recipe"),
        ("config", "--config"),
        ("help", "--help"),
    ],
)
def test_a_setting_that_is_a_flag_of_the_jobs_is_refused(write: Write, name: str, flag: str) -> None:
    text = with_settings(f"@dataclass(frozen=True)\nclass Settings:\n    {name}: int = setting(1, 'units')")
    assert message_of(write(text)) == f"Digits.Settings: {flag} is a flag already; give it another name"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("recipes = {'default': {'num_epoch': 3}}", "recipes: default has unknown settings: num_epoch"),
        ("search = {'lerning_rate': None}", "search has unknown settings: lerning_rate"),
    ],
)
def test_a_recipe_or_a_search_of_a_setting_that_nothing_knows_is_refused(
    write: Write, line: str, expected: str
) -> None:
    assert message_of(write(f"{DIGITS}    {line}\n")) == f"Digits.{expected}"


def test_settings_may_be_annotated_by_text_that_is_read_later(write: Write) -> None:
    text = with_settings("@dataclass(frozen=True)\nclass Settings:\n    width: 'int' = setting(3, 'units')")
    workload_class = load(str(write("from __future__ import annotations\n" + text)))
    assert build(workload_class.Settings, {"width": 5}).width == 5


# --- other processes

TRAVELLER = with_settings(
    "from pathlib import Path\n@dataclass(frozen=True)\nclass Settings:\n"
    "    width: int = setting(3, 'units')\n    folder: Path | None = setting(None, 'where')\n"
)
UNPICKLE = """
import pickle, sys
workload = pickle.loads(open(sys.argv[1], "rb").read())
print(type(workload).__name__, workload.noun, workload.settings.width, workload.settings.folder, workload.metadata)
print(workload.source.sha256)
"""


def travelling(file: Path) -> Workload:
    """Return a workload with settings and metadata of its own."""
    workload_class = load(str(file))
    return workload_class(build(workload_class.Settings, {"width": 7, "folder": "/data"}), {"class_names": ["a"]})


@pytest.mark.parametrize("is_deleted", [False, True], ids=["changed", "deleted"])
def test_a_pickled_workload_runs_its_old_text_in_another_process(
    write: Write, tmp_path: Path, is_deleted: bool
) -> None:
    file = write(TRAVELLER + "    noun = 'old'\n")
    workload = travelling(file)
    pickled = tmp_path / "pickled"
    pickled.write_bytes(cloudpickle.dumps(workload))
    if is_deleted:
        file.unlink()
    else:
        write(TRAVELLER + "    noun = 'new'\n")
    command = [sys.executable, "-c", UNPICKLE, str(pickled)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert workload.source is not None
    assert done.stdout.splitlines() == [
        "Digits old 7 /data {'class_names': ['a']}",
        workload.source.sha256,
    ], done.stderr


def test_a_pickled_workload_is_of_the_same_class_in_the_same_process(write: Write) -> None:
    workload = travelling(write(TRAVELLER))
    again = pickle.loads(pickle.dumps(workload))
    assert type(again) is type(workload)
    assert (again.settings, again.metadata, again.identity) == (workload.settings, workload.metadata, workload.identity)


def test_a_workload_is_created_from_its_source_and_values(write: Write) -> None:
    file = write(TRAVELLER)
    metadata = {"class_names": ["a", "b"]}
    workload = create(Source(str(file), str(file), TRAVELLER), {"width": 9, "batch_size": 3}, metadata)
    assert (workload.settings.width, workload.metadata) == (9, metadata)
    workload.metadata["more"] = 1
    assert "more" not in metadata


def test_a_workload_travels_to_where_python_knows_a_file_of_that_name(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(write(DIGITS, "folder_of_the_job/problem.py").parent)
    assert type(create(Source("/gone/problem.py", "/gone/problem.py", DIGITS), {}, {})).__name__ == "Digits"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "def create_optimiser(self, model, config): ...",
            "create_optimiser is nothing that a workload has: it has create_optimizer",
        ),
        ("recipe = {}", "recipe is nothing that a workload has: it has recipes"),
        ("def aspicture(self, inputs): ...", "aspicture is nothing that a workload has: it has as_picture"),
    ],
)
def test_a_name_that_nearly_is_one_of_a_workloads_is_refused(write: Write, line: str, message: str) -> None:
    text = DIGITS.rstrip() + f"\n    {line}\n"
    with pytest.raises(UsageError, match=message):
        load(str(write(text, "nearly.py")))


def test_settings_that_a_class_does_not_name_are_asked_for(write: Write) -> None:
    workload = load(str(write(DIGITS, "without_settings.py")))()
    with pytest.raises(AttributeError, match=r"no setting width: write Settings = \.\.\. in the workload's class"):
        _ = workload.settings.width
