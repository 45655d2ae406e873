import io
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from examples.digits import Digits, augmented, to_mnist
from mnist_ray.data.data import Arrays
from mnist_ray.data.images import as_displayed
from mnist_ray.errors import UsageError
from mnist_ray.predictions.predictor import read_image

EXIF_ORIENTATION = 0x0112


def ink(image: np.ndarray, size: tuple[int, int] = (300, 240), at: tuple[int, int] = (120, 30)) -> np.ndarray:
    """Return a larger picture (H, W) in 0 to 1 with one of MNIST's digits somewhere in it."""
    canvas = np.zeros(size)
    canvas[at[0] : at[0] + 112, at[1] : at[1] + 112] = np.kron(image / 255, np.ones((4, 4)))
    return canvas


def grey(values: np.ndarray) -> Image.Image:
    return Image.fromarray(np.uint8(np.clip(values, 0, 255)))


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    content = io.BytesIO()
    image.save(content, form, **options)
    return content.getvalue()


@pytest.fixture(params=[0, 7, 18], ids=lambda index: f"image{index}")
def digit(request: pytest.FixtureRequest, mnist_test: Arrays) -> np.ndarray:
    return mnist_test.inputs[request.param]


def similarity(a: np.ndarray, b: np.ndarray) -> float:
    """Return the cosine of two images."""
    return float((a.astype(float) * b).sum() / np.linalg.norm(a.astype(float)) / np.linalg.norm(b.astype(float)))


def on_paper(values: np.ndarray) -> Image.Image:
    return grey(230 - 200 * values)


def on_a_blackboard(values: np.ndarray) -> Image.Image:
    return grey(30 + 180 * values)


def black_on_nothing(values: np.ndarray) -> Image.Image:
    return as_displayed(Image.fromarray(np.uint8(np.stack([0 * values] * 3 + [255 * values], axis=-1))))


def with_transparent_corners(values: np.ndarray) -> Image.Image:
    image = on_paper(values).convert("RGBA")
    image.paste((0, 0, 0, 0), (0, 0, 30, 30))
    return as_displayed(image)


def in_uneven_light(values: np.ndarray) -> Image.Image:
    slope = np.linspace(1, 0.5, values.shape[1]) * np.linspace(1, 0.8, values.shape[0])[:, None]
    noise = np.random.default_rng(0).normal(0, 4, values.shape)
    return grey((230 - 180 * values) * slope + noise)


def with_a_shadow(values: np.ndarray) -> Image.Image:
    return grey((230 - 180 * values) * np.where(np.arange(values.shape[1]) < 90, 0.7, 1.0))


def with_specks(values: np.ndarray) -> Image.Image:
    values = values.copy()
    values[10:13, 200:203] = values[280:283, 15:18] = 1
    return on_paper(values)


def beside_the_table(values: np.ndarray) -> Image.Image:
    values = values.copy()
    values[:, 220:] = 0.9
    return on_paper(values)


DRAWINGS = [
    *(on_paper, on_a_blackboard, black_on_nothing, with_transparent_corners),
    *(in_uneven_light, with_a_shadow, with_specks, beside_the_table),
]


@pytest.mark.parametrize("draw", DRAWINGS)
def test_a_digit_becomes_like_mnists_own(draw: Callable[[np.ndarray], Image.Image], digit: np.ndarray) -> None:
    seen = to_mnist(draw(ink(digit)))
    assert seen.dtype == np.uint8
    assert similarity(seen, digit) > 0.8


def test_the_centre_of_mass_is_in_the_middle_and_the_digit_fills_twenty_pixels(digit: np.ndarray) -> None:
    seen = to_mnist(on_paper(ink(digit)))
    assert ndimage.center_of_mass(seen) == pytest.approx((14, 14), abs=0.3)
    sides = [np.ptp(np.flatnonzero(seen.max(axis=axis) > 60)) + 1 for axis in (0, 1)]
    assert 19 <= max(sides) <= 22


@pytest.mark.parametrize("orientation", [3, 6])
def test_exif_data_turn_a_photo(orientation: int, mnist_test: Arrays) -> None:
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    upright = on_paper(ink(mnist_test.inputs[18]))
    turned = upright.rotate({3: 180, 6: 90}[orientation], expand=True)
    seen = to_mnist(read_image(io.BytesIO(encoded(turned, "JPEG", exif=exif))))
    assert similarity(seen, to_mnist(upright)) > 0.95


NOISE = grey(np.random.default_rng(0).normal(200, 2, (200, 200)))


@pytest.mark.parametrize("image", [Image.new("L", (50, 50), 200), Image.new("RGBA", (9, 9)), NOISE])
def test_a_picture_without_a_digit_is_refused(image: Image.Image) -> None:
    with pytest.raises(UsageError, match="shows no digit"):
        to_mnist(image)


def page(*digits: tuple[np.ndarray, int, int]) -> np.ndarray:
    """Return a wide picture with digits of MNIST's, each at a place (top, left), in 0 to 1."""
    return np.sum([ink(image, (300, 700), (top, left)) for image, top, left in digits], axis=0)


def test_the_largest_digit_is_taken(mnist_test: Arrays) -> None:
    small = np.zeros((28, 28), np.uint8)
    small[8:22, 8:22] = mnist_test.inputs[2][::2, ::2]
    picture = on_paper(page((mnist_test.inputs[0], 30, 400), (small, 30, 60)))
    assert similarity(to_mnist(picture), mnist_test.inputs[0]) > 0.85


def test_a_digit_in_two_pieces_is_read_as_one(mnist_test: Arrays) -> None:
    five = mnist_test.inputs[8]
    apart = five.copy()  # its bar stands above the rest
    apart[10:11] = 0
    without_bar = five.copy()
    without_bar[:11] = 0
    seen = to_mnist(on_paper(page((apart, 90, 90))))
    assert similarity(seen, five) > similarity(to_mnist(on_paper(page((without_bar, 90, 90)))), five) + 0.1


def images_of(few_images: Arrays) -> torch.Tensor:
    return torch.tensor(few_images.inputs[:50]).unsqueeze(1).float() / 255


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_images_are_changed_by_the_generator_alone_and_stay_images(few_images: Arrays) -> None:
    images = images_of(few_images)
    first, again, other = (augmented(images, seeded(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == images.shape
    assert 0 <= first.min() < first.max() <= 1
    ink, before = (some.sum((1, 2, 3)) for some in (first, images))
    assert ((ink > 0.25 * before) & (ink < 2.5 * before)).all(), "a digit is still visible"
    assert len(augmented(images[:0], seeded(0))) == 0


def test_only_training_with_augment_changes_images(few_images: Arrays) -> None:
    inputs = torch.tensor(few_images.inputs[:50])
    plain, robust = Digits(), Digits(Digits.Settings(augment=True))
    expected = images_of(few_images)
    assert torch.equal(plain.prepare(inputs, seeded(0)), expected)
    assert torch.equal(robust.prepare(inputs, None), expected)
    assert not torch.equal(robust.prepare(inputs, seeded(0)), expected)
