"""torchvision's ``ImageFolder`` without hidden files and folders, such as Jupyter's ``.ipynb_checkpoints``."""

from __future__ import annotations

import os
from typing import Any

from torchvision import datasets


class ImageFolder(datasets.ImageFolder):
    """Images in a folder per class."""

    def find_classes(self, directory: Any) -> tuple[list[str], dict[str, int]]:
        """Return the names of the classes, and their numbers. Raises FileNotFoundError if there are none."""
        classes = [name for name in super().find_classes(directory)[0] if not name.startswith(".")]
        if not classes:
            raise FileNotFoundError(f"there are only hidden folders in {directory}")
        return classes, {name: number for number, name in enumerate(classes)}

    @staticmethod
    def make_dataset(directory: Any, *arguments: Any, **options: Any) -> list[tuple[str, int]]:
        """Return the files, each with the number of its class."""
        samples = datasets.ImageFolder.make_dataset(directory, *arguments, **options)
        return [(file, number) for file, number in samples if f"{os.sep}." not in file[len(str(directory)) :]]
