import torch

from benchmarks.notebook import Net
from mnist_ray.mnist.cnn import CNN


def test_it_has_the_notebooks_parameters_and_is_the_same_function_for_any_number_of_images() -> None:
    torch.manual_seed(0)
    model, notebook = CNN(10), Net()
    assert sum(parameter.numel() for parameter in model.parameters()) == 49_770
    notebook.load_state_dict(model.state_dict())
    for number in (0, 1, 5):
        images = torch.rand(number, 1, 28, 28)
        torch.testing.assert_close(model(images), notebook(images), rtol=0, atol=0)
