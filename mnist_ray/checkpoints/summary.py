"""What is known about a checkpoint, as Ray and state.json hold it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class CheckpointMetrics:
    """What is known about a checkpoint. Ray gets it, and state.json keeps it, as a flat dict."""

    epoch: int = 0  # finished epochs
    step: int = 0  # finished steps of the current epoch
    epochs: float = 0.0  # trained; not always a whole number
    is_over: bool = False  # whether the training ends here
    values: Mapping[str, Any] = field(default_factory=dict)  # of the epoch so far and of a validation, by column

    @property
    def is_validated(self) -> bool:
        """Whether the checkpoint was validated: at the end of an epoch, or of a trial's segment."""
        return "val_score" in self.values

    @property
    def score(self) -> tuple[float, ...]:
        """The validation's score, larger for a better model; empty without a validation."""
        return tuple(map(float, self.values.get("val_score", ())))

    def to_dict(self) -> dict[str, Any]:
        """Return the flat dict."""
        return {"epoch": self.epoch, "step": self.step, "epochs": self.epochs, "is_over": self.is_over, **self.values}

    @classmethod
    def of(cls, flat: Mapping[str, Any]) -> CheckpointMetrics:
        """Return the metrics in a flat dict, which may lack some or have more."""
        own = {name: flat[name] for name in ("epoch", "step", "epochs", "is_over") if name in flat}
        return cls(**own, values={name: value for name, value in flat.items() if name not in own})
