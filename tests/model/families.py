"""Every causal language model of the installed transformers, tiny and with random weights: is each edited exactly, or
refused with the reason? ``python -m tests.model.families`` writes docs/families.md.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from cir.data.tokens import pad
from cir.model.capture import answering, capture
from cir.model.finding import find_stack
from cir.model.sites import Target

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "docs" / "families.md"
FAMILIES = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
CLOSE = 1e-4
"""Of the largest: what rounding in float32 may make of a row, over three layers."""
MOST = 3e7
"""Parameters of what counts as tiny."""
_WIDTH = dict.fromkeys(
    ("hidden_size", "n_embd", "d_model", "dim", "word_embed_proj_dim", "embedding_size", "conv_dim"), 32
)
_WIDTH |= {"lru_width": 32}
_INNER = dict.fromkeys(
    ("intermediate_size", "ffn_dim", "n_inner", "decoder_ffn_dim", "inner_dim", "ffn_hidden_size"), 48
)
_INNER |= dict.fromkeys(("block_ff_dim", "d_ff", "ff_dim", "dff"), 48)
_INNER |= dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 24)
_DEPTH = dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), 3)
_HEADS = dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4)
_HEADS |= {"num_key_value_heads": 2, "num_kv_heads": 2, "num_global_key_value_heads": 2}
_HEADS |= {"head_dim": 8, "global_head_dim": 8, "rotary_dim": 4}
_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
_EXPERTS = dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4)
_EXPERTS |= {
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
}
_STATE = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_ssm": 64, "mamba_n_groups": 1, "mamba_d_state": 8}
_STATE |= {"state_size": 8, "ssm_state_size": 8, "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 1}
_STATE |= {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_TOKENS = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "sliding_window": 64}
_TOKENS |= dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), 128)
_TOKENS |= {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 64, "num_kv_shared_layers": 0}
SMALL = {**_WIDTH, **_INNER, **_DEPTH, **_HEADS, **_LATENT, **_EXPERTS, **_STATE, **_TOKENS}
"""Sizes under all the names that configurations have for them."""

SLIDING = {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}
OWN: dict[str, dict[str, Any]] = {
    "gemma3n_text": {**SLIDING, "intermediate_size": [48] * 3, "activation_sparsity_pattern": [0.0] * 3},
    "gemma4_text": {**SLIDING, "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2},
    "granitemoeshared": {"shared_intermediate_size": 40},
}
"""What some configurations need besides, all of it when they are made."""

SENTENCES = ([1, 5, 9, 12, 7, 3], [1, 8, 4, 33], [1, 20, 21, 22, 23])
ASKED = ((0, 2), (0, 4), (1, 2), (2, 2))
"""The sentence, and the place in it, after which each of the following tokens is asked for."""
ANSWERS = (3, 5, 7, 9)


def build(family: str) -> Any:
    """A model of it with tiny sizes; raises what transformers does, or OverflowError where its sizes are others."""
    kind = CONFIG_MAPPING[family]
    taken = set(inspect.signature(kind.__init__).parameters) | set(getattr(kind, "__annotations__", {}))
    sizes = {name: value for name, value in SMALL.items() if name in taken} | OWN.get(family, {})
    try:
        config = kind(**sizes)
    except Exception:  # sizes that do not go together at first
        config = kind()
    parts = [getattr(config, name, None) for name in ("text_config", "decoder", "llm_config")]
    for part in [config, *(part for part in parts if hasattr(part, "to_dict"))] if family not in OWN else ():
        _shrink(part)
    with contextlib.suppress(AttributeError), torch.device("meta"):  # which some state-space models cannot be made on
        empty = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        if sum(parameter.numel() for parameter in empty.parameters()) > MOST:
            raise OverflowError
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def _shrink(config: Any) -> None:
    latent = hasattr(config, "kv_lora_rank")
    for name, value in {**SMALL, **({"num_key_value_heads": 4} if latent else {})}.items():
        try:
            if hasattr(config, name):
                setattr(config, name, value)
        except Exception:  # one that differs by layer, or is made of others
            continue
    for name in ("layer_types", "mlp_layer_types"):
        with contextlib.suppress(AttributeError):  # one that is made of others
            if kinds := getattr(config, name, None):
                setattr(config, name, (list(dict.fromkeys(kinds)) * 3)[:3])


def difference(model: Any) -> float:
    """How far what is captured is from autograd's of each sentence alone, as a share of the largest: logits, and the
    rows of all that is edited, by the default method and by the paper's.
    """
    stack = find_stack(model)
    batch, first, last = pad(SENTENCES), 1, len(stack.mlps) - 2
    starts = [sum(map(len, SENTENCES[:number])) for number in range(len(SENTENCES))]
    at, answers = torch.tensor([starts[sentence] + place for sentence, place in ASKED]), torch.tensor(ANSWERS)
    every = torch.arange(sum(map(len, SENTENCES)))
    with answering(model, stack, first) as tape:
        logits, hidden = tape.predict(tape.below(batch), every)
        loss = logits[at].float().log_softmax(-1)[torch.arange(len(answers)), answers].sum()
        asked = dict(tape.backward(loss, hidden))
    broken: dict[str, Tensor] | None = None
    if stack.mlps[last].module is not None:
        with capture(model, stack, last) as tape:
            hidden = tape.forward(batch, every)
            broken = tape.backward((hidden.mlp_outputs((last,))[last].float() ** 2).sum(), hidden)

    def of_answers(number: int, out: Tensor, kept: Kept) -> Tensor:
        places = [(place, ANSWERS[n]) for n, (of, place) in enumerate(ASKED) if of == number]
        return torch.stack([out[place].float().log_softmax(-1)[answer] for place, answer in places]).sum()

    def of_mlp(number: int, out: Tensor, kept: Kept) -> Tensor:
        return (kept[MLP][1].float() ** 2).sum()

    written = stack.writers(first)
    targets = [*written, *(t for mlp in stack.mlps[first:] for t in mlp.targets if t not in written)]
    said, alone = _by_autograd(model, targets, None, of_answers)
    pairs = [(said, logits.detach()), *_compared(targets, alone, asked)]
    if broken is not None:
        _, alone = _by_autograd(model, stack.targets(last), stack.mlps[last].module, of_mlp)
        pairs += _compared(stack.targets(last), alone, broken)
    return max(float((a - b).abs().max() / a.abs().max().clamp_min(1e-30)) for a, b in pairs)


Kept = dict[str, tuple[Tensor, Tensor]]
"""Of each linear what it read and put out; and of the MLP whose outputs are broken."""
MLP = "the MLP"


def _compared(targets: Sequence[Target], alone: dict[str, Tensor], rows: dict[str, Tensor]) -> Pairs:
    """What is to be the same: the rows of each site, and of experts the gradient of all their weights."""
    found = []
    for target in targets:
        if not target.experts:
            found += [(alone[site.name], rows[site.name]) for site in target.sites]
            continue
        whole = torch.zeros_like(target.weight)
        for part in target.parts(rows):
            whole[part.number] = part.gradient.T @ part.activation
        found.append((alone[target.name], whole if target.parameter.shape == whole.shape else whole.mT))
    return found


Pairs = list[tuple[Tensor, Tensor]]


def _by_autograd(
    model: Any, targets: Sequence[Target], mlp: Any, loss_of: Callable[[int, Tensor, Kept], Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits of each sentence alone, and the rows of each site, by plain hooks; of experts the weights' gradient."""
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    said, rows, summed = [], defaultdict(list), dict[str, Tensor]()
    linears, experts = ([t for t in targets if bool(t.experts) == kind] for kind in (False, True))
    for number, sentence in enumerate(SENTENCES):
        kept: Kept = {}
        hooks = [target.linear.register_forward_hook(_keeping(kept, target.name)) for target in linears]
        hooks += [mlp.register_forward_hook(_keeping(kept, MLP))] if mlp is not None else []
        out = model(input_ids=torch.tensor([sentence]), use_cache=False).logits[0]
        for hook in hooks:
            hook.remove()
        wanted = [*(kept[target.name][1] for target in linears), *(target.parameter for target in experts)]
        grads = torch.autograd.grad(loss_of(number, out, kept), wanted, allow_unused=bool(experts))
        said.append(out.detach())
        for target, grad in zip(linears, grads, strict=False):
            rows[target.gradient.name].append(grad.flatten(0, -2))
            if len(rows[target.activation.name]) == number:
                rows[target.activation.name].append(kept[target.name][0].detach().flatten(0, -2))
        for target, grad in zip(experts, grads[len(linears) :], strict=True):
            summed[target.name] = summed.get(target.name, 0) + (torch.zeros(()) if grad is None else grad)
    return torch.cat(said), {**{name: torch.cat(parts) for name, parts in rows.items()}, **summed}


def _keeping(kept: Kept, name: str) -> Callable[[Any, Any, Any], None]:
    return lambda module, args, output: kept.update(
        {name: (args[0] if args else torch.empty(0), output[0] if isinstance(output, tuple) else output)}
    )


def outcome(family: str) -> str:
    """``exact``, of mixtures with all experts, or why it is not tried or refused; else ``wrong`` or ``crashed``."""
    try:
        model = build(family)
    except Exception as error:
        return f"not tried: no tiny one is built ({type(error).__name__})"
    try:
        found = difference(model)
    except ValueError as error:
        return f"refused: {_kind(str(error))}"
    except Exception as error:
        return f"crashed: {type(error).__name__}: {error!s:.200}"
    if found >= CLOSE:
        return f"wrong: {found:.1e} off"
    mixture = any(target.experts for mlp in find_stack(model).mlps for target in mlp.targets)
    return f"exact{', all experts' if mixture else ''}"


REASONS = {
    "experts as transformers has them": "experts of another kind",
    "got none in [": "layers of several kinds, some without an MLP",
    "with an MLP of linears": "no MLP of linears in its layers (state-space, encoder or other blocks)",
    "run for every token": "a decoder with cross-attention, of an encoder that is not there",
    "expected one MLP": "several MLPs a layer",
    "run on input_ids": "layers that are run more than once",
    "further axes": "a residual stream of several",
    "expected logits": "an LM head that predicts several tokens at once",
}
"""What the refusals say, in the table's words."""


def _kind(message: str) -> str:
    return next((kind for part, kind in REASONS.items() if part in message), message[:100])


def table() -> str:
    """docs/families.md."""
    found = defaultdict(list)
    for family in FAMILIES:
        found[outcome(family)].append(family)
    tried = sum(len(names) for what, names in found.items() if not what.startswith("not tried"))
    lines = [
        "# Which models",
        "",
        f"Every causal language model of transformers {version('transformers')}, {len(FAMILIES)} by their names",
        f"there; {tried} of them are built with tiny sizes and random weights. **Exact** means that logits, and the",
        "rows of every linear that is edited, by the default method and by the paper's, are within a ten-thousandth",
        "of autograd's of each sentence alone, in float32; of experts the gradient of all their weights. The paper's",
        "way refuses those whose layers have two modules that say what an MLP does, such as Gemma 4 with experts.",
        "All others are refused, with the reason, before a weight changes. Written by",
        "`python -m tests.model.families`, and held by `tests/model/test_families.py`.",
        "",
        "| | models |",
        "|---|---|",
    ]
    order = sorted(found, key=lambda what: (not what.startswith("exact"), what.startswith("not"), what))
    lines += [f"| {_said(what)} ({len(found[what])}) | {', '.join(found[what])} |" for what in order]
    return "\n".join(lines) + "\n"


def _said(what: str) -> str:
    return f"**{what}**" if what.startswith("exact") else what


if __name__ == "__main__":
    TABLE.write_text(table(), encoding="utf-8")
    sys.stdout.write(TABLE.read_text(encoding="utf-8"))
