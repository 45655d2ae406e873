"""The notebook as a script: torchvision's MNIST, ToTensor, batch 8, fp32, .item() at every step.

    python benchmarks/peers/notebook.py DATA_DIR EPOCHS     # two epochs: about 75 s on two cores

Guards, in bench.py, the speed of the default recipe beside the notebook's.

DATA_DIR has torchvision's layout. The last line is JSON.
"""

import json
import sys
import time

import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader


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

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images (N, 1, 28, 28) to logits (N, 10)."""
        x = self.maxpool1(F.relu(self.conv1(x)))
        x = self.maxpool1(F.relu(self.conv2(x)))
        x = self.maxpool1(F.relu(self.conv3(x)))
        x = x.view(-1, 64)
        x = F.relu(self.dense1(x))
        return self.dense2(x)


def main() -> None:
    """Train and evaluate like the notebook, without its plots."""
    folder, num_epochs = sys.argv[1], int(sys.argv[2])
    to_tensor = torchvision.transforms.ToTensor()
    train = torchvision.datasets.MNIST(folder, train=True, transform=to_tensor)
    test = torchvision.datasets.MNIST(folder, train=False, transform=to_tensor)
    train_loader = DataLoader(train, batch_size=8, shuffle=True)
    test_loader = DataLoader(test, batch_size=8, shuffle=True)
    model = Net()
    loss_function = nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    torch.manual_seed(1)
    rates = []
    for epoch in range(num_epochs):
        start, running_loss, correct, total = time.time(), 0.0, 0.0, 0.0
        for i, (inputs, labels) in enumerate(train_loader):
            y_pred = model(inputs)
            loss = loss_function(y_pred, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            _, predicted = torch.max(y_pred.data, 1)
            total += labels.size(0)
            correct += (predicted == labels).sum().item()
            running_loss += loss.item()
            if i % 2000 == 1999:
                print(f"Loss: {running_loss / 2000}")
                running_loss = 0.0
        seconds = time.time() - start
        rates.append(total / seconds)
        print(f"Epoch {epoch + 1} finished in {seconds:.2f}s, accuracy on train set: {100 * correct / total}")
    correct = total = 0.0
    with torch.no_grad():
        for inputs, labels in test_loader:
            _, predicted = torch.max(model(inputs).data, 1)
            total += labels.size(0)
            correct += (predicted == labels).sum().item()
    print(json.dumps({"images_per_s": sum(rates) / len(rates), "accuracy": correct / total}))


if __name__ == "__main__":
    main()
