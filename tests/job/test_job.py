import json
import os
import re
import shlex
import sys
from concurrent.futures import Future
from fractions import Fraction
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import nn

from mnist_ray.cluster.plan import Cluster
from mnist_ray.config import OutputConfig, SourceConfig, TrainConfig, WorkerConfig
from mnist_ray.data.data import Arrays, Splits
from mnist_ray.data.digests import digests_of
from mnist_ray.errors import JobError, UsageError
from mnist_ray.job.job import Job, read_job, resume_command
from mnist_ray.job.session import Clock, Session, ending_explained, opened
from mnist_ray.provenance import Repository
from mnist_ray.record.recorder import write_settings
from mnist_ray.runs import untrusted_folders
from mnist_ray.settings import declared, json_lines
from mnist_ray.storage import RunFolder
from mnist_ray.training.callback import Callback
from mnist_ray.workload import Data, Regression, Workload, user_code
from ray_fork.starting import Forking
from tests.conftest import ROOT, Numbers, callback_at, folder_at, load_splits, run_main, with_data, write_data_set

DIABETES = str(ROOT / "examples" / "diabetes.py")


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A function that returns the job of a command line, which writes nothing."""

    def read(*flags: str) -> Job:
        monkeypatch.setattr("sys.argv", ["jobs/train.py", "--storage-path", str(tmp_path / "runs"), *flags])
        return read_job()

    return read


def begin(job: Job, data: Splits) -> None:
    """Write what a run's folder has before the first step."""
    cluster = Cluster(is_local=True, nodes=(), log_folder="")
    nowhere: Future[Repository | None] = Future()
    nowhere.set_result(None)
    session = Session(job, job.workers, data, Mock(), Clock(), cluster, nowhere)
    write_settings(session, Mock(), job.values)


def test_runs_without_a_name_that_start_in_the_same_second_get_different_folders(read: Any, tmp_path: Path) -> None:
    names = {read().run.name for _ in range(5)}
    assert len(names) > len({name.rpartition("_")[0] for name in names})
    assert not any(tmp_path.iterdir())


def test_a_written_config_is_accepted_back(read: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    job = read("--batch-size", "7", "--learning-rate", str(0.1 + 0.2), "--data-dir", "mine", "--num-workers", "3")
    assert job.values["data_dir"] == str(tmp_path / "mine")
    file = tmp_path / "config.json"
    file.write_text(json_lines(job.values))
    assert read("--config", str(file)).values == job.values


def test_a_config_file_names_its_workload_and_a_flag_another(read: Any, tmp_path: Path) -> None:
    code, file = tmp_path / "code" / "problem_elsewhere.py", tmp_path / "config" / "config.json"
    for path in (code, file):
        path.parent.mkdir()
    code.write_text("from mnist_ray.mnist.problem import MNIST\nclass Other(MNIST): pass\n")
    file.write_text(json.dumps({"workload": str(code)}))
    assert type(read("--config", str(file)).workload).__name__ == "Other"
    given = read("--config", str(file), "--workload", "mnist_ray.mnist")
    assert type(given.workload).__name__ == "MNIST"
    file.write_text('{"data_dir": "/data"}')
    assert read("--config", str(file)).workload.settings.data_dir == Path("/data")


STEALS = """
from fractions import Fraction
from pathlib import Path
from mnist_ray.mnist.problem import MNIST
Path(__file__).with_name("it_ran").touch()
class Steals(MNIST): pass
"""


@pytest.fixture
def sent(tmp_path: Path) -> Path:
    """A run's folder, in the storage, with code in it and no settings yet."""
    folder = tmp_path / "runs" / "sent"
    folder.mkdir(parents=True)
    (folder / "steals.py").write_text(STEALS)
    return folder


IN_THE_STORAGE = ["steals.py", "sent/steals.py", "{sent}/steals.py", "{sent}/../elsewhere.py", "sent.steals"]
PROGRAMS_OR_DISGUISED = ["unittest.__main__", "pydoc", "/proc/self/cwd/sent/steals.py"]


@pytest.mark.parametrize("place", IN_THE_STORAGE + PROGRAMS_OR_DISGUISED)
@pytest.mark.parametrize("flags", [["--resume", "--run-name", "sent"], ["--config", "{sent}/config.json"]])
@pytest.mark.parametrize("name", ["workload", "callback"])
def test_code_that_may_have_come_with_a_run_is_not_loaded(
    read: Any, sent: Path, monkeypatch: pytest.MonkeyPatch, place: str, flags: list[str], name: str
) -> None:
    (sent.parent / "elsewhere.py").write_text(STEALS)
    monkeypatch.chdir(sent.parent)
    code: Any = place.format(sent=sent)
    (sent / "config.json").write_text(json.dumps({"num_epochs": 3, name: code if name == "workload" else [code]}))
    message = rf"config\.json names --{name} .*: the code may have come with the run; if you trust it"
    with pytest.raises(UsageError, match=message):
        read(*(flag.format(sent=sent) for flag in flags))
    assert not list(sent.parent.rglob("it_ran"))


def test_a_look_at_the_data_loads_no_code_that_came_with_a_run(sent: Path) -> None:
    (sent / "config.json").write_text(json.dumps({"workload": f"{sent}/steals.py"}))
    with pytest.raises(UsageError, match="the code may have come with the run"):
        run_main("view", "--config", str(sent / "config.json"))
    assert not list(sent.rglob("it_ran"))


def test_code_beside_a_run_or_around_it_is_not_loaded_whatever_the_storage(sent: Path, tmp_path: Path) -> None:
    member = sent / "members" / "seed-0"
    for folder in (sent, member):
        folder_at(folder).write_text("config.json", "{}")
    for run in (sent, member, member / "checkpoint_epoch-001_step-000000"):
        folders = untrusted_folders(folder_at(run), str(tmp_path / "another"))
        for place in (sent.parent, sent, sent / "members", run):
            assert user_code.why_untrusted(str(place / "steals.py"), folders) == "in a folder of runs"
        assert user_code.why_untrusted(str(tmp_path / "own.py"), folders) == ""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("given", ["steals.py", "", "link.py"])
def test_code_of_another_user_is_not_loaded(read: Any, tmp_path: Path, given: str) -> None:
    code, file = tmp_path / "code" / "steals.py", tmp_path / "settings.toml"
    code.parent.mkdir()
    code.write_text(STEALS)
    (code.parent / "link.py").symlink_to(code)
    os.chown(code.parent / given, 12345, 12345, follow_symlinks=False)
    named = code.parent / (given or code.name)
    file.write_text(f'workload = "{named}"')
    with pytest.raises(UsageError, match="which belongs to another user: the code may have come with the run"):
        read("--config", str(file))
    assert not (code.parent / "it_ran").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_no_module_of_another_users_folder_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stolen.py").write_text(STEALS)
    monkeypatch.chdir(tmp_path)
    before = [*sys.path]
    assert user_code.find("mnist_ray.mnist", Workload) is not None
    assert sys.path == before, "this package needs no other folder"
    os.chown(tmp_path, 12345, 12345)
    with pytest.raises(UsageError, match=r"--workload stolen: there is no such module; .*; others can write to "):
        user_code.find("stolen", Workload)
    assert sys.path == before
    assert not (tmp_path / "it_ran").exists()


def test_a_workload_in_a_folder_that_others_can_write_imports_nothing_beside_it(tmp_path: Path) -> None:
    (tmp_path / "stolen.py").write_text(STEALS)
    (tmp_path / "named.py").write_text("import stolen")
    tmp_path.chmod(0o1777)
    advice = re.escape(
        f"; others can write to {tmp_path}, so nothing is imported from it: if you trust it, set PYTHONPATH"
    )
    with pytest.raises(UsageError, match=f"ModuleNotFoundError: No module named 'stolen'.*{advice}={tmp_path}"):
        user_code.find(str(tmp_path / "named.py"), Workload)
    assert not (tmp_path / "it_ran").exists()


def test_no_code_is_loaded_before_all_of_it_is_trusted(read: Any, sent: Path, tmp_path: Path) -> None:
    own = tmp_path / "code" / "own.py"
    own.parent.mkdir()
    own.write_text(STEALS)
    config = {"num_epochs": 3, "workload": str(own), "callback": str(sent / "steals.py")}
    (sent / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="names --callback"):
        read("--resume", "--run-name", "sent")
    assert not list(tmp_path.rglob("it_ran"))


def test_this_package_is_trusted_wherever_the_settings_lie() -> None:
    assert user_code.why_untrusted("mnist_ray.mnist", [ROOT.parent]) == ""
    assert user_code.why_untrusted(str(ROOT / "examples" / "shapes.py"), [ROOT.parent]) == "in a folder of runs"


def test_code_in_a_run_is_loaded_if_a_flag_names_it_also_to_resume(read: Any, sent: Path) -> None:
    code = str(sent / "steals.py")
    (sent / "config.json").write_text(json.dumps({"num_epochs": 3, "workload": code}))
    job = read("--resume", "--run-name", "sent", "--workload", code)
    assert type(job.workload).__name__ == "Steals"
    assert job.resume_with.endswith(f" --workload {code}:Steals")


def test_the_command_to_resume_is_quoted_and_has_no_secrets(tmp_path: Path) -> None:
    output = OutputConfig(run_name="one", storage_path=f"{tmp_path}/my runs", tracker=("lines.py",))
    said = f"python jobs/tune.py --resume --run-name one --storage-path '{tmp_path}/my runs' --tracker lines.py"
    assert resume_command("tune", output) == said
    output = OutputConfig(run_name="run", storage_path="s3://KEY:SEC%2FRET@bucket/runs?region=us", quiet=True)
    said = "python jobs/train.py --resume --run-name run --storage-path 's3://***@bucket/runs?region=us'"
    assert resume_command("train", output) == said


def test_an_interrupt_says_how_to_resume_if_the_storage_is_away(read: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(run: RunFolder, file_name: str = "") -> bool:
        raise OSError("gone")

    job = read("--run-name", "a")
    monkeypatch.setattr(RunFolder, "exists", fail)
    with pytest.raises(KeyboardInterrupt, match=r"^interrupted; to resume: python jobs/train"), ending_explained(job):
        raise KeyboardInterrupt


def test_an_error_says_how_to_resume_if_anything_is_saved(read: Any, begun: Path) -> None:
    for name, advice in (("new", ""), ("run", "; to resume: python .*--run-name run --storage-path .*")):
        resume = ("--resume",) * (name == "run")
        with (
            pytest.raises(JobError, match=f"^the node is away{advice}$"),
            ending_explained(read(*resume, "--run-name", name)),
        ):
            raise JobError("the node is away")


def test_code_that_ends_the_job_is_one_line(read: Any) -> None:
    with pytest.raises(JobError, match=r"^SystemExit: sys\.exit\(3\) \("), ending_explained(read("--run-name", "a")):
        sys.exit(3)


def test_a_batch_size_that_nobody_chose_is_at_most_the_examples_also_in_a_resumed_run(
    read: Any, tmp_path: Path, few_images: Any
) -> None:
    flags = "--data-dir", str(write_data_set(tmp_path / "data", few_images, few_images)), "--run-name", "run"
    job, data = with_data(read(*flags, "--validation-size", "560"))
    assert (job.train.batch_size, len(data.train)) == (40, 40)
    assert job.notes == ("batch size 40, not 128: there are only 40 images to train on",)
    begin(job, data)
    resumed, _ = with_data(read("--resume", "--run-name", "run"))
    assert (resumed.train, resumed.notes) == (job.train, (FROM_THE_BEGINNING,))


def test_nobody_chose_a_recipes_batch_size(read: Any) -> None:
    job, data = with_data(read("--workload", DIABETES, "--limit", "0.05"))
    assert job.train.batch_size == len(data.train) < 32


class InBlocks(Regression):
    """Twelve blocks, one of them empty."""

    def load_data(self) -> Data:
        return Data(Numbers(), Numbers())

    def create_model(self) -> nn.Module:
        return nn.Linear(1, 1)


NOT_FORKED = Forking(False, (), None)


@pytest.mark.parametrize(("reproducible", "part"), [(False, 1), (True, Fraction(1, 8))])
def test_blocks_are_tried_in_the_smallest_part_of_a_batch_that_is_computed_at_a_time(
    reproducible: bool, part: Fraction, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = Mock(return_value=None)
    monkeypatch.setattr("mnist_ray.job.dry_run.try_batch", tried)
    given = {"workload": InBlocks, "storage_path": str(tmp_path), "num_workers": 0, "reproducible": reproducible}
    job = read_job(given)
    with opened(NOT_FORKED, job, load_splits(job), Mock(), Clock(), "math"):
        assert tried.call_args.args[-2] == part


class OwnOptimizer(InBlocks):
    def create_optimizer(self, model: nn.Module, config: TrainConfig) -> Any:
        return torch.optim.SGD(model.parameters(), momentum=config.momentum)


def test_what_a_workloads_own_optimizer_uses_is_its_own_matter(tmp_path: Path) -> None:
    job = read_job({"workload": OwnOptimizer, "storage_path": str(tmp_path), "momentum": 0.5})
    assert (job.train.momentum, job.unused) == (0.5, set())
    assert read_job({"workload": InBlocks, "storage_path": str(tmp_path)}).unused == {"momentum"}


@pytest.mark.parametrize("flags", [["--limit", "0.5"], ["--overfit-batches", "1"]], ids=["limit", "overfit"])
def test_a_run_on_less_data_resumes_on_the_same(read: Any, tmp_path: Path, few_images: Any, flags: list[str]) -> None:
    folder = write_data_set(tmp_path / "data", few_images, few_images)
    job, data = with_data(read("--data-dir", str(folder), "--batch-size", "10", "--run-name", "less", *flags))
    begin(job, data)
    _, resumed = with_data(read("--resume", "--run-name", "less"))
    _, again = with_data(read("--config", str(tmp_path / "runs" / "less" / "config.json")))
    assert digests_of(resumed) == digests_of(again) == digests_of(data)


def test_help_begins_with_an_example_and_the_recipes(read: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read("--help")
    usage, *_, example, _, recipes = capsys.readouterr().out.partition("\noptions:")[0].strip().splitlines()
    assert usage.endswith("[FLAGS]")
    assert "jobs/train.py --workload" in example
    assert recipes == "Recipes: default, notebook"
    flags = declared(TrainConfig, WorkerConfig, OutputConfig, SourceConfig).values()
    assert sum(about.has_flag for about in flags) + 1 <= 45  # and --set


def test_help_shows_the_defaults_of_the_workloads_recipe(read: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read("--workload", str(ROOT / "examples" / "shapes.py"), "--help")
    assert "passes over the training set (default: 8)" in " ".join(capsys.readouterr().out.split())


@pytest.fixture
def begun(read: Any, tmp_path: Path, few_images: Any) -> Path:
    """The folder of a run on the data in ``data``, without checkpoints."""
    write_data_set(tmp_path / "data", few_images, few_images)
    job, data = with_data(read("--run-name", "run", "--data-dir", str(tmp_path / "data")))
    begin(job, data)
    return tmp_path / "runs" / "run"


FROM_THE_BEGINNING = "run run has no checkpoint yet; starting from the beginning"


def test_a_resumed_run_without_checkpoints_says_that_it_starts_from_the_beginning(read: Any, begun: Path) -> None:
    (begun / "checkpoint_old").mkdir()
    assert read("--resume", "--run-name", "run").notes == (FROM_THE_BEGINNING,)
    (begun / "checkpoint_epoch-001_step-000000").mkdir()
    assert read("--resume", "--run-name", "run").notes == ()


def test_a_run_is_resumed_with_its_callback_from_another_place(read: Any, begun: Path, tmp_path: Path) -> None:
    file, now = begun / "config.json", callback_at(tmp_path / "now.py", "on_step(self, state)", "pass")
    given = ("--resume", "--run-name", "run", "--callback", str(now))
    file.write_text(json.dumps(json.loads(file.read_text()) | {"callback": ["/gone/now.py:Written"]}))
    assert read(*given).train.callback == (f"{now}:Written",)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"callback": f"{now}:Other"}))
    with pytest.raises(UsageError, match=r"was started with --callback .*now\.py:Other, not .*now\.py:Written"):
        read(*given)


FREEZE = """
from mnist_ray.training.callback import Callback

class Freeze(Callback):
    def __init__(self, num_epochs, parts=("body",)):
        self.num_epochs, self.parts = num_epochs, parts

class Watch(Callback):
    pass
"""


def test_callbacks_have_arguments_in_a_file_in_a_call_and_in_flags(read: Any, tmp_path: Path) -> None:
    (tmp_path / "freeze.py").write_text(FREEZE)
    file, arguments = tmp_path / "settings.toml", {"num_epochs": 2, "parts": ["body", "neck"]}
    file.write_text("""callback = ["freeze.py:Freeze(num_epochs=2, parts=['body', 'neck'])", "freeze.py:Watch"]""")
    of_file = read("--config", str(file))
    freeze, watch = f"{tmp_path}/freeze.py:Freeze(num_epochs=2, parts=['body', 'neck'])", f"{tmp_path}/freeze.py:Watch"
    assert of_file.train.callback == (freeze, watch)
    assert [user_code.create(code, Callback).__dict__ for code in of_file.callbacks] == [arguments, {}]
    of_flags = read("--callback", freeze, "--callback", watch)
    of_call = read_job({"callback": [Path(freeze), watch]})
    assert of_flags.callbacks == of_call.callbacks == of_file.callbacks


def test_the_command_to_resume_names_all_trackers_and_untrusted_callbacks(read: Any, sent: Path) -> None:
    (sent / "frozen.py").write_text(FREEZE)
    names = f"{sent}/frozen.py:Freeze(num_epochs=2)", f"{sent}/frozen.py:Watch"
    given = [word for name in names for word in ("--callback", name)]
    said = read("--run-name", "one", *given).resume_with
    assert shlex.split(said)[-4:] == given


MISTAKES = [  # words of the command line in a folder HERE, and the error
    ("--callback freeze.py:Freeze", "--callback HERE/freeze.py:Freeze: missing a required argument: 'num_epochs'"),
    ("--callback freeze.py:Watch(last=3)",
     "--callback HERE/freeze.py:Watch: got an unexpected keyword argument 'last'"),
    ("--callback freeze.py:Watch(3)",
     "--callback freeze.py:Watch(3): arguments must be NAME=VALUE, and values numbers, strings, lists or dicts"),
    ("--callback freeze.py", "--callback HERE/freeze.py holds several callbacks; add a name: :Freeze, :Watch"),
    ("--callback freeze.py:Thaw", "--callback HERE/freeze.py:Thaw: there is no callback Thaw, only Freeze, Watch"),
    ("--callback no_module", "--callback no_module: there is no such module; a file's name must end in .py"),
    ("--workload freeze.py",
     "--workload HERE/freeze.py holds no workload: no class derived from mnist_ray.workload.Workload"),
    ("--workload gone.py", "--workload HERE/gone.py cannot be read: No such file or directory"),
    ("--config gone.json",
     "--workload /gone/problem.py cannot be read: No such file or directory (of gone.json); if the workload has "
     "moved, give its new location with --workload"),
    ("--config mnist.json --workload SHAPES", "mnist.json has unknown settings: data_dir"),
    ("--config missing.toml", "cannot read the settings file missing.toml: No such file or directory"),
    ("--config wrong.toml", "wrong.toml: --batch-size must be of type int, not 'many'"),
    ("--config .", "cannot read the settings file .: Is a directory"),
    ("--recipe huge", "there is no recipe huge; known: default, notebook"),
    ("--resume", "--resume needs --run-name NAME"),
    ("--resume --run-name gone",
     "--resume: there is no run of train in HERE/runs/gone; check --run-name and --storage-path"),
    ("--run-name a/b", "--run-name must be at most 200 letters, digits, '.', '_' or '-', not 'a/b'"),
    ("--init-from gone", "--init-from gone: there is no such run, checkpoint or file"),
    ("--set momentum", "--set momentum must be NAME=VALUE"),
    ("--learning-rate 0", "--learning-rate must be a positive number, not 0.0"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "line"), MISTAKES)
def test_a_mistake_is_one_line(
    read: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str, line: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("freeze.py").write_text(FREEZE)
    Path("gone.json").write_text(json.dumps({"workload": "/gone/problem.py"}))
    Path("mnist.json").write_text(json.dumps({"workload": "mnist_ray.mnist", "data_dir": "/x"}))
    Path("wrong.toml").write_text("batch_size = 'many'")
    with pytest.raises(UsageError) as raised:
        read(*words.replace("SHAPES", str(ROOT / "examples" / "shapes.py")).split())
    assert str(raised.value).replace(str(tmp_path), "HERE") == line


def test_a_run_is_resumed_with_its_workload_and_callback_although_their_files_have_got_others(
    read: Any, write: Any, tmp_path: Path
) -> None:
    code = write("from mnist_ray.mnist import MNIST\nclass Mine(MNIST): pass\n", "growing.py")
    callback = callback_at(tmp_path / "growing_callback.py", "on_step(self, state)", "pass")
    job = read("--workload", str(code), "--callback", str(callback), "--run-name", "run")
    job.run.write_text("config.json", json_lines(job.values))
    code.write_text(code.read_text() + "class Other(MNIST): pass\n")
    callback.write_text(callback.read_text() + "class Other(Callback): pass\n")
    resumed = read("--resume", "--run-name", "run")
    assert (type(resumed.workload).__name__, resumed.values) == ("Mine", job.values)


def test_a_run_is_resumed_with_its_data_from_another_place(read: Any, begun: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    moved = (tmp_path / "data").rename(tmp_path / "other" / "data")
    with_data(read("--resume", "--run-name", "run", "--data-dir", str(moved)))
    with pytest.raises(UsageError, match=r"was started with --data-dir .*/data, not .*/gone/data; leave that out"):
        read("--resume", "--run-name", "run", "--data-dir", str(tmp_path / "gone" / "data"))


def test_a_resumed_run_may_save_more_often_but_not_train_otherwise(read: Any, begun: Path) -> None:
    resume = ("--resume", "--run-name", "run")
    assert read(*resume, "--checkpoint-every", "7").train.checkpoint_every == 7
    assert read(*resume, "--checkpoint-every", "auto").train.checkpoint_every is None
    with pytest.raises(UsageError, match="run was started with --batch-size 128, not 64; leave that out"):
        read(*resume, "--batch-size", "64")


TEACHER = """
from dataclasses import dataclass
from pathlib import Path
from mnist_ray.mnist import MNIST
from mnist_ray.workload import setting

@dataclass(frozen=True)
class Settings:
    teacher: Path | None = setting(None, "weights")

class Taught(MNIST):
    Settings = Settings
"""


def test_a_file_that_decides_the_weights_may_move_but_not_be_another_of_the_same_name(
    read: Any, begun: Path, tmp_path: Path
) -> None:
    (tmp_path / "taught.py").write_text(TEACHER)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.pt").touch()
    one, two = (str(tmp_path / name / "a.pt") for name in ("one", "two"))
    config = {"workload": str(tmp_path / "taught.py"), "teacher": one}
    (begun / "config.json").write_text(json_lines(config))
    with pytest.raises(UsageError, match=f"was started with --teacher {one}, not {two}; leave that out"):
        read("--resume", "--run-name", "run", "--teacher", two)
    os.unlink(one)
    assert str(read("--resume", "--run-name", "run", "--teacher", two).workload.settings.teacher) == two


@pytest.mark.parametrize("name", ["config.json", "result.json", "origin.json"])
def test_a_run_with_a_damaged_file_is_not_resumed_until_that_is_deleted(read: Any, begun: Path, name: str) -> None:
    (begun / name).write_bytes(b"\xff")
    with pytest.raises(JobError, match=rf"run/{name} is damaged: .*; restore it, or delete it$"):
        read("--resume", "--run-name", "run")


def test_damaged_settings_of_a_run_are_one_line_with_the_file(read: Any, begun: Path) -> None:
    file = begun / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"batch_size": "many"}))
    with pytest.raises(UsageError, match=r"run/config\.json: --batch-size must be of type int, not 'many'"):
        read("--resume", "--run-name", "run")
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(JobError, match=r"^cannot read .*run/config\.json: it is not a file$"):
        read("--resume", "--run-name", "run")


def test_a_run_is_not_resumed_with_other_data(read: Any, begun: Path, tmp_path: Path, few_images: Any) -> None:
    other = Arrays(few_images.inputs, np.roll(few_images.targets, 1))
    write_data_set(tmp_path / "data", few_images, other)
    message = r"the data differ from those that run run was started with \(test\); restore them"
    with pytest.raises(UsageError, match=message):
        with_data(read("--resume", "--run-name", "run"))
    origin = json.loads((begun / "origin.json").read_text())
    (begun / "origin.json").write_text(json.dumps({**origin, "data": None}))  # by a user who knows better
    with_data(read("--resume", "--run-name", "run"))


def test_a_resumed_run_says_that_its_data_cannot_be_checked(tmp_path: Path) -> None:
    given = {"workload": InBlocks, "storage_path": str(tmp_path), "run_name": "run"}
    job, data = with_data(read_job(given))
    assert job.notes == ()
    begin(job, data)
    job, _ = with_data(read_job({**given, "resume": True}))
    said = "cannot check that the data are unchanged: the workload does not list their files (Data.files)"
    assert job.notes == (FROM_THE_BEGINNING, said)


def test_a_run_that_may_not_be_read_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RunFolder, "exists", Mock(return_value=True))
    monkeypatch.setattr(RunFolder, "info", Mock(side_effect=PermissionError(13, "Permission denied")))
    with pytest.raises(JobError, match=rf"^cannot read {tmp_path}/theirs/config\.json: Permission denied$"):
        read_job({"resume": True, "run_name": "theirs", "storage_path": str(tmp_path)})
