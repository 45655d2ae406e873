"""How far will diabetes progress in a year? A regression on scikit-learn's table of 442 patients.

pip install scikit-learn
python jobs/train.py --workload examples/diabetes.py                   # takes seconds, reaches an R² of about 0.5
python jobs/tune.py --workload examples/diabetes.py --num-trials 16    # also searches --width and --dropout
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_diabetes
from torch import Generator, Tensor, nn

from mnist_ray.workload import Arrays, Choice, Data, Range, Regression, at_least, fraction, setting

NUM_TEST = 88  # a fifth of the patients


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The network."""

    width: int = setting(32, "units of each hidden layer", search=Choice((16, 32, 64)), **at_least(1))
    dropout: float = setting(0.1, "fraction of hidden units dropped in training", search=Range(0, 0.5), **fraction())


class Diabetes(Regression):
    """Ten measurements per patient; the target is the progression of the disease after a year, from 25 to 346."""

    Settings = Settings
    noun = "patient"
    recipes = {
        "default": {
            "num_epochs": 20,
            "batch_size": 32,
            "learning_rate": 1e-2,
            "lr_schedule": "one-cycle",
            "precision": "fp32",
        }
    }
    search = {"batch_size": Choice((16, 32, 64)), "learning_rate": Range(1e-3, 5e-2, log=True)}

    def load_data(self) -> Data:
        """Return the table, split at random: a fifth is the test set."""
        inputs, targets = load_diabetes(return_X_y=True, scaled=False)
        order = np.random.default_rng(0).permutation(len(targets))
        test, train = order[:NUM_TEST], order[NUM_TEST:]
        known = inputs[train]
        metadata = {
            "means": known.mean(0).tolist(),
            "stds": known.std(0).tolist(),
            "target": float(targets[train].mean()),
        }
        return Data(
            Arrays(known, targets[train]), Arrays(inputs[test], targets[test]), name="diabetes", metadata=metadata
        )

    def create_model(self) -> nn.Module:
        """Return a network with two hidden layers whose initial predictions are near the mean target."""
        standardize = Standardize(self.metadata["means"], self.metadata["stds"])
        width, dropout = self.settings.width, self.settings.dropout
        last = nn.Linear(width, 1)
        nn.init.constant_(last.bias, self.metadata["target"])
        hidden = (nn.Linear(10, width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, width), nn.ReLU())
        return nn.Sequential(standardize, *hidden, last)

    def prepare(self, inputs: Tensor, generator: Generator | None) -> Tensor:
        """Turn the table's numbers into fp32."""
        return inputs.float()

    def loss(self, outputs: Any, targets: Tensor) -> Tensor:
        """Return the squared error, scaled down so that the gradients have the usual size."""
        return super().loss(outputs, targets) / 100**2


class Standardize(nn.Module):
    """Standardizes each column. Its numbers are buffers, so that they are on the model's device."""

    def __init__(self, means: list[float], stds: list[float]) -> None:
        super().__init__()
        self.register_buffer("means", torch.tensor(means))
        self.register_buffer("stds", torch.tensor(stds))

    def forward(self, inputs: Tensor) -> Tensor:
        """Map columns of any size (N, columns) to columns with mean 0 and standard deviation 1."""
        return (inputs - self.means) / self.stds
