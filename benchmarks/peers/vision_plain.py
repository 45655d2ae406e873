"""The training on pictures as a plain loop.

    python benchmarks/peers/vision_plain.py DATA_DIR FOLDER     # 50 s on two cores

Guards, in frameworks.py, the speed on a ``Dataset`` beside a plain loop's.

DATA_DIR has torchvision's layout. The last line of the output is JSON.
"""

import sys
from pathlib import Path

import torch
from pictures import BATCH_SIZE, LOADERS, NUM_EPOCHS, Pictures, adam, new_network, set_up
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader


def loss_on(network: nn.Module, batches: DataLoader) -> float:
    """Return the mean loss."""
    total = number = 0.0
    network.eval()
    with torch.no_grad():
        for inputs, labels in batches:
            total += F.cross_entropy(network(inputs), labels, reduction="sum").item()
            number += len(labels)
    network.train()
    return total / number


def main() -> None:
    """Train, validate, save, and test."""
    data_dir, folder = sys.argv[1:3]
    clock, network = set_up(), new_network().to(memory_format=torch.channels_last)
    optimizer, scheduler = adam(network)
    train = DataLoader(Pictures(data_dir, "train"), BATCH_SIZE, shuffle=True, num_workers=LOADERS)
    validation, test = (
        DataLoader(Pictures(data_dir, split), 100, num_workers=LOADERS) for split in ("validation", "test")
    )
    for epoch in range(NUM_EPOCHS):
        clock.start()
        for inputs, labels in train:
            with torch.autocast("cpu", torch.bfloat16):
                logits = network(inputs)
            F.cross_entropy(logits.float(), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        clock.stop(len(train))
        print(epoch, loss_on(network, validation))
        states = {"model": network.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(states, Path(folder) / f"{epoch}.pt")
    clock.report_steps(loss_on(network, test))


if __name__ == "__main__":
    main()
