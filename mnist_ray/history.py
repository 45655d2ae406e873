"""metrics.csv: a row per epoch, rewritten as figures come in, so that it is there also when a run is interrupted."""

from __future__ import annotations

import csv
import io
from typing import Any

from mnist_ray.events import EpochFinished, Event, Started, Validated
from mnist_ray.storage import RunFolder

FILE_NAME = "metrics.csv"
_COLUMNS = ("epoch", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "epoch_s", "images_per_s", "val_s")


class History:
    """The rows of a run's metrics.csv; a resumed run goes on with those that are there."""

    def __init__(self, run: RunFolder) -> None:
        self._run = run
        text = run.read_text(FILE_NAME) or ""
        self.rows: dict[int, dict[str, Any]] = {int(row["epoch"]): row for row in csv.DictReader(io.StringIO(text))}

    def add(self, event: Event) -> None:
        """Put an event's figures in their epoch's row; when training starts again, drop what it will do again."""
        match event:
            case Started():
                self.rows = {epoch: row for epoch, row in self.rows.items() if epoch <= event.epoch}
            case EpochFinished(last):
                self._update(
                    last.epoch,
                    train_loss=last.sums.loss,
                    train_accuracy=last.sums.accuracy,
                    epoch_s=round(last.epoch_s, 3),
                    images_per_s=round(last.images_per_s, 1),
                )
            case Validated():
                self._update(
                    event.epoch, val_loss=event.loss, val_accuracy=event.accuracy, val_s=round(event.seconds, 3)
                )

    def _update(self, epoch: int, **figures: Any) -> None:
        self.rows.setdefault(epoch, {"epoch": epoch}).update(figures)
        text = io.StringIO()
        writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows[epoch] for epoch in sorted(self.rows))
        self._run.write_text(FILE_NAME, text.getvalue())
