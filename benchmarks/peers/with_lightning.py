"""The default recipe in Lightning, as its guide writes it.

    python benchmarks/peers/with_lightning.py DATA_DIR FOLDER               # 30 s on two cores

Guards, in frameworks.py, the speed of a job, its few lines, and its restart after a kill, beside Lightning's.

To use several processes, start it with torchrun. DATA_DIR has torchvision's layout. The checkpoints are in FOLDER, and
training continues from the last one. The last line of the output is JSON.
"""

import os
import sys

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from measuring import Clock
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Adam
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, random_split
from torchvision import datasets, transforms

from mnist_ray.mnist.cnn import CNN

clock = Clock()


class Digits(L.LightningModule):
    """The notebook's network and the default recipe."""

    def __init__(self) -> None:
        super().__init__()
        self.model = CNN(10)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        """Return the loss of a batch."""
        images, labels = batch
        loss = F.cross_entropy(self.model(images), labels)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        """Log the accuracy."""
        images, labels = batch
        self.log("accuracy", (self.model(images).argmax(1) == labels).float().mean(), sync_dist=True)

    test_step = validation_step

    def configure_optimizers(self) -> dict:
        """Return the optimizer and the schedule."""
        optimizer = Adam(self.parameters(), lr=5e-3, betas=(0.7, 0.9), fused=True)
        scheduler = OneCycleLR(optimizer, 5e-3, self.trainer.estimated_stepping_batches, cycle_momentum=False)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_epoch_start(self) -> None:  # for the clock
        """Start the clock."""
        clock.start()

    def on_validation_start(self) -> None:  # for the clock
        """Stop the clock, except before the first epoch."""
        clock.stop(len(self.trainer.train_dataloader.dataset) if self.trainer.train_dataloader else 0)


def main() -> None:
    """Train and test."""
    data_dir, folder = sys.argv[1:3]
    processes = int(os.environ.get("WORLD_SIZE", 1))  # torchrun sets it
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // processes))
    L.seed_everything(0)
    train = datasets.MNIST(data_dir, train=True, transform=transforms.ToTensor())
    test = datasets.MNIST(data_dir, train=False, transform=transforms.ToTensor())
    train, validation = random_split(train, [len(train) - 5000, 5000])
    batch_size = 128 // processes
    trainer = L.Trainer(
        accelerator="cpu",
        devices=processes,
        strategy="ddp" if processes > 1 else "auto",
        max_epochs=2,
        precision="bf16-mixed",
        callbacks=[ModelCheckpoint(folder, monitor="accuracy", mode="max", save_last=True)],
        logger=False,
        enable_progress_bar=False,
    )
    loaders = DataLoader(train, batch_size, shuffle=True), DataLoader(validation, batch_size)
    trainer.fit(Digits(), *loaders, ckpt_path="last")
    (tested,) = trainer.test(dataloaders=DataLoader(test, batch_size), ckpt_path="best")
    if trainer.is_global_zero:
        clock.report(tested["accuracy"])


if __name__ == "__main__":
    main()
