"""The training on a table as a plain loop.

    python benchmarks/peers/table_plain.py - FOLDER     # 12 s on two cores

Guards, in frameworks.py, the speed of small steps beside a plain loop's.

The last line of the output is JSON.
"""

import sys
from pathlib import Path

import torch
from measuring import Clock
from table import BATCH_SIZE, NUM_EPOCHS, STEPS_PER_EPOCH, adam, new_network, squared, tensors_of
from torch.nn import functional as F


def main() -> None:
    """Train, validate, save, and test."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    train, validation, test = map(tensors_of, ("train", "validation", "test"))
    inputs, targets = train.tensors
    network = new_network()
    optimizer, scheduler = adam(network)
    clock = Clock()
    for epoch in range(NUM_EPOCHS):
        clock.start()
        total = 0.0
        for indices in torch.randperm(len(train)).split(BATCH_SIZE):
            loss = F.mse_loss(network(inputs[indices]).squeeze(1), targets[indices])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            total += loss.item()
        clock.stop(STEPS_PER_EPOCH)
        with torch.no_grad():
            print(epoch, total / len(targets) * BATCH_SIZE, squared(network, validation).item())
        states = {"model": network.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(states, Path(sys.argv[2]) / f"{epoch}.pt")
    with torch.no_grad():
        clock.report_steps(squared(network, test).item())


if __name__ == "__main__":
    main()
