import torch
from torch import nn
from torch.nn import functional as F

from mnist_ray.model import CNN, num_parameters


class NotebookNet(nn.Module):
    """The network as the notebook writes it: ReLU before pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 5)
        self.conv2 = nn.Conv2d(32, 32, 5)
        self.conv3 = nn.Conv2d(32, 64, 3)
        self.dense1 = nn.Linear(64, 64)
        self.dense2 = nn.Linear(64, 10)
        self.maxpool1 = nn.MaxPool2d((2, 2), stride=(2, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for conv in (self.conv1, self.conv2, self.conv3):
            x = self.maxpool1(F.relu(conv(x)))
        x = F.relu(self.dense1(x.view(-1, 64)))
        return self.dense2(x)  # type: ignore[no-any-return]


def test_it_has_the_parameters_of_the_notebooks_network() -> None:
    assert num_parameters(CNN()) == 49_770
    assert {name: value.shape for name, value in CNN().state_dict().items()} == {
        name: value.shape for name, value in NotebookNet().state_dict().items()
    }


def test_it_is_the_same_function_as_the_notebooks_network() -> None:
    torch.manual_seed(0)
    images = torch.rand(5, 1, 28, 28)
    model, notebook = CNN(), NotebookNet()
    notebook.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(images), notebook(images), rtol=0, atol=0)


def test_it_takes_any_number_of_images() -> None:
    for number in (0, 1, 3):
        assert CNN()(torch.zeros(number, 1, 28, 28)).shape == (number, 10)
