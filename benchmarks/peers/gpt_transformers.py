"""The training of examples/gpt.py in the Trainer of transformers.

    python benchmarks/peers/gpt_transformers.py TEXTS FOLDER [--num-steps N …]  # 88 s on two cores, as in frameworks.py

Guards, in frameworks.py, the speed of a job beside the Trainer's.
"""

from typing import Any

import torch
from byte_gpt import Job, StepClock, job_of
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed


class Gpt(nn.Module):
    """The example's network, which returns its loss, as the Trainer expects."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.model = job.workload.create_model()

    def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Map bytes (N, T) and those that follow them, (N, T), to their mean loss."""
        logits = self.model(inputs).float()
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten())}

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the weights without the last matrix, which is the embedding: the Trainer cannot save it twice."""
        state = super().state_dict(*args, **kwargs)
        return {name: tensor for name, tensor in state.items() if not name.endswith("head.weight")}


class Clock(TrainerCallback):  # for the clock
    """Notes the ends of steps."""

    def __init__(self, clock: StepClock) -> None:  # for the clock
        self.clock = clock

    def on_step_end(self, *_: object, **__: object) -> None:  # for the clock
        """Note the end of a step."""
        self.clock.step()


def collate(examples: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Join examples to a batch."""
    inputs, labels = (torch.stack(part) for part in zip(*examples, strict=True))
    return {"inputs": inputs, "labels": labels}


def main() -> None:
    """Train, validate and test."""
    job = job_of()
    clock = StepClock(job)
    set_seed(job.config.seed)
    arguments = TrainingArguments(
        str(job.folder),
        max_steps=job.config.num_steps,
        per_device_train_batch_size=job.config.batch_size,
        per_device_eval_batch_size=100,
        bf16=job.is_bf16,
        max_grad_norm=job.config.clip_grad_norm,
        eval_strategy="steps",
        eval_steps=job.steps_of_tenth,
        save_steps=job.steps_of_tenth,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        prediction_loss_only=True,
    )
    model = Gpt(job)
    trainer = Trainer(
        model,
        arguments,
        data_collator=collate,
        train_dataset=job.train,
        eval_dataset=job.validation,
        optimizers=job.optimizer_and_scheduler(model),
        callbacks=[Clock(clock)],  # for the clock
    )
    trainer.train()
    validation_loss = trainer.state.log_history[-2]["eval_loss"]
    clock.report(validation_loss, trainer.evaluate(job.test)["eval_loss"])


if __name__ == "__main__":
    main()
