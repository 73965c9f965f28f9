"""Subspaces fitted once for a model, from text and contrast facts, and kept for all its edits."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from cir.config import CIRConfig
from cir.data.facts import load_facts
from cir.forgetting.batches import benign_batches, fact_batches
from cir.forgetting.forgetter import Forgetter
from cir.forgetting.subspace import SiteSubspaces, Subspace
from cir.forgetting.update import fingerprint
from cir.model.capture import capture
from cir.model.sites import find_stack, sites_of

FORMAT = "cir-subspaces-1"
CONFIG = CIRConfig(rank_background=256, rank_activation=192, rank_gradient=192)
"""More directions than a run over many facts collapses: what contrast facts share is all that keeps them apart."""


class Subspaces(SiteSubspaces):
    """Fitted once for a model, and kept for all its edits: what :meth:`save` writes and :meth:`load` reads."""

    @classmethod
    def fit(
        cls,
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
        return cls(solved, solved.mode, json.loads(json.dumps(fitted_on)))  # as it is read back

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, whole or not at all."""
        tensors = {
            f"{name}.{part}": tensor.detach().cpu().contiguous()
            for name, subspace in self.items()
            for part, tensor in vars(subspace).items()
            if tensor is not None
        }
        path = Path(path)
        partial = path.with_name(path.name + ".partial")
        try:
            metadata = {"format": FORMAT, "mode": self.mode, "fitted_on": json.dumps(self.fitted_on)}
            save_file(tensors, partial, metadata=metadata)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> Subspaces:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: if the file holds no subspaces of this format.
        """
        with safe_open(path, "pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"{path}: expected a file of format {FORMAT}, got {metadata.get('format')}")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
        subspaces = {}
        for key, basis in tensors.items():
            name, _, part = key.rpartition(".")
            if part == "basis":
                subspaces[name] = Subspace(basis, tensors.get(f"{name}.mixer"), tensors[f"{name}.variance"])
        return cls(subspaces, metadata["mode"], json.loads(metadata.get("fitted_on", "{}")))


def check_fitted_on(subspaces: Subspaces, own: str) -> None:
    """Raise ValueError unless ``subspaces`` were fitted on the model whose fingerprint is ``own``."""
    if subspaces.fitted_on.get("fingerprint") != own:
        raise ValueError(
            f"subspaces: expected those of this model, {own[:12]}, got {_of(subspaces)}; fit them with Subspaces.fit"
        )


def _of(subspaces: Subspaces) -> str:
    return str(subspaces.fitted_on.get("fingerprint", "none that say of which model"))[:32]
