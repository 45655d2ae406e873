"""Which byte is next? A small GPT on any folder of text; by default, on the sources of Python's standard library.

python jobs/train.py --workload examples/gpt.py                              # 1,000 steps: 9 minutes on two cores
python jobs/train.py --workload examples/gpt.py --text-folder ~/my_texts
python jobs/train.py --workload examples/gpt.py --num-workers 4 --strategy fsdp
python jobs/tune.py --workload examples/gpt.py --num-steps 200 --sweep learning_rate=log:1e-4:3e-3 dropout=0,0.1
python jobs/train.py --workload examples/gpt.py --callback examples/gpt.py:Sample --verbose   # writes after each epoch
mnist-ray predict --run RUN "def main("                                      # continues your text
"""

from __future__ import annotations

import hashlib
import math
import os
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mnist_ray.config import TrainConfig
from mnist_ray.parallel.group import Group
from mnist_ray.parallel.sharding import resharded
from mnist_ray.training.callback import Callback
from mnist_ray.training.evaluation import evaluating
from mnist_ray.training.state import TrainingState
from mnist_ray.workload import Arrays, Data, Metric, Range, Workload, at_least, fraction, setting

NUM_BYTES = 256  # the vocabulary
SUFFIXES = {".md", ".py", ".rst", ".txt"}
NUM_CONTINUED = 120  # bytes of a sample


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The text and the network."""

    text_folder: Path | None = setting(None, "a folder of .txt, .md, .rst and .py files", decides_data=True)
    length: int = setting(128, "bytes of an example", decides_data=True, **at_least(2))
    depth: int = setting(4, "blocks", **at_least(1))
    width: int = setting(256, "width of a block, in heads of 64", **at_least(64))
    dropout: float = setting(0.0, "fraction of a block's outputs dropped in training", **fraction(with_one=False))


class Block(nn.Module):
    """Attention, then a network of two layers, each with its normalization before it (pre-norm)."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width, bias=False), nn.GELU(), nn.Linear(4 * width, width, bias=False)
        )
        self.drop = nn.Dropout(dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map hidden states (N, T, width) to new ones."""
        in_heads = (*hidden.shape[:2], -1, 64)
        parts = self.qkv(self.norm_attention(hidden)).chunk(3, -1)
        query, key, value = (part.view(in_heads).transpose(1, 2) for part in parts)  # (N, heads, T, 64)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)
        hidden = hidden + self.drop(self.out(attended.reshape(hidden.shape)))
        return hidden + self.drop(self.mlp(self.norm_mlp(hidden)))


class GPT(nn.Module):
    """A transformer that predicts the next byte at each position. The embedding is also the last matrix."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.bytes = nn.Embedding(NUM_BYTES, settings.width)
        self.places = nn.Embedding(settings.length, settings.width)
        self.blocks = nn.ModuleList(Block(settings.width, settings.dropout) for _ in range(settings.depth))
        self.norm = nn.LayerNorm(settings.width)
        self.head = nn.Linear(settings.width, NUM_BYTES, bias=False)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
        for block in self.blocks:  # they add to the hidden states: keep the sum's size (GPT-2)
            nn.init.normal_(block.out.weight, std=0.02 / math.sqrt(2 * settings.depth))
            nn.init.normal_(block.mlp[2].weight, std=0.02 / math.sqrt(2 * settings.depth))
        self.head.weight = self.bytes.weight

    def forward(self, text: Tensor) -> Tensor:
        """Map bytes (N, T), T at most the length of an example, to logits (N, T, 256)."""
        hidden = self.bytes(text) + self.places(torch.arange(text.shape[1], device=text.device))
        for block in self.blocks:
            hidden = block(hidden)
        logits: Tensor = self.head(self.norm(hidden))
        return logits


class Gpt(Workload):
    """The examples are windows of a text."""

    Settings = Settings
    noun = "window"
    metrics = (Metric("bits_per_byte", "min"),)
    search = {"learning_rate": Range(1e-4, 3e-3, log=True)}
    recipes = {
        "default": {
            "num_steps": 1000,
            "batch_size": 32,
            "optimizer": "adamw",
            "weight_decay": 0.1,
            "learning_rate": 1e-3,
            "beta2": 0.95,
            "lr_schedule": "cosine",
            "warmup_steps": 50,
            "clip_grad_norm": 1.0,
        }
    }

    def load_data(self) -> Data:
        """Return windows of the text, as views of a mapped file; the last ones are for validation and test."""
        corpus, length = np.memmap(corpus_of(self.settings.text_folder), np.uint8, "r"), self.settings.length
        windows = np.lib.stride_tricks.sliding_window_view(corpus, length + 1)[::length]
        held_out = min(1000, len(windows) // 20)
        ends = [len(windows) - 2 * held_out, len(windows) - held_out]
        train, validation, test = (Arrays(part[:, :-1], part[:, 1:]) for part in np.split(windows, ends))
        return Data(train, test, validation, name=str(self.settings.text_folder or "Python's standard library"))

    def create_model(self) -> nn.Module:
        """Return a new GPT."""
        return GPT(self.settings)

    def prepare(self, inputs: Tensor, generator: torch.Generator | None) -> Tensor:
        """Turn bytes into indices of the embedding."""
        return inputs.long()

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the sum of the cross entropies of a window's bytes."""
        of_bytes = F.cross_entropy(outputs.flatten(0, 1), targets.flatten().long(), reduction="none")
        return of_bytes.view(targets.shape).sum(1)

    def weights(self, targets: Tensor) -> Tensor:
        """Return the number of bytes of each window, so that the loss is a mean over bytes."""
        return torch.full((len(targets),), targets.shape[1], device=targets.device)

    def measure(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return the bits of each window."""
        return {"bits_per_byte": self.loss(outputs, targets) / math.log(2)}

    def create_optimizer(self, model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
        """Return AdamW with decay for matrices only, not for the parameters of normalizations."""
        matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
        others = [parameter for parameter in model.parameters() if parameter.dim() < 2]
        groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, config.learning_rate, (config.beta1, config.beta2), fused=True)

    def complete(self, model: nn.Module, prompt: str) -> str:
        """Return the prompt with its continuation."""
        return continued(model, prompt)


class Sample(Callback):
    """Prints after each validation how the model continues a text."""

    def __init__(self, prompt: str = "class Test") -> None:
        self.prompt = prompt

    def on_start(self, state: TrainingState, group: Group) -> None:
        """Learn which rank this is."""
        self.is_first = group.rank == 0

    def on_validation(self, state: TrainingState, values: dict[str, float]) -> None:
        """Let all ranks continue the text, since a sharded model gathers its weights; print it once."""
        with resharded(state.result), evaluating(state.result):
            text = continued(state.result, self.prompt)
        if self.is_first:
            print(f"after epoch {state.epoch}, it writes: {text!r}")


def continued(model: Any, prompt: str) -> str:
    """Return a prompt with the most probable next bytes, one after another (greedy)."""
    text = torch.tensor([list(prompt.encode() or b"\n")], device=next(model.parameters()).device)
    for _ in range(NUM_CONTINUED):
        logits = model(text[:, -model.places.num_embeddings :])
        text = torch.cat([text, logits[:, -1:].argmax(2)], 1)
    return bytes(text[0].tolist()).decode(errors="replace")


def corpus_of(folder: Path | None) -> Path:
    """Return a file with all texts of a folder, one after another. It is written once on each machine."""
    root = folder or Path(sysconfig.get_paths()["stdlib"])
    files = sorted(path for path in root.rglob("*") if path.suffix in SUFFIXES and "site-packages" not in path.parts)
    content = b"\n".join(path.read_bytes() for path in files)
    corpus = Path("~/.cache/mnist_ray").expanduser() / f"{hashlib.sha256(content).hexdigest()[:16]}.bin"
    if not corpus.exists():
        corpus.parent.mkdir(parents=True, exist_ok=True)
        part = corpus.with_suffix(f".{os.getpid()}")
        part.write_bytes(content)
        part.replace(corpus)
    return corpus
