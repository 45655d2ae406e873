"""Make the tutorials' pictures from the runs and files that their commands have left. Needs Chromium.

python docs/learn/make_pictures.py ~/ray_results PATH/TO/pets
"""

from __future__ import annotations

import base64
import io
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

HERE = Path(__file__).parent
WIDTH = 900  # pixels
CHROMIUM = ("chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars")


def main(storage: Path, project: Path) -> None:
    """Write all pictures beside this file."""
    take(storage / "first" / "report.html", HERE / "report.png", height=900)
    for run, name in {"first": "mistakes.png", "small": "pets_mistakes.png"}.items():
        shrink(image_in(storage / run / "report.html", "The most confident mistakes"), HERE / name)
    for source, name in {"view.png": "pets.png", "seen.png": "seen.png"}.items():
        shrink(Image.open(project / source), HERE / name)


def image_in(page: Path, title: str) -> Image.Image:
    """Return a report's image below a title."""
    found = re.search(rf'<h2>{title}</h2>\s*<img [^>]*src="data:image/png;base64,([^"]*)"', page.read_text())
    assert found is not None, f"{page} has no {title}"
    return Image.open(io.BytesIO(base64.b64decode(found[1])))


def take(page: Path, picture: Path, height: int) -> None:
    """Write what a browser shows of the top of a page."""
    with tempfile.TemporaryDirectory() as profile:
        taken = Path(profile, "taken.png")
        options = [f"--user-data-dir={profile}", f"--screenshot={taken}", f"--window-size={WIDTH},{height}"]
        command = [*CHROMIUM, "--disable-background-networking", *options, page.resolve().as_uri()]
        subprocess.run(command, check=True, capture_output=True)
        shrink(Image.open(taken), picture)


def shrink(source: Image.Image, picture: Path) -> None:
    """Write an image on white, with at most ``WIDTH`` pixels in a row and 128 colours."""
    image = source.convert("RGBA")
    on_white = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    on_white.thumbnail((WIDTH, 10 * WIDTH))
    on_white.quantize(128).save(picture, optimize=True)


if __name__ == "__main__":
    if shutil.which(CHROMIUM[0]) is None or len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*map(Path, sys.argv[1:]))
