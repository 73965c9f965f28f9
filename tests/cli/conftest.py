from __future__ import annotations

import json

import pytest

from cir import cli
from tests.tiny import TEXT, facts, tiny_llama, word_tokenizer


@pytest.fixture
def files(tmp_path):
    """A saved tiny model wide enough for the default ranks, facts and text."""
    folder = tmp_path / "in"
    tiny_llama(hidden_size=160, intermediate_size=192).save_pretrained(folder / "model")
    word_tokenizer().save_pretrained(folder / "model")
    (folder / "facts.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in facts()))
    (folder / "text.txt").write_text(TEXT)
    (folder / "bad.jsonl").write_text(json.dumps(facts()[0]) + "\n{}\n")
    return folder


def run(files, *arguments: str) -> int:
    return cli.main([a.replace("IN/", f"{files}/") for a in arguments])
