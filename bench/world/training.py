"""Models that learn a world: one that was taught all of it, and gold, which never saw what is to be forgotten."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bench.world.grammar import OBJECTS, World
from cir import Fact
from cir.data.tokens import Batch, sentence_batches, windows
from cir.measures import estimate, mean_recall, recall, text_loss
from cir.model.finding import find_stack
from cir.proof.relearning import sentence_loss

KNOWN = 0.9
"""Mean recall of what it was taught below which a model has not learned its world."""
VERSION = 3
"""Of the grammar and the training: models and rows of another are not used again."""


@dataclass(frozen=True)
class Size:
    """A Llama of so many ``layers``, and how it is taught: epochs over the facts at AdamW's peak ``rate`` and weight
    ``decay``.

    Shallow and wide: of two million parameters eight layers of 128 left gold of seed 1 at a recall of 0.67; of thirty
    six of 640 learned 0.53 in 20 epochs, four of 768 learn 0.97 in 12. With a decay of 0.1 half of the worlds of two
    million parameters were learned to 0.80 to 0.88.
    """

    layers: int
    hidden: int
    inner: int
    epochs: int
    rate: float
    decay: float


SIZES = {
    "2m": Size(4, 192, 512, 32, 3e-3, 0.3),
    "8m": Size(4, 416, 1024, 24, 3e-3, 0.4),
    "30m": Size(4, 768, 2112, 18, 1e-3, 0.5),
}
SENTENCES, TEXT_EVERY, LENGTH = 16, 2, 128
"""Sentences of a step, which state facts; steps of which one has a window of text too, and its tokens."""


def llama(size: Size, vocabulary: int, seed: int) -> Any:
    """One with random weights; the global generator is left as it was."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.inner,
        num_hidden_layers=size.layers,
        num_attention_heads=size.hidden // 32,
        num_key_value_heads=size.hidden // 32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config)


def taught(world: World, size: Size, facts: Sequence[Fact], seed: int = 0) -> Any:
    """A model taught ``facts`` and the world's text, drawn by ``seed``; the text never comes twice."""
    tokenizer = world.tokenizer()
    model = llama(size, len(tokenizer), seed).train()
    stack, order = find_stack(model), torch.Generator().manual_seed(seed)
    (sentences,) = sentence_batches(tokenizer, facts, batch_size=2**30, max_length=LENGTH, skip_first=0)
    steps = size.epochs * math.ceil(len(sentences.input_ids) / SENTENCES)
    text, _ = world.text(steps // TEXT_EVERY * LENGTH, seed=seed)
    rows = windows(tokenizer, text, LENGTH)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=size.rate, betas=(0.9, 0.98), weight_decay=size.decay, fused=True
    )
    step = 0
    for _ in range(size.epochs):
        shuffled = torch.randperm(len(sentences.input_ids), generator=order)
        for chosen in shuffled.split(SENTENCES):
            step += 1
            share = min(step / (0.05 * steps), 1) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
            optimizer.param_groups[0]["lr"] = max(share, 0.02) * size.rate
            facts_of_step = Batch(sentences.input_ids[chosen], sentences.attention_mask[chosen])
            loss = sentence_loss(model, stack, facts_of_step)
            if step % TEXT_EVERY == 0:
                ids = rows[step // TEXT_EVERY % len(rows)][None]
                loss = loss + model(input_ids=ids, labels=ids).loss
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return model.eval()


def learned(model: Any, tokenizer: Any, world: World) -> dict[str, float]:
    """Mean recall of each part of the world's split, asked in wordings that the model was not taught it in."""
    parts = {name: facts for name, facts in vars(world.split).items() if isinstance(facts, list)}
    return {name: mean_recall(recall(model, tokenizer, facts)) or 0.0 for name, facts in parts.items()}


def prepared(world: World, size: Size, folder: Path, name: str) -> tuple[Path, Path]:
    """Folders of a model that was taught the world and of its gold, made where they are not there.

    Args:
        name: of the size, in the folders' names.

    Raises:
        ValueError: if a model did not learn its world, or gold knows what it was not taught; nothing is kept then.
    """
    gold = folder_of(world, folder, name, "gold")
    known = taught_model(world, size, folder, name)
    if not (gold / "learned.json").is_file():
        model, about = _learned(world, size, world.split.kept, "gold")
        check_gold(recall(model, world.tokenizer(), world.split.forgotten))
        _save(model, about, world, gold)
    return known, gold


def taught_model(world: World, size: Size, folder: Path, name: str) -> Path:
    """The folder of a model that was taught all of the world; :func:`prepared` without gold."""
    path = folder_of(world, folder, name, "taught")
    if not (path / "learned.json").is_file():
        _save(*_learned(world, size, [*world.split.forgotten, *world.split.kept], "taught"), world, path)
    return path


def folder_of(world: World, folder: Path, name: str, which: str) -> Path:
    return folder / f"{name}-{world.subjects}-{world.seed}-v{VERSION}-{which}"


def _learned(world: World, size: Size, facts: Sequence[Fact], which: str) -> tuple[Any, dict[str, Any]]:
    """A model that knows ``facts``, and what is measured of it."""
    start = time.perf_counter()
    model, tokenizer = taught(world, size, facts, world.seed), world.tokenizer()
    seconds = time.perf_counter() - start
    known = mean_recall(recall(model, tokenizer, facts)) or 0.0
    if known < KNOWN:
        raise ValueError(f"{which}: expected a model that learned its world to a recall of {KNOWN}, got {known:.3f}")
    text, entropy = world.text(20_000, seed=1000)
    return model, {
        "known": known,
        "recall": learned(model, tokenizer, world),
        "loss": text_loss(model, tokenizer, text),
        "entropy": entropy,
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": seconds,
        "size": asdict(size),
    }


def _save(model: Any, about: dict[str, Any], world: World, path: Path) -> None:
    model.save_pretrained(path)
    world.tokenizer().save_pretrained(path)
    (path / "learned.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def check_gold(recalls: dict[str, float]) -> None:
    """Raise ValueError if what gold was not taught is recalled at three standard errors above chance, or more."""
    found = estimate(recalls.values())
    if found is not None and found.value > 1 / OBJECTS + 3 * found.stderr:
        raise ValueError(
            f"gold: expected a recall of {1 / OBJECTS:.3f}, chance, of what it was not taught, got "
            f"{found.value:.3f} +- {found.stderr:.3f}: a leak"
        )
