"""The training of examples/gpt.py as a plain loop.

    python benchmarks/peers/gpt_plain.py TEXTS FOLDER [--num-steps N …]  # 97 s on two cores, as in frameworks.py

Guards, in frameworks.py, the speed of a job, and its losses, beside those of a plain loop.

It takes the same batches as the project's job. The last line of the output is JSON.
"""

import itertools

import torch
from byte_gpt import StepClock, Windows, job_of
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader


def loss_on(windows: Windows, model: nn.Module) -> float:
    """Return the mean loss of a byte."""
    model.eval()
    total = 0.0
    with torch.no_grad():
        for inputs, targets in DataLoader(windows, 100):
            total += F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), reduction="sum").item()
    model.train()
    return total / len(windows) / targets.shape[1]


def main() -> None:
    """Train, validate, save, and test."""
    job = job_of()
    torch.manual_seed(job.config.seed)
    model = job.workload.create_model()
    optimizer, scheduler = job.optimizer_and_scheduler(model)
    clock = StepClock(job)
    batches = itertools.islice(DataLoader(job.train, batch_sampler=job.batches), job.config.num_steps)
    for step, (inputs, targets) in enumerate(batches, start=1):
        with torch.autocast("cpu", torch.bfloat16, enabled=job.is_bf16):
            logits = model(inputs)
        F.cross_entropy(logits.float().flatten(0, 1), targets.flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), job.config.clip_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        clock.step()
        if step % job.steps_of_tenth == 0:
            loss = loss_on(job.validation, model)
            states = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(states, job.folder / f"{step}.pt")
    clock.report(loss, loss_on(job.test, model))


if __name__ == "__main__":
    main()
