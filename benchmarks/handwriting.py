"""Accuracy on digits that are not from MNIST, with and without preprocessing: python benchmarks/handwriting.py RUN

Needs scikit-learn, and handwriting fonts from the Debian packages named at FONTS. The preprocessing was developed on
the fonts and images that --development selects; all others were held out for the published table.
"""

import argparse
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from sklearn.datasets import load_digits

from mnist_ray.errors import UsageError
from mnist_ray.mnist import idx
from mnist_ray.run.find import find
from mnist_ray.tools.predict import read_image

WORKLOAD = Path(__file__).parents[1] / "examples" / "digits.py"
FONTS_FOLDER = Path("/usr/share/fonts")
DEVELOPMENT_FONTS = (
    "Breip", "BecauseWeBuild-Regular", "BecauseWeCreate-Regular", "BecauseWeMentor-Regular", "ComicNeue-Regular",
    "Kristi", "Delphine", "Ecolier-court",
)  # fmt: skip
FONTS = (
    "dkg", "BecauseWeConnect-Regular", "BecauseWeLearn-Regular", "BecauseWeOrganize-Regular", "DancingScript-Regular",
    "femkeklaver", "Humor-Sans", "KaushanScript-Regular", "Rufscript010", "SteveHand", "TomsonTalks",
    "LeckerliOne-Regular",
)  # fmt: skip
"""Debian packages: fonts-{dkg-handwriting,breip,bwht,dancingscript,femkeklaver,humor-sans,kaushanscript,kristi,
rufscript,sjfonts,comic-neue,ecolier-court,tomsontalks,leckerli-one}."""
LOAD_DIGITS_DEVELOPMENT = 600
VARIATIONS = 20

Sample = tuple[str, int, Image.Image]


def enlarged_digits(is_development: bool) -> Iterator[Sample]:
    """Yield scikit-learn's 8×8 digits, bright on black, enlarged to 160×160."""
    digits = load_digits()
    chosen = slice(LOAD_DIGITS_DEVELOPMENT) if is_development else slice(LOAD_DIGITS_DEVELOPMENT, None)
    for image, label in zip(digits.images[chosen], digits.target[chosen], strict=True):
        picture = Image.fromarray(np.uint8(image * 255 / 16))
        yield "load_digits", int(label), picture.resize((160, 160), Image.Resampling.BICUBIC)


def placed_digits(is_development: bool) -> Iterator[Sample]:
    """Yield 300 of these digits, dark on white, 40 to 200 pixels wide, placed at random in pictures of up to 400."""
    rng = np.random.default_rng(1)
    samples = list(enlarged_digits(is_development))
    for index in rng.choice(len(samples), 300, replace=False):
        _, label, image = samples[index]
        side = int(rng.integers(40, 201))
        width, height = (int(rng.integers(side, 401)) for _ in range(2))
        picture = Image.new("L", (width, height), 255)
        digit = ImageOps.invert(image.resize((side, side), Image.Resampling.BICUBIC))
        picture.paste(digit, (int(rng.integers(0, width - side + 1)), int(rng.integers(0, height - side + 1))))
        yield "load_digits, placed", label, picture


def rendered_digits(is_development: bool) -> Iterator[Sample]:
    """Yield digits in handwriting fonts, of random size, place, colors and polarity; each also as if photographed."""
    rng = np.random.default_rng(0)
    for name in DEVELOPMENT_FONTS if is_development else FONTS:
        path = next(path for path in FONTS_FOLDER.rglob(f"{name}.*") if path.suffix in (".ttf", ".otf"))
        for label in range(10):
            for _ in range(VARIATIONS):
                picture = render(str(label), path, rng)
                yield "fonts", label, picture
                yield "fonts, photographed", label, photographed(picture, rng)


def render(text: str, font_path: Path, rng: np.random.Generator) -> Image.Image:
    """Draw a digit at a random place of a picture that is 60 to 600 pixels wide and half to twice as high."""
    width = int(rng.integers(60, 600))
    height = int(width * rng.uniform(0.5, 2))
    dark = tuple(int(value) for value in rng.integers(0, 90, 3))
    bright = tuple(int(value) for value in rng.integers(165, 256, 3))
    paper, ink = (bright, dark) if rng.random() < 0.5 else (dark, bright)
    picture = Image.new("RGB", (width, height), paper)
    font = ImageFont.truetype(str(font_path), int(min(width, height) * rng.uniform(0.5, 1.0)))
    left, top, right, bottom = font.getbbox(text)
    x = rng.uniform(0, max(1, width - (right - left))) - left
    y = rng.uniform(0, max(1, height - (bottom - top))) - top
    ImageDraw.Draw(picture).text((x, y), text, fill=ink, font=font)
    return picture


def photographed(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Imitate a photograph: rotate slightly, light from one side, add the edge of a shadow and noise, save as JPEG."""
    turned = picture.rotate(rng.uniform(-12, 12), fillcolor=picture.getpixel((0, 0)), resample=Image.Resampling.BICUBIC)
    values = np.asarray(turned, np.float64)
    y, x = np.mgrid[0 : 1 : values.shape[0] * 1j, 0 : 1 : values.shape[1] * 1j]
    angle, edge = rng.uniform(0, 2 * np.pi), rng.uniform(0.3, 0.7)
    along = x * np.cos(angle) + y * np.sin(angle)
    along = (along - along.min()) / max(np.ptp(along), 1e-9)
    light = (1 - 0.4 * along) * np.where(along > edge, 0.8, 1.0)
    noisy = values * light[..., None] + rng.normal(0, 6, values.shape)
    content = io.BytesIO()
    Image.fromarray(np.uint8(np.clip(noisy, 0, 255))).save(content, "JPEG", quality=80)
    return read_image(content)


def mnist_images() -> Iterator[Sample]:
    """Yield MNIST's own test images."""
    split = idx.load("test")
    for image, label in zip(split.inputs[:2000], split.targets[:2000], strict=True):
        yield "MNIST's test images", int(label), Image.fromarray(image)


def plain(image: Image.Image) -> np.ndarray:
    """Scale a whole picture to 28×28, without looking for the digit."""
    return np.asarray(image.convert("L").resize((28, 28), Image.Resampling.BOX))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?")
    parser.add_argument("--storage-path", default="~/ray_results")
    parser.add_argument("--development", action="store_true", help="use the development fonts and images")
    parser.add_argument("--mistakes", help="write a picture of the mistakes to this file")
    arguments = parser.parse_args()
    found = find(arguments.run, arguments.storage_path, str(WORKLOAD))
    model = found.load_model()

    def prepared(image: Image.Image) -> np.ndarray:  # all black if there is no digit
        try:
            return found.workload.read_picture(image)
        except UsageError:
            return np.zeros((28, 28), np.uint8)

    foreign = (enlarged_digits, placed_digits, rendered_digits)
    samples = [*mnist_images(), *(sample for draw in foreign for sample in draw(arguments.development))]
    kinds = np.array([kind for kind, _, _ in samples])
    labels = np.array([label for _, label, _ in samples])
    predictions = {}
    for name, prepare in (("without", plain), ("with", prepared)):
        images = torch.from_numpy(np.stack([prepare(image) for _, _, image in samples]))
        with torch.inference_mode():
            predictions[name] = model(found.workload.prepare(images, None)).argmax(1).numpy()
    print("| digits | number | without preprocessing | with |\n|---|---|---|---|")
    for kind in dict.fromkeys(kinds):
        of_kind = kinds == kind
        accuracy = {name: (predicted == labels)[of_kind].mean() for name, predicted in predictions.items()}
        print(f"| {kind} | {of_kind.sum():,} | {accuracy['without']:.1%} | {accuracy['with']:.1%} |")
    if arguments.mistakes:
        from mnist_ray.workload.figures import image_grid

        wrong = np.flatnonzero((predictions["with"] != labels) & (kinds != "MNIST's test images"))
        wrong = np.random.default_rng(0).permutation(wrong)[:60]
        captions = [f"{predictions['with'][i]}, is {labels[i]}" for i in wrong]
        both = np.stack([prepared(samples[i][2]) for i in wrong])
        Path(arguments.mistakes).write_bytes(image_grid(list(both), captions, num_columns=12))


if __name__ == "__main__":
    main()
