from pathlib import Path

from mnist_ray.config import RUN_SETTINGS
from mnist_ray.runs.launch import open_run


def test_runs_without_a_name_that_begin_in_the_same_second_have_folders_of_their_own(tmp_path: Path) -> None:
    names = {open_run({"storage_path": str(tmp_path)}, "train", "config.json", RUN_SETTINGS)[1].name for _ in range(5)}
    assert len(names) > len({name.rpartition("_")[0] for name in names})
    assert not any(tmp_path.iterdir())
