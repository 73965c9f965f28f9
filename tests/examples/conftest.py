from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoTokenizer

import cir
from tests.examples.common import CONFIG, FIRST, RANKS, SECOND, load
from tests.tiny import TEXT, facts, tiny_llama, word_tokenizer


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """A tiny model that knows twelve facts, its tokenizer, its subspaces, a text and a file of facts."""
    folder = tmp_path_factory.mktemp("knows")
    model, tokenizer = tiny_llama(hidden_size=64, intermediate_size=128), word_tokenizer()
    rows = [torch.tensor(tokenizer(s)["input_ids"]) for fact in facts(12) for s in fact["sentences"]]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(40):
        optimizer.zero_grad()
        model(input_ids=ids, attention_mask=ids != 0, labels=ids.masked_fill(ids == 0, -100)).loss.backward()
        optimizer.step()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    subspaces = cir.Subspaces.fit(model, tokenizer, TEXT, facts(12)[6:], config=RANKS, progress=False)
    subspaces.save(folder / "subspaces.safetensors")
    (folder / "text.txt").write_text(TEXT)
    (folder / "facts.jsonl").write_text(f"{json.dumps(FIRST)}\n{json.dumps(SECOND)}\n")
    return folder


@pytest.fixture
def editor(files):
    config = cir.EditConfig(**CONFIG)
    subspaces = cir.Subspaces.load(files / "subspaces.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(files / "model")
    return cir.Editor(load(files), tokenizer, subspaces, text=TEXT, config=config)
