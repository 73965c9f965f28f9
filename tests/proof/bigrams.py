"""A model whose every probability is told, and files of rows."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import torch

from tests.tiny import word_tokenizer

WORDS = "<s> Question Answer : . ? " + " ".join(f"w{i}" for i in range(200))


class Bigrams:
    """A model that says each next word by the last alone, with the probabilities given; all others share the rest."""

    device = torch.device("cpu")

    def __init__(self, tokenizer, told: dict[str, dict[str, float]]):
        self.prompts: list[str] = []
        self._tokenizer = tokenizer
        size = len(tokenizer)
        table = torch.full((size, size), 1 / size, dtype=torch.float64)
        for word, nexts in {**told, ".": {".": 0.9}}.items():
            row = table[tokenizer.convert_tokens_to_ids(word)]
            row[:] = (1 - sum(nexts.values())) / (size - len(nexts))
            for following, probability in nexts.items():
                row[tokenizer.convert_tokens_to_ids(following)] = probability
        self._logits = table.log().float()

    def __call__(self, input_ids, attention_mask=None, use_cache=False, logits_to_keep=None):
        logits = self._logits[input_ids]
        return SimpleNamespace(logits=logits if logits_to_keep is None else logits[:, logits_to_keep])

    def generate(self, input_ids, attention_mask, max_new_tokens, do_sample, num_beams, pad_token_id):
        assert (do_sample, num_beams) == (False, 1)
        self.prompts += [
            self._tokenizer.decode(ids[kept]) for ids, kept in zip(input_ids, attention_mask.bool(), strict=True)
        ]
        for _ in range(max_new_tokens):
            input_ids = torch.cat([input_ids, self._logits[input_ids[:, -1:]].argmax(-1)], 1)
        return input_ids


def words(*texts) -> object:
    return word_tokenizer([WORDS, *texts])


def saved(path: Path, rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
