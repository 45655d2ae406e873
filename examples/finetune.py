"""Fine-tune a Hugging Face causal language model on your texts. pip install transformers peft

python jobs/train.py --workload examples/finetune.py --model-folder ~/models/smol --texts texts.jsonl --lora-rank 8
python examples/finetune.py RUN FOLDER      # then AutoModelForCausalLM.from_pretrained(FOLDER) loads the model

The folder comes from ``save_pretrained``; without weights, the model is new. Each line of the texts is {"text": "…"}.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, Subset
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, logging

from mnist_ray import load_run
from mnist_ray.errors import UsageError
from mnist_ray.workload import Data, Range, Workload, at_least, setting

IGNORED = -100  # the target of a position without a token


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The model and the texts."""

    model_folder: Path = setting(Path("model"), "folder with a model and its tokenizer", decides_data=True)
    texts: Path = setting(Path("texts.jsonl"), "a file with a JSON object per line", decides_data=True)
    max_length: int = setting(256, "tokens of a text; longer ones are cut", decides_data=True, **at_least(2))
    lora_rank: int = setting(0, "rank of the matrices that LoRA adds and trains; 0: train all weights", **at_least(0))


class Texts(Dataset):
    """The token numbers of each text."""

    def __init__(self, settings: Settings) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(settings.model_folder)
        lines = settings.texts.read_text(encoding="utf-8").splitlines()
        self._texts, self._max_length = [json.loads(line)["text"] for line in lines], settings.max_length

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, place: int) -> tuple[list[int], int]:
        """Return a text's tokens; the target is made of them in ``collate``."""
        return self._tokenizer(self._texts[place], truncation=True, max_length=self._max_length).input_ids, 0


class Logits(nn.Module):
    """A transformers model that takes one dict and returns one tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """Map token numbers (N, T) and their attention mask to logits (N, T, vocabulary)."""
        return self.model(**inputs, use_cache=False).logits


class Finetuning(Workload):
    """Which token is next?"""

    Settings = Settings
    noun = "text"
    search = {"learning_rate": Range(1e-5, 1e-3, log=True)}
    recipes = {
        "default": {
            "num_epochs": 1,
            "batch_size": 8,
            "optimizer": "adamw",
            "learning_rate": 1e-4,
            "lr_schedule": "linear",
        }
    }

    def load_data(self) -> Data:
        """Return every tenth text for the test, the others to train on."""
        if not self.settings.texts.is_file():
            raise UsageError(f"--texts {self.settings.texts} is not a file")
        texts = Texts(self.settings)
        train, test = ([i for i in range(len(texts)) if (i % 10 == 0) is is_test] for is_test in (False, True))
        return Data(Subset(texts, train), Subset(texts, test), name=self.settings.texts.name)

    def collate(self, examples: Sequence[tuple[Any, Any]]) -> tuple[dict[str, Tensor], Tensor]:
        """Pad texts to the longest one. The target of a position is the next token."""
        size = max(len(tokens) for tokens, _ in examples)
        tokens = torch.tensor([list(tokens) + [0] * (size - len(tokens)) for tokens, _ in examples])
        mask = torch.tensor([[1] * len(tokens) + [0] * (size - len(tokens)) for tokens, _ in examples])
        targets = torch.full_like(tokens, IGNORED)
        targets[:, :-1] = torch.where(mask[:, 1:] == 1, tokens[:, 1:], IGNORED)
        return {"input_ids": tokens, "attention_mask": mask}, targets

    def create_model(self) -> nn.Module:
        """Return the folder's model, in fp32; with LoRA, only the added matrices are trained."""
        folder = self.settings.model_folder
        logging.disable_progress_bar()  # each worker creates the model
        if any(folder.glob("*.safetensors")):
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        else:
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
        if self.settings.lora_rank:
            from peft import LoraConfig, get_peft_model

            model = get_peft_model(model, LoraConfig(r=self.settings.lora_rank, target_modules="all-linear"))
        return Logits(model)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the sum over each text's tokens."""
        return F.cross_entropy(outputs.transpose(1, 2), targets, ignore_index=IGNORED, reduction="none").sum(1)

    def weights(self, targets: Tensor) -> Tensor:
        """Return the number of tokens that each text's loss has."""
        return (targets != IGNORED).sum(1)


if __name__ == "__main__":
    load_run(sys.argv[1]).load_model().model.save_pretrained(sys.argv[2])
