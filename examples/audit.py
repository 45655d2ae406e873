"""Find wrong labels and near duplicates in the training data, after a cross-validation.

    python jobs/train.py --folds 5 --run-name folds       # each example is predicted by a run that has not seen it
    python examples/audit.py folds --output audit         # pip install cleanlab scikit-learn

Writes ``audit.html``, with the examples as pictures, the most suspicious first, and ``audit.csv``, with a row for each:
change ``yes`` in its column ``leave_out`` to ``no`` for those that are right. Prints the lines that leave the others
out of ``Data``. For a ``Classification`` whose data are arrays. A duplicate that is shifted by a pixel is not found.
"""

import argparse
import base64
import csv
import html
import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
from cleanlab.filter import find_label_issues
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors

from mnist_ray import load_run

MAX_SHOWN, NUM_COMPONENTS = 400, 32
NEAR = 0.13  # of the median distance to the nearest neighbour: cleanlab's own threshold for near duplicates
STYLE = """:root { color-scheme: light dark }
body { font: 1rem system-ui; max-width: 72rem; margin: auto; padding: 1rem }
figure { display: inline-block; margin: .4rem; width: 8rem; vertical-align: top; font-size: .85rem }
img { width: 6rem; image-rendering: pixelated }"""


class Finding(NamedTuple):
    """A row of audit.csv."""

    place: int  # in the training data
    kind: str  # label, duplicate, or in test: a near duplicate of a test example
    label: str
    suggestion: str  # another label, or the place of the duplicate
    leave_out: str


def near_duplicates(inputs: np.ndarray) -> list[tuple[int, int]]:
    """Return pairs (earlier, later) of examples that are much closer to each other than neighbours usually are."""
    flat = inputs.reshape(len(inputs), -1).astype(np.float32)
    small = PCA(min(NUM_COMPONENTS, *flat.shape), random_state=0).fit_transform(flat)  # finds the neighbours faster
    neighbours = NearestNeighbors(n_neighbors=1).fit(small).kneighbors(return_distance=False)[:, 0]
    distances = np.linalg.norm(flat - flat[neighbours], axis=1)
    near = np.flatnonzero(distances <= NEAR * np.median(distances))
    return sorted({(min(pair), max(pair)) for pair in zip(near.tolist(), neighbours[near].tolist(), strict=True)})


def find_all(run, train, test) -> list[Finding]:
    """Return what is wrong in a cross-validation's training data: labels, the most suspicious first, then duplicates.

    Labels are found by confident learning (Northcutt, Jiang and Chuang, https://arxiv.org/abs/1911.00068).
    """
    found, columns, names = [], run.predictions, run.workload.class_names
    for row in find_label_issues(
        columns["label"], columns["probabilities"], return_indices_ranked_by="self_confidence"
    ):
        label, better = (str(names[columns[name][row]]) for name in ("label", "prediction"))
        found.append(Finding(int(columns["index"][row]), "label", label, better, "yes"))
    for first, second in near_duplicates(np.concatenate([train.inputs, test.inputs])):
        if first < len(train):  # two test examples are no concern of the training
            place, other = (first, second - len(train)) if second >= len(train) else (second, first)
            kind = "in test" if second >= len(train) else "duplicate"
            found.append(Finding(place, kind, str(names[train.targets[place]]), f"of {other}", "yes"))
    return found


def image_of(picture: np.ndarray | None) -> str:
    """Return an HTML element; none if the inputs cannot be shown."""
    if picture is None:
        return ""
    content = io.BytesIO()
    Image.fromarray(picture).save(content, "png")
    return f"<img src='data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}' alt=''>"


def page_of(workload, train, found: list[Finding]) -> str:
    """Return audit.html."""
    parts = [
        f"<!doctype html><meta name=viewport content='width=device-width'><title>audit</title><style>{STYLE}</style>"
    ]
    for kind, title in {"label": "Labels", "duplicate": "Duplicates", "in test": "Duplicates of test examples"}.items():
        rows = [finding for finding in found if finding.kind == kind]
        parts.append(f"<h1>{title}: {len(rows):,}</h1>")
        for finding in rows[:MAX_SHOWN]:
            said = f"{finding.place}: {finding.label}, {'perhaps ' * (kind == 'label')}{finding.suggestion}"
            image = image_of(workload.as_picture(train.inputs[finding.place]))
            parts.append(f"<figure>{image}<figcaption>{html.escape(said)}</figcaption></figure>")
    return "\n".join(parts)


def main() -> None:
    """Write the findings, and print how to leave them out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run with --folds: its name or folder")
    parser.add_argument("--storage-path", help="where the run is, as in train.py")
    parser.add_argument("--output", type=Path, default=Path("audit"))
    args = parser.parse_args()
    run = load_run(args.run, storage_path=args.storage_path)
    if not {"fold", "probabilities"} <= run.predictions.keys():
        parser.error(f"{run.name} is no cross-validation of a classification; train with --folds 5")
    data = run.workload.load_data()
    found, table = find_all(run, data.train, data.test), args.output / "audit.csv"
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "audit.html").write_text(page_of(run.workload, data.train, found), encoding="utf-8")
    with table.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([Finding._fields, *found])
    print(f"{len(found):,} findings in {table}; look at {args.output / 'audit.html'}. To leave them out of Data:")
    print(f"    places = [int(r['place']) for r in csv.DictReader(open({str(table)!r})) if r['leave_out'] == 'yes']")
    print("    train = Arrays(np.delete(inputs, places, 0), np.delete(targets, places, 0))")


if __name__ == "__main__":
    main()
