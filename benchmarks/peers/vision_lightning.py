"""The training on pictures in Lightning.

    python benchmarks/peers/vision_lightning.py DATA_DIR FOLDER     # 55 s on two cores

Guards, in frameworks.py, the speed on a ``Dataset`` beside Lightning's.

DATA_DIR has torchvision's layout. The last line of the output is JSON.
"""

import sys

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from pictures import BATCH_SIZE, LOADERS, NUM_EPOCHS, Pictures, adam, new_network, set_up
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

clock = set_up()


class Digits(L.LightningModule):
    """The network and the recipe."""

    def __init__(self) -> None:
        super().__init__()
        self.model = new_network()

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        """Return the loss of a batch."""
        inputs, labels = batch
        loss = F.cross_entropy(self.model(inputs).float(), labels)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        """Log the loss."""
        inputs, labels = batch
        self.log("val_loss", F.cross_entropy(self.model(inputs).float(), labels))

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
        clock.stop(self.trainer.num_training_batches)


def main() -> None:
    """Train and test."""
    data_dir, folder = sys.argv[1:3]
    train = DataLoader(Pictures(data_dir, "train"), BATCH_SIZE, shuffle=True, num_workers=LOADERS)
    validation, test = (
        DataLoader(Pictures(data_dir, split), 100, num_workers=LOADERS) for split in ("validation", "test")
    )
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=NUM_EPOCHS,
        precision="bf16-mixed",
        callbacks=[ModelCheckpoint(folder, monitor="val_loss")],
        logger=False,
        enable_progress_bar=False,
    )
    trainer.fit(Digits(), train, validation)
    (tested,) = trainer.test(dataloaders=test, ckpt_path="best")
    clock.report_steps(tested["val_loss"])


if __name__ == "__main__":
    main()
