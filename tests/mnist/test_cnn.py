import pytest
import torch

from benchmarks.notebook import Net
from mnist_ray.mnist import MNIST
from mnist_ray.mnist.cnn import CNN, augmented
from mnist_ray.workload.data import Arrays


def images_of(few_images: Arrays) -> torch.Tensor:
    return torch.tensor(few_images.inputs[:50]).unsqueeze(1).float() / 255


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_it_has_the_notebooks_parameters_and_is_the_same_function_for_any_number_of_images() -> None:
    torch.manual_seed(0)
    model, notebook = CNN(10), Net()
    assert sum(parameter.numel() for parameter in model.parameters()) == 49_770
    notebook.load_state_dict(model.state_dict())
    for number in (0, 1, 5):
        images = torch.rand(number, 1, 28, 28)
        torch.testing.assert_close(model(images), notebook(images), rtol=0, atol=0)


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


def test_a_quarter_of_the_batches_is_blurred_as_a_whole() -> None:
    grey = torch.full((8, 1, 28, 28), 0.5)
    centres = torch.stack([augmented(grey, seeded(seed))[:, 0, 14, 14] for seed in range(200)])
    is_blurred = (centres - 0.75).abs() < 1e-5
    assert (is_blurred | ((centres - 0.5).abs() < 1e-5)).all()
    assert (is_blurred.all(1) == is_blurred.any(1)).all()
    assert is_blurred.all(1).float().mean() == pytest.approx(0.25, abs=0.05)


def test_only_training_with_augment_changes_images(few_images: Arrays) -> None:
    inputs = torch.tensor(few_images.inputs[:50])
    plain, robust = MNIST(), MNIST(MNIST.Settings(augment=True))
    expected = images_of(few_images)
    assert torch.equal(plain.prepare(inputs, seeded(0)), expected)
    assert torch.equal(robust.prepare(inputs, None), expected)
    assert not torch.equal(robust.prepare(inputs, seeded(0)), expected)
