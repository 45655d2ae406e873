"""The notebook's training loop as a script, over many seeds: python benchmarks/notebook.py --seeds 1 2 3

The network, the order of ReLU and pooling, the batch size, the optimizer and the two epochs are the notebook's. Only
the images are indexed from one tensor instead of going through PIL, so that a seed takes half a minute. Shows how much
the notebook's 98.85 % varies by chance.
"""

import argparse

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mnist_ray.mnist import idx
from mnist_ray.workload import Arrays


class Net(nn.Module):
    """The notebook's network."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 5)
        self.conv2 = nn.Conv2d(32, 32, 5)
        self.conv3 = nn.Conv2d(32, 64, 3)
        self.dense1 = nn.Linear(64, 64)
        self.dense2 = nn.Linear(64, 10)
        self.maxpool1 = nn.MaxPool2d((2, 2), stride=(2, 2))

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 1, 28, 28) to logits (N, 10)."""
        for conv in (self.conv1, self.conv2, self.conv3):
            x = self.maxpool1(F.relu(conv(x)))
        return self.dense2(F.relu(self.dense1(x.view(-1, 64))))  # type: ignore[no-any-return]


def tensors(split: Arrays) -> tuple[Tensor, Tensor]:
    """Return images (N, 1, 28, 28) from 0 to 1, like ``ToTensor``, and labels (N,)."""
    return torch.tensor(split.inputs).unsqueeze(1).float() / 255, torch.tensor(split.targets).long()


def test_accuracy(seed: int, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> float:
    """Train for two epochs and return the accuracy on the test set."""
    torch.manual_seed(100 + seed)
    model, loss_function = Net(), nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    torch.manual_seed(seed)
    images, labels = train
    for _ in range(2):
        for batch in torch.chunk(torch.randperm(len(images)), len(images) // 8):
            loss = loss_function(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        predicted = torch.cat([model(split).argmax(1) for split in torch.chunk(test[0], 10)])
    return (predicted == test[1]).double().mean().item()


def main() -> None:
    """Print each seed's accuracy and the mean."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(1, 25)))
    args = parser.parse_args()
    torch.set_num_threads(1)
    train, test = tensors(idx.load("train")), tensors(idx.load("test"))
    accuracies = []
    for seed in args.seeds:
        accuracies.append(test_accuracy(seed, train, test))
        print(f"seed {seed}: {accuracies[-1]:.2%}; mean so far {sum(accuracies) / len(accuracies):.2%}", flush=True)


if __name__ == "__main__":
    main()
