"""Puts a run behind an address, with a page to try it, on Ray Serve. docs/guides/predict.md describes the requests.

pip install -e '.[serve]'
serve run examples.serve:app run=RUN                     # http://127.0.0.1:8000; without run=, the newest run
serve run --non-blocking examples.serve:app run=NEXT     # in a Ray that stays: a new run takes over, no request fails
"""

import asyncio
import contextlib
import json
from pathlib import Path
from typing import Any

import click
import numpy as np
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic import BaseModel, ValidationError
from ray import serve

import mnist_ray
from mnist_ray.config import PredictionConfig
from mnist_ray.errors import JobError, UsageError, first_line

MAX_BYTES, MAX_INPUTS, MAX_READ_S = 8 * 2**20, 128, 30  # of a request, and until it has arrived
MAX_NUMBERS = 2**14  # of an input in JSON


class Arguments(BaseModel, extra="forbid"):
    """What ``serve run`` takes as ``name=value``, and deploy/rayservice.yaml as ``args``."""

    run: str | None = None  # a run or a checkpoint: its name, folder or URI; None: the newest run
    workload: str | None = None  # the workload's code, if it has moved
    storage_path: str | None = None
    max_batch_size: int = 64
    host: str | None = None  # to listen on, unless Serve runs already; None: this machine only
    port: int | None = None


async def inputs_of(request: Request) -> list[tuple[str, Any]]:
    """Return pairs (name, bytes) of a request's files, or pairs (place, value) of its JSON. Raises HTTPException."""
    given: Any = None
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        async with request.form(max_files=MAX_INPUTS, max_fields=0) as form:
            given = [(file.filename[:100], await file.read()) for _, file in form.multi_items()]
    elif kind == "application/json":
        try:
            document = await asyncio.to_thread(json.loads, await request.body())
        except (ValueError, RecursionError) as error:
            raise HTTPException(400, f"not JSON: {first_line(error)}") from None
        if isinstance(document, dict) and isinstance(document.get("inputs"), list):
            given = [(f"inputs[{index}]", value) for index, value in enumerate(document["inputs"])]
    else:
        raise HTTPException(415, "send files as multipart/form-data, or application/json")
    if not given or len(given) > MAX_INPUTS:
        raise HTTPException(422, f'send a form with files, or JSON {{"inputs": [...]}}: 1 to {MAX_INPUTS} inputs')
    return given


def decode(predictor: Any, content: Any) -> Any:
    """Turn a file or a value of JSON into an input. Raises UsageError and JobError."""
    if isinstance(content, dict):
        return {name: decode(predictor, value) for name, value in content.items()}
    decoded = predictor.decode(content)
    if not isinstance(content, (bytes, str)) and not (decoded.size <= MAX_NUMBERS and np.isfinite(decoded).all()):
        raise UsageError(f"not finite, or more than {MAX_NUMBERS:,} numbers")
    return decoded


# Without FastAPI's own pages, which load files from other hosts. Serve pickles the routes when it decorates the class:
# what they call must stand above it.
api = FastAPI(max_body_size=MAX_BYTES, openapi_url=None)


# A new run's replicas start before the old ones finish their requests and stop. Without a line for each request.
@serve.deployment(max_ongoing_requests=256, max_surge_percent=100, logging_config={"enable_access_log": False})
@serve.ingress(api)
class Server:
    """Answers requests. Inputs that arrive while a batch is computed are the next batch."""

    def __init__(self, source: dict[str, Any], max_batch_size: int, example: str) -> None:
        self.predictor = mnist_ray.load_predictor(**source)
        self.run = "/".join(self.predictor.checkpoint.split("/")[-2:])
        self.example = example
        self.decoding = asyncio.Semaphore(2)  # so that few large pictures are in memory at a time
        self.predict_batch.set_max_batch_size(max_batch_size)

    @api.get("/")
    def page(self) -> HTMLResponse:
        """Return the page."""
        about = json.dumps({"run": self.run, "takes": self.predictor.takes, "example": self.example})
        page = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
        return HTMLResponse(page.replace("ABOUT", about.replace("<", r"\u003c"), 1))

    @api.post("/predict")
    async def predict(self, request: Request) -> JSONResponse:
        """Return a prediction for each input, like ``mnist-ray predict --json``."""
        try:
            inputs = await asyncio.wait_for(inputs_of(request), MAX_READ_S)
        except TimeoutError:
            raise HTTPException(408, f"the request did not arrive within {MAX_READ_S} s") from None
        answers = await asyncio.gather(*(self.answer(*each) for each in inputs))
        try:
            return JSONResponse({"run": self.run, "predictions": answers})
        except ValueError:
            raise HTTPException(422, "a prediction is not a finite number; send other inputs") from None

    async def answer(self, place: str, content: Any) -> dict[str, Any]:
        """Return the prediction for an input. Raises HTTPException if there is none."""
        try:
            async with self.decoding:
                decoded = await asyncio.to_thread(decode, self.predictor, content)
            try:
                prediction = await self.predict_batch(decoded)
            except (UsageError, JobError):  # which may be about another input of the batch
                (prediction,) = await asyncio.to_thread(self.predictor.predict, [decoded])
        except (UsageError, JobError, RecursionError) as error:
            raise HTTPException(422, f"{place}: {first_line(error)}") from None
        return {**prediction.to_dict(PredictionConfig().threshold), "file": place}

    @serve.batch(batch_wait_timeout_s=0)
    async def predict_batch(self, inputs: list[Any]) -> list[Any]:
        """Return the predictions for the inputs that have arrived."""
        return await asyncio.to_thread(self.predictor.predict, inputs)


def app(arguments: dict[str, Any]) -> serve.Application:
    """Return the application. Loads the run first, so that a mistake changes nothing that is served."""
    try:
        given = Arguments(**arguments)
        source = given.model_dump(include={"run", "workload", "storage_path"})
        predictor = mnist_ray.load_predictor(**source)
    except ValidationError as error:
        (name, *_), message = error.errors()[0]["loc"], error.errors()[0]["msg"]
        raise click.ClickException(f"{name}={arguments[name]}: {message}") from error
    except (UsageError, JobError) as error:
        raise click.ClickException(first_line(error)) from error
    if listen := given.model_dump(include={"host", "port"}, exclude_none=True):
        serve.start(http_options=listen)
    if given.host not in (None, "127.0.0.1", "::1", "localhost"):
        click.echo(f"listens on {given.host}: whoever reaches this machine can use the model")
    example = json.dumps("The ")  # of a text
    if predictor.takes == "arrays":
        with contextlib.suppress(Exception):  # the data need not be here, and JSON need not be able to hold them
            example = json.dumps(np.asarray(predictor.workload.load_data().test[0][0]).tolist())
    return Server.bind({**source, "run": predictor.checkpoint}, given.max_batch_size, example)
