"""The training of examples/gpt.py in Lightning.

    python benchmarks/peers/gpt_lightning.py TEXTS FOLDER [--num-steps N …]  # 90 s on two cores, as in frameworks.py

Guards, in frameworks.py, the speed of a job beside Lightning's.
"""

import lightning as L
from byte_gpt import Job, StepClock, job_of
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader


class Gpt(L.LightningModule):
    """The example's network and recipe."""

    def __init__(self, job: Job, clock: StepClock) -> None:
        super().__init__()
        self.model, self.job = job.workload.create_model(), job
        self.clock = clock

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        """Return the loss of a batch."""
        inputs, targets = batch
        loss = F.cross_entropy(self.model(inputs).float().flatten(0, 1), targets.flatten())
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        """Log the loss."""
        inputs, targets = batch
        self.log("val_loss", F.cross_entropy(self.model(inputs).float().flatten(0, 1), targets.flatten()))

    test_step = validation_step

    def configure_optimizers(self) -> dict:
        """Return the optimizer and the schedule."""
        optimizer, scheduler = self.job.optimizer_and_scheduler(self, fused=False)  # else it could not clip with bf16
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_batch_end(self, *_: object) -> None:  # for the clock
        """Note the end of a step."""
        self.clock.step()


def main() -> None:
    """Train, validate and test."""
    job = job_of()
    clock = StepClock(job)
    L.seed_everything(job.config.seed)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=job.config.num_steps,
        precision="bf16-mixed" if job.is_bf16 else 32,
        gradient_clip_val=job.config.clip_grad_norm,
        val_check_interval=job.steps_of_tenth,
        check_val_every_n_epoch=None,
        callbacks=[ModelCheckpoint(job.folder, monitor="val_loss")],
        logger=False,
        enable_progress_bar=False,
    )
    loaders = DataLoader(job.train, job.config.batch_size, shuffle=True), DataLoader(job.validation, 100)
    trainer.fit(Gpt(job, clock), *loaders)
    validation_loss = trainer.callback_metrics["val_loss"].item()
    (tested,) = trainer.test(dataloaders=DataLoader(job.test, 100), ckpt_path="best")
    clock.report(validation_loss, tested["val_loss"])


if __name__ == "__main__":
    main()
