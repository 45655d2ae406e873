import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mnist_ray.mnist.cnn import CNN


def notebooks(model: CNN, images: Tensor) -> Tensor:
    """Compute the logits as the notebook does, with a model's weights."""
    x, pool = images, nn.MaxPool2d((2, 2), stride=(2, 2))
    for conv in (model.conv1, model.conv2, model.conv3):
        x = pool(F.relu(conv(x)))
    logits: Tensor = model.dense2(F.relu(model.dense1(x.view(-1, 64))))
    return logits


def test_it_has_the_notebooks_parameters_and_is_the_same_function_for_any_number_of_images() -> None:
    torch.manual_seed(0)
    model = CNN(10)
    assert sum(parameter.numel() for parameter in model.parameters()) == 49_770
    for number in (0, 1, 5):
        images = torch.rand(number, 1, 28, 28)
        torch.testing.assert_close(model(images), notebooks(model, images), rtol=0, atol=0)
