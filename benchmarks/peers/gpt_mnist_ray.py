"""examples/gpt.py, but without the text that it continues after each validation: its peers do not do this."""

from pathlib import Path
from typing import Any

from mnist_ray.workload.loading import load

Gpt: Any = load(str(Path(__file__).parents[2] / "examples" / "gpt.py"))


class SilentGpt(Gpt):
    """The example without a prompt."""

    prompt = ""
