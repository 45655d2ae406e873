import json
import os
from pathlib import Path

import pytest

from mnist_ray import layers
from mnist_ray.errors import UsageError
from mnist_ray.job.job import Job, read_job
from tests.conftest import run_main

WORKLOAD = "from mnist_ray.mnist.problem import MNIST\nclass Mine(MNIST): pass\n"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for a project; the current folder is inside."""
    folder = tmp_path / "project"
    (folder / "inside").mkdir(parents=True)
    monkeypatch.chdir(folder / "inside")
    return folder


def written(file: Path, text: str) -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return str(file)


def job(*flags: str, monkeypatch: pytest.MonkeyPatch) -> Job:
    monkeypatch.setattr("sys.argv", ["jobs/train.py", *flags])
    return read_job()


def test_later_places_win_and_each_setting_has_its_place(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = '[tool.mnist_ray]\nrecipe = "notebook"\nseed = 1\nbatch_size = 11\nlimit = 0.5\nstorage_path = "runs"\n'
    pyproject = written(project / "pyproject.toml", table + "num_trials = 3\n")
    file = written(project / "settings.yaml", "seed: 2\nbatch_size: 12\nearly_stopping_patience: 4\n")
    experiment = written(project / "experiment.toml", "early_stopping_patience = 5\n")
    asked = job("--config", file, "--config", experiment, "--seed", "3", monkeypatch=monkeypatch)
    expected = {
        "seed": (3, "the flags"),
        "early_stopping_patience": (5, experiment),
        "batch_size": (12, file),
        "limit": (0.5, pyproject),
        "beta1": (0.9, "the recipe notebook"),
    }
    assert {name: (asked.values[name], asked.placed[name].place) for name in expected} == expected
    assert asked.run.storage_path == str(project / "runs")
    assert "num_trials" not in asked.asked, "another command's"
    monkeypatch.setenv(layers.STORAGE_VARIABLE, str(project / "elsewhere"))
    assert job(monkeypatch=monkeypatch).run.storage_path == layers.storage_path() == str(project / "elsewhere")
    assert layers.storage_path("given") == "given"


def test_the_nearest_project_with_a_table_counts(project: Path) -> None:
    written(project.parent / "pyproject.toml", "[tool.mnist_ray]\nseed = 1\n")
    written(project / "pyproject.toml", "[tool.other]\nseed = 2\n")
    places, notes = layers.defaults()
    assert ([(place.name, place.values) for place in places], notes) == (
        [(str(project.parent / "pyproject.toml"), {"seed": 1})],
        [],
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_project_file_of_another_user_is_ignored_with_a_note(project: Path) -> None:
    file = written(project / "pyproject.toml", '[tool.mnist_ray]\nworkload = "steals.py"\n')
    os.chown(file, 12345, 12345)
    assert layers.defaults() == ([], [f"{file} belongs to another user: its settings are ignored"])
    Path(file).unlink()
    Path(file).symlink_to(written(project.parent / "own.toml", '[tool.mnist_ray]\nworkload = "steals.py"\n'))
    assert layers.defaults()[0] != []
    os.chown(project, 12345, 12345)  # relative paths start here
    assert layers.defaults() == ([], [f"{file} belongs to another user: its settings are ignored"])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.toml", 'learning_rate = 1e-3\nclip_grad_norm = "none"\nrun_name = "no"\nuse_gpu = false\n'),
        ("a.yaml", "learning_rate: 1e-3\nclip_grad_norm: none\nrun_name: no\nuse_gpu: no\n"),
        ("a.yml", "learning_rate: 0.001\nclip_grad_norm:\nrun_name: 'no'\nuse_gpu: false\n"),
        ("a.json", '{"learning_rate": 0.001, "clip_grad_norm": null, "run_name": "no", "use_gpu": "no"}'),
    ],
)
def test_each_format_has_numbers_texts_and_no_value(
    project: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str
) -> None:
    asked = job("--config", written(project / name, text), monkeypatch=monkeypatch)
    assert (asked.train.learning_rate, asked.train.clip_grad_norm) == (1e-3, None)
    assert (asked.run.name, asked.workers.use_gpu) == ("no", "no")


@pytest.mark.parametrize("name", ["settings.toml", "pyproject.toml"])
def test_paths_in_a_persons_file_start_at_the_file(project: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    code = f"of_{Path(name).stem}.py"
    written(project / code, WORKLOAD)
    text = f'workload = "{code}:Mine"\ndata_dir = "digits"\nstorage_path = "runs"\n'
    file = written(project / name, ("[tool.mnist_ray]\n" if name == "pyproject.toml" else "") + text)
    asked = job(*([] if name == "pyproject.toml" else ["--config", file]), monkeypatch=monkeypatch)
    assert (type(asked.workload).__name__, asked.values["data_dir"]) == ("Mine", str(project / "digits"))
    assert asked.run.storage_path == str(project / "runs")


@pytest.mark.parametrize("name", ["settings.toml", "settings.json"])
def test_a_file_that_names_another_storage_does_not_make_the_code_in_the_real_one_trusted(
    project: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    sent = project / "runs" / "sent"
    code = written(
        sent / "steals.py", WORKLOAD + "from pathlib import Path\nPath(__file__).with_name('it_ran').touch()\n"
    )
    values = {"workload": code, "storage_path": str(project / "elsewhere")}
    text = (
        json.dumps(values)
        if name.endswith("json")
        else "\n".join(f'{key} = "{value}"' for key, value in values.items())
    )
    monkeypatch.setenv(layers.STORAGE_VARIABLE, str(project / "runs"))
    for folder in (sent, project / "downloads"):
        with pytest.raises(UsageError, match="the code may have come with the run; if you trust it, name it with"):
            job("--config", written(folder / name, text), monkeypatch=monkeypatch)
    assert not (sent / "it_ran").exists()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.toml", "batch_size = 1\nbatch_size = 2\n", "is not TOML: Cannot overwrite a value"),
        ("a.toml", "[learning_rate]\npeak = 1\n", "--learning-rate must be of type float, not {'peak': 1}"),
        ("a.toml", "batch-size = 2\n", "has unknown settings: batch-size; did you mean batch_size?"),
        ("a.toml", "seed = 2026-01-01\n", "--seed must be of type int, not datetime.date"),
        ("a.toml", "batch_size = 0\n", "--batch-size must be at least 1, not 0"),
        ("a.yaml", "batch_size: 1\nbatch_size: 2\n", 'is not YAML: found duplicate key "batch_size"'),
        ("a.yaml", "1: 2\n", "must contain settings by their names"),
        ("a.yaml", "", "must contain settings by their names"),
        ("a.yaml", "a: !!python/object/apply:os.system ['id']\n", "is not YAML: could not determine a constructor"),
        ("a.yaml", "seed: 1\n---\nseed: 2\n", "is not YAML: but found another document (line 2)"),
        ("a.yaml", "seed: 1\ncallback: &a [*a]\n", "a.yaml: --callback must be FILE.py:NAME or a list of these"),
        ("a.yaml", 'workload: "a\\0b.py"\n', "a\x00b.py: embedded null byte"),
        ("a.yaml", "compile: yes\n", "--compile must be of type bool, not 'yes'"),
        ("a.yaml", "recipe: cake\n", "a.yaml: there is no recipe cake; known: default, notebook"),
        ("a.yaml", "config: b.yaml\n", "has unknown settings: config"),
        ("a.json", "[" * 100_000, "is not JSON: maximum recursion depth exceeded"),
        ("a.json", f'{{"workload": {"[" * 900}{"]" * 900}}}', "a.json: --workload must be of type str, not [[[["),
        ("a.toml", b"\xff\xfe", "is not TOML: 'utf-8' codec can't decode byte"),
        ("folder", None, "cannot read the settings file"),
        ("pyproject.toml", "[tool.mnist_ray]\nsede = 1\n", "has unknown settings: sede; did you mean seed?"),
        ("pyproject.toml", "[tool]\nmnist_ray = 1\n", "[tool.mnist_ray] of"),
        ("pyproject.toml", "[tool.mnist_ray]\nstorage_path = 5\n", "--storage-path must be of type str, not 5"),
    ],
)
def test_a_wrong_file_is_one_line(
    project: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str | bytes | None, message: str
) -> None:
    file = project / name
    if text is None:
        file.mkdir()
    else:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UsageError) as raised:
        job(*([] if name == "pyproject.toml" else ["--config", str(file)]), monkeypatch=monkeypatch)
    assert message in str(raised.value)
    assert name in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_command_on_a_run_takes_the_storage_from_the_project_but_not_the_workloads_settings(
    finished_run: Path, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = f'[tool.mnist_ray]\nstorage_path = "{finished_run.parent}"\ndata_dir = "nowhere"\n'
    written(project / "pyproject.toml", table)
    run_main("report", finished_run.name)
    assert capsys.readouterr().out == f"report {finished_run}/report.html\n"


def test_with_resume_auto_a_run_starts_goes_on_and_at_the_end_prints_its_result(
    tmp_path: Path, small_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--storage-path", str(tmp_path), "--num-workers", "0", "--data-dir", str(small_data), "--quiet"]
    flags += ["--resume", "auto", "--run-name", "run"]
    (tmp_path / "run").mkdir()  # killed before it had settings
    run_main("train", *flags, "--num-epochs", "1")
    first = (tmp_path / "run" / "result.json").read_text()
    (tmp_path / "run" / "result.json").unlink()
    run_main("train", *flags)
    capsys.readouterr()
    again = (tmp_path / "run" / "result.json").read_text()
    assert json.loads(again)["weights_sha256"] == json.loads(first)["weights_sha256"]
    run_main("train", *flags)
    said = capsys.readouterr().out
    assert said.startswith(f"test       loss {json.loads(first)['test_loss']:.4f}, accuracy ")
    assert (tmp_path / "run" / "result.json").read_text() == again
    (tmp_path / "other.toml").write_text("batch_size = 3")
    message = r"run was started with --batch-size 128, not 3 as in .*other\.toml; leave that out, or start another run"
    with pytest.raises(UsageError, match=message):
        run_main("train", *flags, "--config", str(tmp_path / "other.toml"))
    with pytest.raises(UsageError, match="there is no run of tune in"):
        run_main("tune", "--storage-path", str(tmp_path), "--resume", "auto", "--run-name", "run")
    with pytest.raises(UsageError, match="--resume needs --run-name NAME"):
        run_main("train", "--storage-path", str(tmp_path), "--resume", "auto")
