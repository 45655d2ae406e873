import torch

from mnist_ray.mnist import MNIST
from mnist_ray.mnist.augment import augmented
from mnist_ray.workload.data import Arrays


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
    assert ((ink > 0.25 * before) & (ink < 2.5 * before)).all(), "a digit is still there"
    assert len(augmented(images[:0], seeded(0))) == 0


def test_a_quarter_of_the_batches_is_blurred_as_a_whole() -> None:
    grey = torch.full((8, 1, 28, 28), 0.5)
    centres = [augmented(grey, seeded(seed))[:, 0, 14, 14] for seed in range(200)]
    blurred = [centre for centre in centres if centre.allclose(torch.tensor(0.75))]
    assert all(centre.allclose(torch.tensor(0.5)) for centre in centres if not any(centre is some for some in blurred))
    assert 0.2 < len(blurred) / len(centres) < 0.3


def test_only_training_sees_changed_images_and_only_where_that_is_asked_for(few_images: Arrays) -> None:
    inputs = torch.tensor(few_images.inputs[:50])
    plain, robust = MNIST(), MNIST(MNIST.Settings(augment=True))
    expected = images_of(few_images)
    assert torch.equal(plain.prepare(inputs, seeded(0)), expected)
    assert torch.equal(robust.prepare(inputs, None), expected)
    assert not torch.equal(robust.prepare(inputs, seeded(0)), expected)
