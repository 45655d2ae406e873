import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from ray import cloudpickle

from mnist_ray.errors import UsageError
from mnist_ray.flags import Parser
from mnist_ray.settings import build
from mnist_ray.training.callback import Callback
from mnist_ray.workload import Workload
from mnist_ray.workload.base import create
from mnist_ray.workload.loading import load
from mnist_ray.workload.user_code import SourceCode, find
from tests.conftest import callback_at

Write = Callable[..., Path]
ROOT = Path(__file__).parents[2]

METHODS = """
    def load_data(self): ...
    def create_model(self): ...
    def loss(self, outputs, targets): ...
"""
IMPORTS = "from mnist_ray.workload import Workload\n"
DIGITS = f"{IMPORTS}class Digits(Workload):{METHODS}"
BOTH = f"{DIGITS}class Letters(Workload):{METHODS}"


def message_of(reference: str | Path) -> str:
    """Return the error message of a workload that cannot be loaded."""
    with pytest.raises(UsageError) as raised:
        load(str(reference))
    return str(raised.value)


def with_settings(settings: str) -> str:
    """Return the text of a workload with the body of a class of settings."""
    return (
        "from dataclasses import dataclass\nfrom mnist_ray.workload import Choice, Range, setting\n"
        f"{IMPORTS}{settings}\nclass Digits(Workload):\n    Settings = Settings{METHODS}"
    )


# --- files


@pytest.mark.parametrize("name", ["problem.py", "my-digits.py", "a:b/problem.py", "v1.2.py"])
def test_a_path_becomes_absolute(write: Write, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    file = write(DIGITS, name)
    monkeypatch.chdir(file.parent)
    monkeypatch.setenv("HOME", str(file.parent))
    for reference in (str(file), f"{file}:Digits", file.name, f"~/{file.name}:Digits"):
        assert load(reference).source == SourceCode(f"{file}:Digits", str(file), DIGITS)
    assert load(str(file)).source.folder == file.parent


@pytest.mark.parametrize("reference", ["problem.py", "../link/problem.py"])
def test_a_file_on_pythons_own_path_is_loaded(write: Write, monkeypatch: pytest.MonkeyPatch, reference: str) -> None:
    folder = write(DIGITS, "project/problem.py").parent
    (folder.parent / "link").symlink_to(folder)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.chdir(folder)
    assert load(reference).__name__ == "Digits"


@pytest.mark.parametrize(
    ("text", "name", "expected"),
    [
        (BOTH, ":Letters", "Letters"),
        (DIGITS + "class Better(Digits): ...\n", "", "Better"),
        (DIGITS + "class Better(Digits): ...\n", ":Digits", "Digits"),
        ("from mnist_ray.mnist import MNIST\nclass Mine(MNIST): ...\n", "", "Mine"),
        (DIGITS + "Default = Digits\n", "", "Digits"),
    ],
    ids=["named", "derived", "derived from", "beside an imported one", "with a second name"],
)
def test_the_right_class_of_a_file_is_loaded(write: Write, text: str, name: str, expected: str) -> None:
    assert load(f"{write(text)}{name}").__name__ == expected


def test_a_loaded_classs_reference_still_names_it_if_its_file_gets_another(write: Write) -> None:
    reference = load(str(write(DIGITS))).source.reference
    file = write(BOTH)
    assert load(reference).__name__ == "Digits"
    assert "holds several workloads" in message_of(file)
    assert load(reference) is load(reference)
    assert load(str(write(f"{DIGITS}First, Digits = Digits, None"))).source.reference == f"{file}:First"


def test_an_unreadable_file_is_named(write: Write, tmp_path: Path) -> None:
    (tmp_path / "folder.py").mkdir()
    (tmp_path / "latin.py").write_bytes("# é".encode("latin-1"))
    assert message_of(tmp_path / "nowhere.py:Digits").endswith("nowhere.py cannot be read: No such file or directory")
    assert message_of(tmp_path / "folder.py").endswith("folder.py cannot be read: Is a directory")
    assert "latin.py cannot be read: 'utf-8' codec" in message_of(tmp_path / "latin.py")


def test_a_file_that_failed_or_changed_is_loaded_again_and_else_once(write: Write) -> None:
    message_of(write("raise ValueError"))
    first = load(str(write(DIGITS + "    noun = 'digit'\n")))
    file = write(DIGITS + "    noun = 'letter'\n")
    second = load(str(file))
    assert (first.noun, second.noun) == ("digit", "letter")
    assert first.source.sha256 != second.source.sha256
    assert load(str(file)) is second


def test_threads_that_load_a_file_at_once_share_its_class(write: Write) -> None:
    file = write(f"{DIGITS}\nimport time\ntime.sleep(0.1)\n")
    with ThreadPoolExecutor(4) as threads:
        assert len({*threads.map(load, [str(file)] * 4)}) == 1


def test_a_file_imports_its_neighbours_and_their_exceptions_have_places(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("NOUN = 'numeral'\n", "project/sibling_of_digits.py")
    file = write("from sibling_of_digits import NOUN\n" + DIGITS + "    noun = NOUN\n", "project/problem.py")
    monkeypatch.chdir(ROOT)
    assert load(str(file)).noun == "numeral"
    write("\n\nundefined\n", "project/faulty_sibling.py")
    message = message_of(write("import faulty_sibling\n" + DIGITS, "project/other_problem.py"))
    assert message.endswith("NameError: name 'undefined' is not defined (faulty_sibling.py, line 3)")


def test_a_file_with_the_name_of_another_module_is_refused(write: Write) -> None:
    file = write(DIGITS, "json.py")
    clash = f"Python has another module named json, {json.__file__}; name that one, or rename one of the files"
    assert message_of(file) == f"--workload {file}: {clash}"


# --- modules


@pytest.fixture
def bakery(write: Write, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write into a package in the current folder."""
    monkeypatch.chdir(write("", "bakery/__init__.py").parents[1])
    return write


def test_a_module_gives_its_workload(bakery: Write) -> None:
    bakery("NOUN = 'bun'\n", "bakery/buns.py")
    text = "from .buns import NOUN\n" + DIGITS + "    noun = NOUN\n"
    file = bakery(text, "bakery/cakes.py")
    workload_class = load("bakery.cakes")
    assert (workload_class.__name__, workload_class.noun) == ("Digits", "bun")
    assert workload_class.source == SourceCode("bakery.cakes:Digits", str(file), text)


def test_a_package_gives_the_workload_that_it_imports_from_its_modules(bakery: Write) -> None:
    file = bakery(DIGITS, "bakery/cakes.py")
    bakery("from bakery.cakes import Digits\n", "bakery/__init__.py")
    assert load("bakery").source == SourceCode("bakery:Digits", str(file), DIGITS)


@pytest.mark.parametrize("name", ["nowhere", "nowhere.cakes", "bakery.nowhere", ".", "./bakery"])
def test_a_missing_module_is_named(bakery: Write, name: str) -> None:
    assert message_of(name) == f"--workload {name}: there is no such module; a file's name must end in .py"


# --- mistakes

OF_FILES = [  # a file's text, the class that is named, and the error after "--workload" and the file
    (BOTH, "", " holds several workloads; add a name: :Digits, :Letters"),
    (IMPORTS + "class Digits: ...", "", " holds no workload: no class derived from mnist_ray.workload.Workload"),
    (BOTH, ":Numbers", ": there is no workload Numbers, only Digits, Letters"),
    ("import math\nclass Digits(:\n", "", ": SyntaxError: invalid syntax (problem.py, line 2)"),
    ("def fail(): return 1 / 0\nfail()\n", "", ": ZeroDivisionError: division by zero (problem.py, line 1)"),
    ("raise KeyError", "", ": KeyError: KeyError (problem.py, line 1)"),
    ("import sys\nsys.exit(3)", "", ": SystemExit: sys.exit(3) (problem.py, line 2)"),
    ("from mnist_ray.workload import Choice\nChoice(range(3)); Choice(())", "",
     ": Choice(()) needs a tuple of values, such as Choice((16, 32)) (problem.py, line 2)"),
    ("from mnist_ray.workload import Choice\nChoice((16))", "",
     ": Choice(16) needs a tuple of values, such as Choice((16, 32)) (problem.py, line 2)"),
    (f"{DIGITS}from mnist_ray import train\ntrain(Digits, num_workers=0)\n", "",
     ': the file starts a job when it is loaded; put the call under if __name__ == "__main__": (problem.py, line 7)'),
]  # fmt: skip
OF_CLASSES = [  # a line in the class, and the error after its name
    ("load_data = Workload.load_data", "workload Digits has no method load_data"),
    ("create_model = Workload.create_model", "workload Digits has no method create_model"),
    ("loss = Workload.loss", "workload Digits has no method loss"),
    ("recipes = {'default': {'num_epoch': 3}}",
     "Digits.recipes: default has unknown settings: num_epoch; did you mean num_epochs?"),
    ("recipes = {'num_epochs': 20}", "Digits.recipes: TypeError: 'int' object is not iterable"),
    ("recipes = {'long': {'num_epochs': 0}}", "Digits.recipes: --num-epochs must be at least 1, not 0"),
    ("recipe = {}", "Digits.recipe: did you mean recipes? If not, choose another name"),
    ("search = {'lerning_rate': None}",
     "Digits.search has unknown settings: lerning_rate; did you mean learning_rate?"),
    ("def create_optimiser(self, model, config): ...",
     "Digits.create_optimiser: did you mean create_optimizer? If not, choose another name"),
    ("metrics = (Metric('f1', 'maximize'),)", "Digits.metrics: f1 has the mode 'maximize'; it must be max or min"),
    ("metrics = (Metric('loss', 'max'),)", 'Digits.metrics: the loss is named as Metric("loss", "min")'),
    ("metrics = (3)", "Digits.metrics: TypeError: 'int' object is not iterable"),
    ("Settings = int", "Digits.Settings must be a dataclass; put @dataclass(frozen=True) above it"),
    ("def __init__(self): pass", "Digits.__init__: TypeError: too many positional arguments"),
]  # fmt: skip
OF_SETTINGS = [  # fields of a workload's settings, and the error
    ("width: int", "width needs a default; use setting(DEFAULT, HELP)"),
    ("width: int = setting('a', 'units')", "--width must be of type int, not 'a'"),
    ("width: bytes = setting(b'a', 'units')", "TypeError: Object of type bytes is not JSON serializable"),
    ("batch_size: int = setting(1, 'units')", "--batch-size is already a flag; give it another name"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "name", "line"), OF_FILES)
def test_a_mistake_in_a_file_is_one_line(write: Write, text: str, name: str, line: str) -> None:
    reference = f"{write(text)}{name}"
    assert message_of(reference) == f"--workload {reference}{line}"


@pytest.mark.parametrize(("text", "line"), OF_CLASSES)
def test_a_mistake_in_a_class_is_one_line(write: Write, text: str, line: str) -> None:
    assert message_of(write(f"from mnist_ray.workload import Metric\n{DIGITS}    {text}\n")) == line


@pytest.mark.parametrize(("field", "line"), OF_SETTINGS)
def test_a_mistake_in_a_workloads_settings_is_one_line(write: Write, field: str, line: str) -> None:
    text = with_settings(f"@dataclass(frozen=True)\nclass Settings:\n    {field}")
    assert message_of(write(text)) == f"Digits.Settings: {line}"


CHECKED = """
@dataclass(frozen=True)
class Settings:
    width: int = setting(32, 'units')
    heads: int = setting(8, 'of the attention')
    def __post_init__(self):
        if self.width % self.heads: raise ValueError('--width must be a multiple of --heads')
"""


def test_settings_may_check_each_other(write: Write) -> None:
    settings: Any = load(str(write(with_settings(CHECKED)))).Settings
    with pytest.raises(UsageError, match=r"^--width must be a multiple of --heads$"):
        build(settings, {"width": 9})
    assert Parser("", settings).read_flags(["--width", "9"]) == {"width": 9}  # a recipe may have as many heads


def test_a_misspelled_method_of_a_callback_is_refused(tmp_path: Path) -> None:
    file = callback_at(tmp_path / "misspelled.py", "on_epoch_end(self, state, progress)", "pass")
    with pytest.raises(UsageError, match=r"\.on_epoch_end: did you mean on_epoch\? If not, choose another name$"):
        find(str(file), Callback)
    file.write_text(file.read_text().replace("on_epoch_end", "_gradients") + "\n    gradients = 0.0\n")
    find(str(file), Callback)


# --- other processes

TRAVELLER = "from __future__ import annotations\n" + with_settings(
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
    """Return a workload with settings and metadata."""
    workload_class = load(str(file))
    return workload_class(build(workload_class.Settings, {"width": 7, "folder": "/data"}), {"class_names": ["a"]})


def test_a_pickled_workload_runs_its_old_text_in_another_process(write: Write, tmp_path: Path) -> None:
    workload = travelling(write(TRAVELLER + "    noun = 'old'\n"))
    pickled = tmp_path / "pickled"
    pickled.write_bytes(cloudpickle.dumps(workload))
    write(TRAVELLER + "    noun = 'new'\n")
    command = [sys.executable, "-c", UNPICKLE, str(pickled)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    expected = ["Digits old 7 /data {'class_names': ['a']}", workload.source.sha256]
    assert done.stdout.splitlines() == expected, done.stderr


def test_a_workload_is_created_from_its_source_and_values_though_its_file_is_gone(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(write(TRAVELLER, "folder_of_the_job/problem.py").parent)
    metadata = {"class_names": ["a", "b"]}
    gone = SourceCode("/gone/gone.py", "/gone/gone.py", TRAVELLER)
    workload = create(gone, {"width": 9, "batch_size": 3}, metadata)
    assert (workload.settings.width, workload.metadata) == (9, metadata)
    workload.metadata["more"] = 1
    assert "more" not in metadata
