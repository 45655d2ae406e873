"""Compare predictions at scale with a plain loop, and kill them at random moments.

    python benchmarks/predicting.py                    # both, on two cores: about 20 minutes
    python benchmarks/predicting.py --parts kills --kills 20 --seed 0

Guards that `predict --input` has at least 0.9 of a plain loop's images/s for each core, and that after any kill each
row is there once, with an undisturbed run's bits. The input is MNIST's 60,000 training images, as PNG files and as
PNG in Parquet. The plain loop reads with Pillow, calls the model of `load_run` in batches of 64 on one thread, and
writes Parquet; on two cores, two such loops share the files. `alike` is the same loop with the model's weights in the
layout that `predict` and evaluations use. The programs alternate in three rounds; the start of Python and Ray does
not count. A kill is SIGKILL to the command or, every other time, to one of its actors.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import torch
from PIL import Image
from pyarrow import parquet as pq

import mnist_ray
from mnist_ray.data.tensors import with_fast_layout
from mnist_ray.mnist import idx

ROOT = Path(__file__).parent.parent
NUM_IMAGES, NUM_TABLES, BATCH_SIZE = 60_000, 20, 64
MARK = "PREDICTING_BENCHMARK"  # in the environment of all processes of a command


def write_input(folder: Path) -> None:
    """Write the images as files and as Parquet."""
    images = idx.load("train").inputs[:NUM_IMAGES]
    for name in ("png", "parquet"):
        (folder / name).mkdir()
    for table in np.array_split(np.arange(len(images)), NUM_TABLES):
        cells = []
        for number in table:
            file = folder / "png" / f"{number:05}.png"
            Image.fromarray(images[number]).save(file)
            cells.append({"bytes": file.read_bytes()})
        pq.write_table(pa.table({"id": table, "image": cells}), folder / "parquet" / f"{table[0]:05}.parquet")


def loop(kind: str, folder: Path, share: int, shares: int, is_alike: bool) -> float:
    """Predict a share of the input by a plain loop; return the seconds."""
    torch.set_num_threads(1)
    run = mnist_ray.load_run("mnist", storage_path=folder / "runs")
    workload, model = run.workload, run.load_model()
    model = with_fast_layout(model) if is_alike else model
    output = str(folder / f"loop{share}.parquet")
    start = time.perf_counter()
    writer = None

    def write(pictures: list[Any], rows: pa.Table) -> None:
        nonlocal writer
        inputs = torch.from_numpy(np.stack([workload.read_picture(Image.open(picture)) for picture in pictures]))
        with torch.inference_mode():
            probabilities = model(workload.prepare(inputs, None)).softmax(1)
        best = probabilities.max(1)
        rows = rows.append_column("prediction", pa.array(best.indices.numpy()))
        rows = rows.append_column("probability", pa.array(best.values.numpy()))
        lists = pa.FixedSizeListArray.from_arrays(pa.array(probabilities.numpy().ravel()), 10)
        rows = rows.append_column("probabilities", lists)
        writer = writer or pq.ParquetWriter(output, rows.schema)
        writer.write_table(rows)

    files = sorted((folder / kind).iterdir())
    if kind == "png":
        for at in range(share * BATCH_SIZE, len(files), shares * BATCH_SIZE):
            some = [str(file) for file in files[at : at + BATCH_SIZE]]
            write(some, pa.table({"file": some}))
    else:
        for file in files[share::shares]:
            for batch in pq.ParquetFile(file).iter_batches(BATCH_SIZE):
                table = pa.Table.from_batches([batch])
                write([io.BytesIO(cell["bytes"]) for cell in table["image"].to_pylist()], table)
    if writer is not None:
        writer.close()
    return time.perf_counter() - start


def loop_rate(kind: str, folder: Path, cores: int, is_alike: bool) -> float:
    """Return the images/s of as many plain loops as there are cores."""
    arguments = [(kind, folder, share, cores, is_alike) for share in range(cores)]
    with multiprocessing.get_context("spawn").Pool(cores) as processes:
        return NUM_IMAGES / max(processes.starmap(loop, arguments))


def command(kind: str, folder: Path, output: Path, *flags: str) -> subprocess.Popen[str]:
    """Start the command."""
    words = [
        "-m",
        "mnist_ray",
        "predict",
        "--run",
        "mnist",
        "--storage-path",
        folder / "runs",
        "--input",
        folder / kind,
    ]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": ROOT}
    environment = {**os.environ, MARK: str(os.getpid())}
    return subprocess.Popen([sys.executable, *map(str, words), "--output", output, *flags], env=environment, **pipes)


def command_rate(kind: str, folder: Path, cores: int) -> float:
    """Return the images/s of the command with an actor for each core, from the end of the first part on."""
    output = folder / "output"
    shutil.rmtree(output, ignore_errors=True)
    said, _ = command(kind, folder, output, "--num-actors", str(cores)).communicate()
    first, *others = sorted((output / "_done").rglob("*.json"), key=lambda file: file.stat().st_mtime)
    assert others, said
    seconds = others[-1].stat().st_mtime - first.stat().st_mtime
    return float(sum(json.loads(file.read_text())["rows"] for file in others) / seconds)


def compare(folder: Path) -> None:
    """Print the rates of the rounds, and their medians."""
    print("| input | cores | predict: images/s | loop | alike | predict / loop | predict / alike |")
    print("|---|---|---|---|---|---|---|")
    usable = sorted(os.sched_getaffinity(0))
    for kind in ("png", "parquet"):
        for cores in (1, 2):
            os.sched_setaffinity(0, usable[:cores])  # also of the processes that this one starts
            rounds = []
            for _ in range(3):
                plain, alike = (loop_rate(kind, folder, cores, is_alike) for is_alike in (False, True))
                rounds.append((command_rate(kind, folder, cores), plain, alike))
                rounds[-1] = (*rounds[-1], rounds[-1][0] / plain, rounds[-1][0] / alike)  # type: ignore[assignment]
            *rates, to_plain, to_alike = (statistics.median(values) for values in zip(*rounds, strict=True))
            shown = " | ".join(f"{rate:,.0f}" for rate in rates)
            each = [" ".join(f"{values[at]:.2f}" for values in rounds) for at in (3, 4)]
            ratios = f"{to_plain:.2f} ({each[0]}) | {to_alike:.2f} ({each[1]})"
            print(f"| {kind} | {cores} | {shown} | {ratios} |", flush=True)
    os.sched_setaffinity(0, usable)


def rows_of(output: Path) -> pa.Table:
    """Return the predictions, sorted."""
    return pq.read_table(output).sort_by("file")


def is_of(process: psutil.Process) -> bool:
    """Return whether a process is one of this benchmark's actors."""
    try:
        is_own = process.environ().get(MARK) == str(os.getpid())
        return is_own and " ".join(process.cmdline()).startswith("ray::MapWorker")
    except psutil.Error:
        return False


def kill(folder: Path, number: int, seed: int) -> None:
    """Kill commands and actors; compare the rows with an undisturbed run's."""
    chance, output, undisturbed = random.Random(seed), folder / "killed", folder / "undisturbed"
    begun = time.monotonic()
    said, _ = command("png", folder, undisturbed).communicate()
    whole_s, expected = time.monotonic() - begun, rows_of(undisturbed)
    assert expected.num_rows == NUM_IMAGES, said
    kills = of_actors = finished = equal = 0
    while kills < number or output.exists():
        running = command("png", folder, output)
        if kills < number:
            try:
                said, _ = running.communicate(timeout=chance.uniform(1, whole_s))
            except subprocess.TimeoutExpired:
                actors = [process for process in psutil.process_iter() if kills % 2 and is_of(process)]
                if actors:
                    chance.choice(actors).kill()
                    of_actors += 1
                else:
                    running.send_signal(signal.SIGKILL)
                kills += 1
        said, _ = running.communicate()
        if running.returncode == 0:  # an actor was killed, or nothing
            rows = rows_of(output)
            done = [json.loads(file.read_text())["rows"] for file in (output / "_done").rglob("*.json")]
            is_equal = rows.equals(expected) and sum(done) == NUM_IMAGES and not (output / "_temporary").exists()
            finished, equal = finished + 1, equal + is_equal
            print(f"{kills} kills so far: {rows.num_rows:,} rows, {'equal' if is_equal else 'DIFFERENT'}", flush=True)
            shutil.rmtree(output)
        elif running.returncode != -signal.SIGKILL:
            print(f"exit {running.returncode}: {said}")
    print(f"{kills} kills, {of_actors} of them of actors: {equal} of {finished} finished outputs are equal")


def main() -> None:
    """Write the input, train a run, compare and kill."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=("rates", "kills"), default=["rates", "kills"])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_input(folder)
        mnist_ray.train(storage_path=folder / "runs", run_name="mnist", num_steps=100, num_workers=0, quiet=True)
        if "rates" in options.parts:
            compare(folder)
        if "kills" in options.parts:
            kill(folder, options.kills, options.seed)


if __name__ == "__main__":
    main()
