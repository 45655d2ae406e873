"""Read images with mosaicml-streaming or litdata, in a Python that has both.

    python benchmarks/peers/streams.py write KIND IMAGES.npz FOLDER              # about 10 s on two cores
    python benchmarks/peers/streams.py read KIND s3://… CACHE STEPS_DONE         # about 15 s

Guards, in blocks.py, the reading of data in blocks beside that of other loaders.

RANK and WORLD_SIZE say which part to read. Prints JSON: seconds until the first batch and in all, and a digest of each
image of each step.
"""

import hashlib
import itertools
import json
import os
import sys
import time
from typing import Any

import numpy as np

BATCH_SIZE, SHARD_BYTES = 128, 200_000
RANK, WORLD_SIZE = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))


def write(kind: str, file: str, folder: str) -> None:
    """Write the images and labels of a file in a library's format."""
    arrays = np.load(file)
    pairs = [(image.tobytes(), int(label)) for image, label in zip(arrays["inputs"], arrays["targets"], strict=True)]
    if kind == "mosaicml-streaming":
        from streaming import MDSWriter

        columns = {"image": "bytes", "label": "int"}
        with MDSWriter(out=folder, columns=columns, size_limit=SHARD_BYTES) as out:
            for image, label in pairs:
                out.write({"image": image, "label": label})
        return
    from litdata.streaming import Cache

    cache = Cache(folder, chunk_bytes=SHARD_BYTES)
    for index, (image, label) in enumerate(pairs):
        cache[index] = {"image": np.frombuffer(image, np.uint8), "label": label}
    cache.done()
    cache.merge()


def loader_of(kind: str, remote: str, local: str, state: Any = None) -> Any:
    """Return a loader of a rank's batches, from a state on."""
    size = BATCH_SIZE // WORLD_SIZE
    if kind == "mosaicml-streaming":
        from streaming import StreamingDataLoader, StreamingDataset

        options: Any = {"shuffle": True, "shuffle_seed": 0, "num_canonical_nodes": 8}
        loader: Any = StreamingDataLoader(
            StreamingDataset(remote=remote, local=local, batch_size=size, **options), batch_size=size
        )
    else:
        from litdata import StreamingDataLoader as LitLoader
        from litdata import StreamingDataset as LitDataset

        others: Any = {"shuffle": True, "seed": 0, "storage_options": {"endpoint_url": os.environ["S3_ENDPOINT_URL"]}}
        loader = LitLoader(LitDataset(remote, cache_dir=local, **others), batch_size=size)
    if state is not None:
        loader.load_state_dict(state)
    return loader


def main() -> None:
    """Do what the command line says."""
    action, kind, *rest = sys.argv[1:]
    if action == "write":
        write(kind, *rest)
        return
    remote, local, steps_done = rest
    state = None
    if int(steps_done):
        before = loader_of(kind, remote, local)
        for _ in itertools.islice(before, int(steps_done)):
            pass
        state = before.state_dict()
        del before
        os.rename(local, f"{local}-before")  # as on another node
    begun, first_s, steps = time.perf_counter(), 0.0, []
    for batch in loader_of(kind, remote, local, state):
        first_s = first_s or time.perf_counter() - begun
        contents = [image if isinstance(image, bytes) else bytes(np.asarray(image)) for image in batch["image"]]
        steps.append([hashlib.sha256(content).hexdigest()[:8] for content in contents])
    seconds = time.perf_counter() - begun
    print(json.dumps({"first_s": first_s, "images": sum(map(len, steps)), "seconds": seconds, "steps": steps}))


if __name__ == "__main__":
    main()
