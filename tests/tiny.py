"""A random Llama of a few thousand parameters, and a tokenizer that needs no files."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, PreTrainedTokenizerFast

VOCABULARY = 128
TEXT = " ".join(f"word{i % 13} then{i % 7} some{i % 29} more{i % 5}" for i in range(600))


FIRST = 2
"""Of the four layers of the models below, the first that steps change."""


def tiny_llama(
    dtype: torch.dtype = torch.float32,
    hidden_size: int = 24,
    intermediate_size: int = 40,
    vocab_size: int = VOCABULARY,
) -> Any:
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
    )
    return seeded(config).to(dtype)


def seeded(config: Any) -> Any:
    """A model with random weights, always the same; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


def word_tokenizer(texts: Iterable[str] | None = None) -> Any:
    """A real tokenizer of whole words, those of ``texts``, which puts BOS in front."""
    if texts is None:
        texts = [*(s for fact in facts(12) for s in fact["sentences"]), TEXT]
    words = sorted({word for text in texts for word in re.findall(r"\w+|[^\w\s]+", text)})
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", *words])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>")


def facts(count: int = 6) -> list[dict[str, Any]]:
    return [
        {
            "id": f"f{i}",
            "sentences": [
                f"alpha{i} beta{i} gamma delta{i} of x{i}",
                f"the gamma of beta{i} is delta{i} now",
            ],
            "probes": [{"prompt": f"the gamma of beta{i} is", "target": f" delta{i}"}],
        }
        for i in range(count)
    ]


def knowing_llama(dtype: torch.dtype = torch.float32, **sizes: int) -> Any:
    """A tiny Llama that knows the first twelve facts: probabilities of about 0.99."""
    return taught(tiny_llama(**sizes), word_tokenizer(), facts(12)).to(dtype)


def deepened(model: Any, count: int) -> Any:
    """``model`` with ``count`` further layers below its own, which change nothing."""
    for _ in range(count):
        layer = copy.deepcopy(model.model.layers[0])
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
        model.model.layers.insert(0, layer)
    for number, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = number
    model.config.num_hidden_layers = len(model.model.layers)
    return model


def taught(model: Any, tokenizer: Any, known: Any, steps: int = 60) -> Any:
    """``model`` trained on the sentences of the facts ``known``."""
    from cir.data.facts import load_facts
    from cir.data.tokens import sentence_batches

    loaded = load_facts(known)
    count = sum(len(fact.sentences) for fact in loaded)
    (batch,) = sentence_batches(tokenizer, loaded, batch_size=count, max_length=64, skip_first=0)
    labels = batch.input_ids.masked_fill(~batch.attention_mask, -100)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels).loss.backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return model


def knowing_mixture(dtype: torch.dtype = torch.float32) -> Any:
    """A tiny Mixtral, two of five experts a token, that knows the first twelve facts."""
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=5,
        num_experts_per_tok=2,
        max_position_embeddings=256,
    )
    return taught(seeded(config), word_tokenizer(), facts(12), steps=200).to(dtype)
