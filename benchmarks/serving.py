"""Measure examples/serve.py: its speed, and a new run that takes over.

    python benchmarks/serving.py                          # 6 minutes on two cores; needs pip install -e '.[serve]'

Guards what docs/guides/predict.md promises. All requests come from this process, over the loopback.

speed: a PNG of a digit in a form, from 1, 8 and 64 clients that each wait for an answer before they ask again. A bare
FastAPI application with the same model, serve.py, and serve.py with batches of one take turns, some seconds each.
takeover: 10,000 requests from 8 clients, while another run is deployed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib
import io
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import ray
from fastapi import FastAPI, UploadFile
from PIL import Image
from ray import serve

import mnist_ray
from mnist_ray.mnist import idx

ROOT = Path(__file__).parent.parent
RUN = "SERVED_RUN"  # the environment variable that names the bare application's run
CLIENTS = (1, 8, 64)
NUM_TAKEOVER = 10_000


def bare() -> FastAPI:
    """Return an application that answers each request alone, as FastAPI's tutorial would."""
    predictor, api = mnist_ray.load_predictor(os.environ[RUN]), FastAPI()

    @api.post("/predict")
    def predict(file: UploadFile) -> dict[str, Any]:
        (prediction,) = predictor.predict([predictor.decode(file.file.read())])
        return prediction.to_dict(0.8)

    return api


def form_of(*files: bytes, name: str = "a.png", boundary: str = "x") -> bytes:
    """Return a form with files."""
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="{name}"\r\n\r\n'.encode()
    return b"".join(head + file + b"\r\n" for file in files) + f"--{boundary}--\r\n".encode()


def picture_of(pixels: np.ndarray, kind: str = "png") -> bytes:
    """Return an image file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


FORM = {"content-type": "multipart/form-data; boundary=x"}


def request_for(address: str, body: bytes) -> tuple[str, int, bytes]:
    """Return host, port and the bytes of a request to an address."""
    url = httpx.URL(f"{address}/predict")
    head = f"POST {url.path} HTTP/1.1\r\nHost: {url.host}\r\nContent-Type: {FORM['content-type']}\r\n"
    return url.host, url.port or 80, f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


async def ask(address: str, body: bytes, goes_on: Any) -> AsyncIterator[tuple[int, float, bytes]]:
    """Yield status, seconds and body of the answers to requests on one connection: cheaper than a client library."""
    host, port, request = request_for(address, body)
    reader, writer = await asyncio.open_connection(host, port)
    while goes_on():
        start = time.perf_counter()
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head)
        answer = await reader.readexactly(int(length[1])) if length else b""
        yield int(head.split()[1]), time.perf_counter() - start, answer
    writer.close()


async def load(address: str, body: bytes, clients: int, goes_on: Any) -> list[tuple[int, float, bytes]]:
    """Return all answers that a number of clients get."""

    async def client() -> list[tuple[int, float, bytes]]:
        return [answer async for answer in ask(address, body, goes_on)]

    return [answer for answers in await asyncio.gather(*(client() for _ in range(clients))) for answer in answers]


def measure_speed(addresses: dict[str, str], body: bytes, rounds: int, seconds: float) -> None:
    """Print percentiles and rates: medians over the rounds."""
    found: dict[tuple[int, str], list[tuple[float, float, float]]] = {}
    for clients in CLIENTS:
        for number in range(rounds + 1):  # the first one warms up
            for name, address in addresses.items():
                end = time.perf_counter() + seconds
                answers = asyncio.run(load(address, body, clients, lambda end=end: time.perf_counter() < end))
                assert {status for status, _, _ in answers} == {200}
                times = np.array([taken for _, taken, _ in answers])
                row = (*(np.percentile(times, [50, 99]) * 1000), len(times) / seconds)
                found.setdefault((clients, name), []).extend([row] * bool(number))
    print("| clients | server | p50, ms | p99, ms | requests/s | requests/s / bare |\n|---|---|---|---|---|---|")
    for (clients, name), rows in found.items():
        p50, p99, rate = np.median(rows, axis=0)
        ratios = [row[2] / peer[2] for row, peer in zip(rows, found[clients, "bare FastAPI"], strict=True)]
        spread = f"{np.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"| {clients} | {name} | {p50:.1f} | {p99:.1f} | {rate:.0f} | {spread} |")


def measure_takeover(address: str, body: bytes, deploy: Any) -> None:
    """Ask while another run is deployed, a third of the requests in."""
    left = iter(range(NUM_TAKEOVER))

    async def both() -> list[tuple[int, float, bytes]]:
        asking = asyncio.create_task(load(address, body, 8, lambda: next(left, None) is not None))
        await asyncio.sleep(3)
        await asyncio.to_thread(deploy)
        return await asking

    answers = asyncio.run(both())
    seen = Counter((status, json.loads(answer)["run"].split("/")[0]) for status, _, answer in answers)
    times = [taken * 1000 for _, taken, _ in answers]
    print(f"takeover: {len(answers):,} requests; (status, run): {dict(seen)}", end="; ")
    print(f"p50 {np.percentile(times, 50):.0f} ms, p99 {np.percentile(times, 99):.0f} ms, longest {max(times):.0f} ms")


def main() -> None:
    """Parse the flags, train two small runs, serve and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=["speed", "takeover"], default=["speed", "takeover"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each round, server and number of clients")
    flags = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    example = importlib.import_module("examples.serve")
    body = form_of(picture_of(255 - idx.load("test").inputs[0]))
    with tempfile.TemporaryDirectory() as storage, contextlib.ExitStack() as stack:
        for name in ("first", "next"):
            mnist_ray.train(num_workers=0, limit=0.1, num_epochs=1, storage_path=storage, run_name=name, quiet=True)
        ports = []
        for _ in range(2):
            with socket.socket() as found:
                found.bind(("127.0.0.1", 0))
                ports.append(found.getsockname()[1])
        ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
        stack.callback(ray.shutdown)

        def deploy(run: str, name: str = "default", **options: Any) -> None:
            given = {"run": f"{storage}/{run}", **options}
            serve.run(example.app(given), name=name, route_prefix="/" if name == "default" else f"/{name}")

        deploy("first", port=ports[0])
        address = f"http://127.0.0.1:{ports[0]}"
        if "speed" in flags.parts:
            deploy("first", "single", max_batch_size=1)
            command = [sys.executable, "-m", "uvicorn", "serving:bare", "--factory", "--port", str(ports[1])]
            env = {**os.environ, RUN: f"{storage}/first", "OMP_NUM_THREADS": "1"}  # as in a replica with one CPU
            server = subprocess.Popen([*command, "--log-level", "warning"], cwd=Path(__file__).parent, env=env)
            stack.callback(server.wait)
            stack.callback(server.terminate)
            peer = f"http://127.0.0.1:{ports[1]}"
            while True:
                with contextlib.suppress(httpx.ConnectError):
                    httpx.get(peer)
                    break
                time.sleep(0.1)
            servers = {"bare FastAPI": peer, "serve.py": address, "serve.py, no batches": f"{address}/single"}
            measure_speed(servers, body, flags.rounds, flags.seconds)
            serve.delete("single")
        if "takeover" in flags.parts:
            measure_takeover(address, body, lambda: deploy("next"))


if __name__ == "__main__":
    main()
