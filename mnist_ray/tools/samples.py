"""Small generated data for new projects. Their users replace them by their own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

_NUM_IMAGES, _SIZE = 30, 64  # of each class; pixels
_NUM_ROWS, _NUM_SENTENCES = 400, 800
_WORDS = {
    "animal": ["cat", "dog", "goat", "horse", "owl", "fox", "duck", "hen"],
    "verb": ["watches", "follows", "meets", "greets", "hears", "finds"],
    "place": ["in the garden", "by the river", "behind the barn", "on the hill", "at the market", "near the wood"],
}


def write_images(folder: Path) -> None:
    """Write images of three shapes, in a folder each."""
    rng = np.random.default_rng(0)
    for shape, num_sides in {"circle": 60, "square": 4, "triangle": 3}.items():
        (folder / shape).mkdir(parents=True)
        for number in range(_NUM_IMAGES):
            ground, colour = (tuple(rng.integers(low, low + 90, 3).tolist()) for low in (0, 160))
            image = Image.new("RGB", (_SIZE, _SIZE), ground)
            radius = rng.uniform(14, 22)
            x, y = rng.uniform(radius, _SIZE - radius, 2)
            ImageDraw.Draw(image).regular_polygon((x, y, radius), num_sides, fill=colour)
            image.save(folder / shape / f"{number:02d}.png")


def write_table(folder: Path) -> None:
    """Write a table of made-up flats and their prices."""
    rng = np.random.default_rng(0)
    area, age = rng.uniform(30, 150, _NUM_ROWS), rng.uniform(0, 80, _NUM_ROWS)
    rooms, distance = np.ceil(area / rng.uniform(20, 35, _NUM_ROWS)), rng.exponential(5, _NUM_ROWS)
    price = 3 * area + 15 * rooms - 0.8 * age + 150 * np.exp(-distance / 5) + rng.normal(0, 15, _NUM_ROWS)
    header = "area,rooms,age,distance,price"
    table = np.stack([area, rooms, age, distance, price], axis=1)
    np.savetxt(folder / "train.csv", table, "%.1f", ",", header=header, comments="")


def write_text(folder: Path) -> None:
    """Write sentences of random words."""
    rng = np.random.default_rng(0)

    def sentence() -> str:
        (who, whom), (verb, _), (place, _) = (rng.choice(words, 2) for words in _WORDS.values())
        return f"The {who} {verb} the {whom} {place}."

    (folder / "text.txt").write_text("\n".join(sentence() for _ in range(_NUM_SENTENCES)) + "\n", encoding="utf-8")


WRITERS = {"images": write_images, "table": write_table, "text": write_text}
"""What writes the data of a kind of project."""
