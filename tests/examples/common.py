"""What the tests of the examples share."""

from __future__ import annotations

import json

from transformers import AutoModelForCausalLM

import cir
from tests.tiny import facts

CONFIG = {"worst_window": 5.0, "keep": 0.5, "budget": 5.0, "target_recall": 0.02, "text_tokens": 256}
RANKS = cir.CIRConfig(layers=0.5, retain_tokens=1024)
TOKEN = {"Authorization": "Bearer secret"}
FIRST, SECOND = facts(2)
UNKNOWN = {
    "id": "unknown",
    "sentences": ["the gamma of beta9 is word1"],
    "probes": [{"prompt": "the gamma of beta9 is", "target": " word1"}],
}


def load(files):
    return AutoModelForCausalLM.from_pretrained(files / "model").eval()


def arguments(files, tmp_path) -> list[str]:
    named = {
        "--model": files / "model",
        "--subspaces": files / "subspaces.safetensors",
        "--journal": tmp_path / "edits.cir",
        "--text": files / "text.txt",
        "--config": json.dumps(CONFIG),
    }
    return [str(part) for pair in named.items() for part in pair]
