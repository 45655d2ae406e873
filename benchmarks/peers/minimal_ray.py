"""A minimal `TorchTrainer` script, as in Ray's guide.

    python benchmarks/peers/minimal_ray.py DATA_DIR EPOCHS WORKERS     # two epochs: about a minute on two cores

Guards the start of a job beside that of Ray's own script: in bench.py by default, in plain.py with --plain-ray.

DATA_DIR has torchvision's layout. The last line is JSON.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import ray.train
import torch
from ray.train.torch import TorchTrainer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision import datasets, transforms


class Net(nn.Module):
    """The notebook's network."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 5)
        self.conv2 = nn.Conv2d(32, 32, 5)
        self.conv3 = nn.Conv2d(32, 64, 3)
        self.dense1 = nn.Linear(64, 64)
        self.dense2 = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images (N, 1, 28, 28) to logits (N, 10)."""
        for conv in (self.conv1, self.conv2, self.conv3):
            x = F.max_pool2d(F.relu(conv(x)), 2)
        return self.dense2(F.relu(self.dense1(x.flatten(1))))


def train_func(config: dict) -> None:
    """Train on one worker, which evaluates its part of the test set."""
    to_tensor = transforms.ToTensor()
    train = datasets.MNIST(config["data"], train=True, transform=to_tensor)
    test = datasets.MNIST(config["data"], train=False, transform=to_tensor)
    local_batch_size = config["batch_size"] // ray.train.get_context().get_world_size()
    train_loader = ray.train.torch.prepare_data_loader(DataLoader(train, batch_size=local_batch_size, shuffle=True))
    test_loader = ray.train.torch.prepare_data_loader(DataLoader(test, batch_size=local_batch_size))
    model = ray.train.torch.prepare_model(Net())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    working_s, begun_at = 0.0, time.time()
    for epoch in range(config["epochs"]):
        if ray.train.get_context().get_world_size() > 1:
            train_loader.sampler.set_epoch(epoch)
        start = time.perf_counter()
        for images, labels in train_loader:
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        working_s += time.perf_counter() - start
        start, correct = time.perf_counter(), 0
        with torch.no_grad():
            for images, labels in test_loader:
                correct += (model(images).argmax(1) == labels).sum().item()
        working_s += time.perf_counter() - start
        with tempfile.TemporaryDirectory() as folder:
            torch.save(model.state_dict(), Path(folder) / "model.pt")
            ray.train.report(
                {"correct": correct, "working_s": working_s, "begun_at": begun_at},
                checkpoint=ray.train.Checkpoint.from_directory(folder),
            )


def main() -> None:
    """Train; print the seconds of training and evaluation as JSON."""
    with tempfile.TemporaryDirectory() as storage:
        trainer = TorchTrainer(
            train_func,
            train_loop_config={"data": sys.argv[1], "epochs": int(sys.argv[2]), "batch_size": 128},
            scaling_config=ray.train.ScalingConfig(num_workers=int(sys.argv[3])),
            run_config=ray.train.RunConfig(storage_path=storage),
        )
        result = trainer.fit()
    print(json.dumps({name: result.metrics[name] for name in ("working_s", "begun_at")}))


if __name__ == "__main__":
    main()
