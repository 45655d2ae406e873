"""The training on a table in Lightning.

    python benchmarks/peers/table_lightning.py - FOLDER     # 40 s on two cores

Guards, in frameworks.py, the speed of small steps beside Lightning's.

The last line of the output is JSON.
"""

import sys

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from measuring import Clock
from table import BATCH_SIZE, NUM_EPOCHS, STEPS_PER_EPOCH, adam, new_network, tensors_of
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

clock = Clock()


class Table(L.LightningModule):
    """The network and the recipe."""

    def __init__(self) -> None:
        super().__init__()
        self.model = new_network()

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        """Return the loss of a batch."""
        inputs, targets = batch
        loss = F.mse_loss(self.model(inputs).squeeze(1), targets)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        """Log the loss."""
        inputs, targets = batch
        self.log("val_loss", F.mse_loss(self.model(inputs).squeeze(1), targets))

    test_step = validation_step

    def configure_optimizers(self) -> dict:
        """Return the optimizer and the schedule."""
        optimizer, scheduler = adam(self)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_epoch_start(self) -> None:  # for the clock
        """Start the clock."""
        clock.start()

    def on_validation_start(self) -> None:  # for the clock
        """Stop the clock."""
        clock.stop(STEPS_PER_EPOCH)


def main() -> None:
    """Train and test."""
    torch.set_num_threads(1)
    L.seed_everything(0)
    train, validation, test = map(tensors_of, ("train", "validation", "test"))
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=NUM_EPOCHS,
        callbacks=[ModelCheckpoint(sys.argv[2], monitor="val_loss")],
        logger=False,
        enable_progress_bar=False,
    )
    trainer.fit(Table(), DataLoader(train, BATCH_SIZE, shuffle=True), DataLoader(validation, 1000))
    (tested,) = trainer.test(dataloaders=DataLoader(test, 1000), ckpt_path="best")
    clock.report_steps(tested["val_loss"])


if __name__ == "__main__":
    main()
