"""The default recipe with accelerate, as its guide writes it.

    python benchmarks/peers/with_accelerate.py DATA_DIR FOLDER               # 29 to 32 s on two cores
    python benchmarks/peers/with_accelerate.py DATA_DIR FOLDER --tensors     # 19 s: all images are converted in advance

Guards, in frameworks.py, the speed of a job, its few lines, and its restart after a kill, beside accelerate's.

To use several processes, start it with torchrun. DATA_DIR has torchvision's layout. The checkpoints are in FOLDER, and
training continues from the last one. The last line of the output is JSON.
"""

import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from measuring import Clock, as_tensors
from torch import nn
from torch.nn import functional as F
from torch.optim import Adam
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, random_split
from torchvision import datasets, transforms

from mnist_ray.mnist.cnn import CNN

NUM_EPOCHS = 2


def accuracy(accelerator: Accelerator, model: nn.Module, loader: DataLoader) -> float:
    """Return the accuracy over all processes."""
    model.eval()
    correct = total = 0
    with torch.no_grad():
        for images, labels in loader:
            predictions, labels = accelerator.gather_for_metrics((model(images).argmax(1), labels))
            correct += (predictions == labels).sum().item()
            total += len(labels)
    return correct / total


def main() -> None:
    """Train and test."""
    data_dir, folder = sys.argv[1], Path(sys.argv[2])
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // accelerator.num_processes))
    set_seed(0)
    train = datasets.MNIST(data_dir, train=True, transform=transforms.ToTensor())
    test = datasets.MNIST(data_dir, train=False, transform=transforms.ToTensor())
    if "--tensors" in sys.argv:
        train, test = as_tensors(train), as_tensors(test)
    train, validation = random_split(train, [len(train) - 5000, 5000])
    batch_size = 128 // accelerator.num_processes
    train_loader = DataLoader(train, batch_size, shuffle=True)
    validation_loader, test_loader = DataLoader(validation, batch_size), DataLoader(test, batch_size)
    model = CNN(10)
    optimizer = Adam(model.parameters(), lr=5e-3, betas=(0.7, 0.9), fused=True)
    scheduler = OneCycleLR(optimizer, 5e-3, NUM_EPOCHS * len(train_loader), cycle_momentum=False)
    model, optimizer, scheduler, train_loader, validation_loader, test_loader = accelerator.prepare(
        model, optimizer, scheduler, train_loader, validation_loader, test_loader
    )
    clock = Clock()
    saved = sorted(folder.glob("epoch-*"))
    if saved:
        accelerator.load_state(saved[-1])
    for epoch in range(len(saved), NUM_EPOCHS):
        clock.start()
        model.train()
        for images, labels in train_loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
        clock.stop(len(train))
        accelerator.print(f"epoch {epoch + 1}: accuracy {accuracy(accelerator, model, validation_loader):.4f}")
        accelerator.save_state(folder / f"epoch-{epoch + 1}")
    tested = accuracy(accelerator, model, test_loader)
    if accelerator.is_main_process:
        clock.report(tested)
    accelerator.end_training()


if __name__ == "__main__":
    main()
