import torch

from benchmarks.notebook import Net
from mnist_ray.mnist.cnn import CNN


def test_it_has_the_parameters_of_the_notebooks_network() -> None:
    assert sum(parameter.numel() for parameter in CNN(10).parameters()) == 49_770
    assert {name: value.shape for name, value in CNN(10).state_dict().items()} == {
        name: value.shape for name, value in Net().state_dict().items()
    }


def test_it_is_the_same_function_as_the_notebooks_network() -> None:
    torch.manual_seed(0)
    images = torch.rand(5, 1, 28, 28)
    model, notebook = CNN(10), Net()
    notebook.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(images), notebook(images), rtol=0, atol=0)


def test_it_takes_any_number_of_images() -> None:
    for number in (0, 1, 3):
        assert CNN(10)(torch.zeros(number, 1, 28, 28)).shape == (number, 10)
