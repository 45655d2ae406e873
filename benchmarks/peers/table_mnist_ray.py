"""The training on a table as a workload, for frameworks.py.

python jobs/train.py --workload benchmarks/peers/table_mnist_ray.py     # 16 s on two cores
"""

import sys
from pathlib import Path

from torch import nn

from mnist_ray.workload import Arrays, Data, Regression

sys.path.insert(0, str(Path(__file__).parent))
from table import BATCH_SIZE, LEARNING_RATE, NUM_EPOCHS, new_network, rows_of


class Table(Regression):
    """Rows of 20 numbers, and a number for each."""

    noun = "row"
    recipes = {
        "default": {
            "batch_size": BATCH_SIZE,
            "num_epochs": NUM_EPOCHS,
            "learning_rate": LEARNING_RATE,
            "lr_schedule": "one-cycle",
            "precision": "fp32",
        }
    }

    def load_data(self) -> Data:
        """Return the rows."""
        train, validation, test = (Arrays(*rows_of(split)) for split in ("train", "validation", "test"))
        return Data(train, test, validation)

    def create_model(self) -> nn.Module:
        """Return the network."""
        return new_network()
