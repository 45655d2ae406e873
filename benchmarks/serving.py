"""Measure examples/serve.py: its speed, a new run that takes over, and odd requests.

    python benchmarks/serving.py                          # 7 minutes on two cores; needs pip install -e '.[serve]'
    python benchmarks/serving.py --parts odd              # about a minute

Guards what docs/guides/predict.md promises. All requests come from this process, over the loopback.

speed: a PNG of a digit in a form, from 1, 8 and 64 clients that each wait for an answer before they ask again. A bare
FastAPI application with the same model, serve.py, and serve.py with batches of one take turns, some seconds each.
takeover: 10,000 requests from 8 clients, while another run is deployed. odd: 300 requests with something wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib
import io
import json
import os
import random
import re
import socket
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import ray
from fastapi import FastAPI, UploadFile
from PIL import Image
from ray import serve

import mnist_ray
from mnist_ray.mnist import idx

ROOT = Path(__file__).parent.parent
RUN = "SERVED_RUN"  # the environment variable that names the bare application's run
CLIENTS = (1, 8, 64)
NUM_TAKEOVER, NUM_ODD = 10_000, 300


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
JSON = {"content-type": "application/json"}


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


def png_of_size(width: int, height: int, content: bytes) -> bytes:
    """Return a grey PNG whose header has a size, and whose compressed pixels are ``content``."""
    chunks = {
        b"IHDR": struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0),
        b"IDAT": zlib.compress(content),
        b"IEND": b"",
    }
    packed = [struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks.items()]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def odd_requests() -> Iterator[tuple[str, str, str, dict[str, str], bytes]]:
    """Yield kind, method, path, headers and body of requests with something wrong."""
    rng, digit = random.Random(0), idx.load("test").inputs[0]
    values = [
        "NaN",
        "-Infinity",
        "1e999",
        "1e39",
        "1" * 5000,
        "null",
        "true",
        '"7"',
        "{}",
        "[]",
        "[[]]",
        "[1, [2]]",
        "{",
    ]
    values += ["[" * depth for depth in (10, 1000, 100_000, 4_000_000)] + ['{"a":' * 1000, "[" * 60 + "]" * 60]
    values += [
        json.dumps(np.zeros(shape).tolist()) for shape in ((1,), (28,), (27, 28), (28, 28, 1), (28, 28, 3), (200, 200))
    ]
    values += [json.dumps((digit.astype(object) * factor).tolist()) for factor in (-1e30, 1e38, 2**62)]
    for value in values:
        yield "JSON value", "POST", "/predict", JSON, f'{{"inputs": [{value}]}}'.encode()
    document = json.dumps({"inputs": [digit.tolist()]}).encode()
    for _ in range(50):
        yield "cut JSON", "POST", "/predict", JSON, document[: rng.randrange(len(document))]
    for whole in (
        b"",
        b"null",
        b"[]",
        b"7",
        b'"a"',
        b'{"input": [1]}',
        b'{"inputs": {}}',
        b'{"inputs": []}',
        b"\xff\xfe",
    ):
        yield "JSON without inputs", "POST", "/predict", JSON, whole
    yield "many inputs", "POST", "/predict", JSON, json.dumps({"inputs": [0] * 100_000}).encode()
    noise = np.random.default_rng(0).integers(0, 255, (90, 90), np.uint8)
    for kind in ("png", "jpeg", "gif", "bmp", "tiff", "webp"):
        whole = picture_of(noise, kind)
        for _ in range(8):
            yield f"cut {kind}", "POST", "/predict", FORM, form_of(whole[: rng.randrange(len(whole))])
        for _ in range(8):
            changed = bytearray(whole)
            for _ in range(20):
                changed[rng.randrange(len(changed))] = rng.randrange(256)
            yield f"changed {kind}", "POST", "/predict", FORM, form_of(bytes(changed))
    for size in ((50_000, 50_000), (2**31 - 1, 1), (1, 10**6), (0, 0), (13_000, 13_000), (9_000, 9_000)):
        yield "bomb", "POST", "/predict", FORM, form_of(png_of_size(*size, bytes(min(10**8, size[1] * (size[0] + 1)))))
    for file in (
        b"",
        b"PK\x03\x04" + zlib.compress(bytes(10**8)),
        b"<svg/>",
        b"%PDF-1.7",
        b"%!PS\nquit",
        b"GIF89a",
        bytes(10**6),
    ):
        yield "no picture", "POST", "/predict", FORM, form_of(file)
    good = form_of(picture_of(255 - digit))
    for kind in (
        "",
        "text/plain",
        "image/png",
        "application/xml",
        "multipart/form-data",
        "application/json; charset=x",
        "a" * 5000,
    ):
        yield "type", "POST", "/predict", {"content-type": kind}, good
    for form in (
        b"",
        b"--x",
        good[:50],
        good[:-8],
        good.replace(b"filename", b"name"),
        good.replace(b'"file"', b'"' + b"f" * 10**5),
    ):
        yield "form", "POST", "/predict", FORM, form
    yield "many files", "POST", "/predict", FORM, form_of(*[picture_of(255 - digit)] * 500)
    for name in ("a" * 10_000, "../../etc/passwd", "\\x00.png", "é\n.png"):
        yield "file name", "POST", "/predict", FORM, form_of(b"none", name=name)
    for method, path in (
        ("GET", "/predict"),
        ("PUT", "/predict"),
        ("DELETE", "/"),
        ("POST", "/"),
        ("GET", "/../../etc/passwd"),
    ):
        yield "path", method, path, JSON, b""
    for num_bytes in (8 * 2**20 + 1, 100 * 2**20):
        yield "huge", "POST", "/predict", JSON, b" " * num_bytes
    while True:
        yield "random bytes", "POST", "/predict", rng.choice([JSON, FORM]), rng.randbytes(rng.randrange(1, 5000))


async def slow_client(address: str, sent: bytes, seconds: float) -> int:
    """Send the start of a request, then nothing; return the answer's status, or 0 if none comes in time."""
    url = httpx.URL(address)
    reader, writer = await asyncio.open_connection(url.host, url.port)
    writer.write(sent)
    try:
        return int((await asyncio.wait_for(reader.readline(), seconds)).split()[1])
    except (TimeoutError, IndexError):
        return 0
    finally:
        writer.close()


def measure_odd(address: str, body: bytes) -> None:
    """Send odd requests, eight at a time, beside clients that send half of a request; print the answers' statuses."""
    own = psutil.Process().children(recursive=True)
    (replica,) = [process for process in own if "ServeReplica:default" in " ".join(process.cmdline())]
    before, most = replica.memory_info().rss, 0
    seen, bad = Counter[tuple[str, int]](), list[str]()
    half = request_for(address, body)[2][:-100]

    async def all_of_them() -> list[int]:
        nonlocal most
        slow = [asyncio.create_task(slow_client(address, sent, 40)) for sent in [half] * 10 + [half[:30]] * 10]
        odd, busy = odd_requests(), asyncio.Semaphore(8)
        async with httpx.AsyncClient(timeout=60) as client:

            async def send(kind: str, method: str, path: str, headers: dict[str, str], content: bytes) -> None:
                nonlocal most
                async with busy:
                    answer = await client.request(method, address + path, headers=headers, content=content)
                most = max(most, replica.memory_info().rss)
                seen[kind, answer.status_code] += 1
                if answer.status_code >= 500 or "\n" in answer.text:
                    bad.append(f"{kind}: {answer.status_code} {answer.text[:200]!r}")

            await asyncio.gather(*(send(*next(odd)) for _ in range(NUM_ODD - len(slow))))
        return await asyncio.gather(*slow)

    slow = asyncio.run(all_of_them())
    for kind in dict.fromkeys(kind for kind, _ in seen):
        print(f"{kind}: {', '.join(f'{status} × {count}' for (of, status), count in seen.items() if of == kind)}")
    print(f"half of a body: {dict(Counter(slow[:10]))}; half of a header: {dict(Counter(slow[10:]))} (0: none in 40 s)")
    last = [status for status, _, _ in asyncio.run(load(address, body, 1, iter([True, False]).__next__))]
    print(f"odd: {seen.total() + len(slow)} requests; 5xx or several lines: {bad or 'none'}; then a good one: {last}")
    print(
        f"replica: the same process: {replica.is_running()}; {before / 2**20:,.0f} MiB, at most {most / 2**20:,.0f} MiB"
    )


def main() -> None:
    """Parse the flags, train two small runs, serve and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--parts", nargs="+", choices=["speed", "takeover", "odd"], default=["speed", "takeover", "odd"]
    )
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
        if "odd" in flags.parts:
            measure_odd(address, body)
        if "takeover" in flags.parts:
            measure_takeover(address, body, lambda: deploy("next"))


if __name__ == "__main__":
    main()
