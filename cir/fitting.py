"""Subspaces fitted once for a model, from text and contrast facts, and kept for all its edits."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, replace
from typing import Any

from tqdm.auto import tqdm

from cir.capture import capture
from cir.config import CIRConfig
from cir.engine import fingerprint
from cir.facts import load_facts
from cir.forget import Forgetter
from cir.sites import find_stack, sites_of
from cir.subspace import Subspaces
from cir.unlearning import benign_batches, fact_batches

CONFIG = CIRConfig(rank_background=256, rank_activation=192, rank_gradient=192)
"""More directions than a run over many facts collapses: what contrast facts share is all that keeps them apart."""


def fit(
    model: Any,
    tokenizer: Any,
    texts: str | Iterable[str] | None,
    contrast: Any = (),
    *,
    config: CIRConfig | None = None,
    known: Subspaces | None = None,
    progress: bool = True,
) -> Subspaces:
    """Bases of what ordinary text and contrast facts have in common, in one pass over each; no weight changes.

    The text gives ``rank_background`` directions of the activations; on what they leave, the contrast facts give
    ``rank_activation`` and, of the gradients that would make the model forget them, ``rank_gradient``. Each has
    directions of its own, so that neither drowns the other, whatever their amounts.

    Args:
        model, tokenizer: as for :func:`cir.unlearn`.
        texts: ordinary text, of which ``config.retain_tokens`` are used; None for contrast facts alone.
        contrast: facts of the kind that will be edited, and that must stay; what :func:`cir.load_facts` reads.
        config: ranks, loss layers and seeds; :data:`CONFIG` by default.
        known: subspaces of the same model to be refreshed: theirs are kept, and the directions that ``texts`` and
            ``contrast`` add to them come on top.

    Raises:
        ValueError: on bad texts, facts or ranks, ``known`` of another model, or nothing to fit on.
    """
    config = config or CONFIG
    texts = texts if texts is None or isinstance(texts, str) else "\n\n".join(texts)
    facts = load_facts(contrast) if contrast else []
    if texts is None and not facts:
        raise ValueError("expected texts or contrast facts to fit on, got neither")
    stack = find_stack(model)
    layers = config.layers(len(stack.mlps))
    targets = stack.targets(layers[-1])
    config.check_ranks(sites_of(targets))
    own = fingerprint(targets)
    if known is not None and known.fitted_on.get("fingerprint") != own:
        raise ValueError(f"known: expected subspaces of this model, {own[:12]}, got {_of(known)}")
    # Of contrast facts all that is said must stay, the answers too; there is no step to retain after.
    config = replace(config, to_answers=False, word_dropout=0.0, retain_rate=0.0)
    batches = fact_batches(tokenizer, facts, config, model.device)
    background = [] if texts is None else benign_batches(tokenizer, texts, config, model.device)
    if not background:
        config = replace(config, rank_background=0)
    with (
        capture(model, stack, layers[-1]) as tape,
        tqdm(total=len(background) + len(batches), disable=not progress, unit="batch", desc="fitting") as bar,
    ):
        forgetter = Forgetter(tape, targets, layers, batches, background, config, known=known)
        forgetter.fit(bar.update)
        solved = forgetter.subspaces
    earlier = known.fitted_on["contrast"] if known is not None else []
    fitted_on = {
        "fingerprint": own,
        "layers": list(layers),
        "contrast": [*earlier, *(asdict(fact) for fact in facts)],
    }
    return Subspaces(solved, solved.mode, json.loads(json.dumps(fitted_on)))  # as it is read back


def check_fitted_on(subspaces: Subspaces, own: str) -> None:
    """Raise ValueError unless ``subspaces`` were fitted on the model whose fingerprint is ``own``."""
    if subspaces.fitted_on.get("fingerprint") != own:
        raise ValueError(
            f"subspaces: expected those of this model, {own[:12]}, got {_of(subspaces)}; fit them with Subspaces.fit"
        )


def _of(subspaces: Subspaces) -> str:
    return str(subspaces.fitted_on.get("fingerprint", "none that say of which model"))[:32]
