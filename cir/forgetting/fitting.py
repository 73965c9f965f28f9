"""Subspaces fitted once for a model, from text and contrast facts, and kept for all that it is to forget."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from cir.config import CIRConfig, rank_at
from cir.data.facts import Fact, load_facts
from cir.data.tokens import Batch, windows
from cir.forgetting.batches import chosen
from cir.forgetting.locate import located
from cir.forgetting.memory import TOKENS_AT_ONCE, tokens_at_once
from cir.forgetting.questions import Questions, questions
from cir.forgetting.subspace import SiteSubspaces, Subspace, SubspaceStream
from cir.forgetting.update import fingerprint
from cir.model.capture import AnswerCapture, Tokens, answering
from cir.model.finding import find_stack, unwrapped
from cir.model.shards import processes_of
from cir.model.sites import Target, sites_of
from cir.system.files import strict_json
from cir.system.processes import together
from cir.system.writing import write_file

FORMAT = "cir-subspaces-2"
GRADIENTS_EVERY = 4
"""Windows of text of which one is read for its gradients too, which cost several times as much."""


class Subspaces(SiteSubspaces):
    """Fitted once for a model, and kept for all that it is to forget; :meth:`save` writes and :meth:`load` reads."""

    @property
    def contrast(self) -> list[Fact]:
        """The contrast facts that they were fitted on."""
        found = self.fitted_on.get("contrast")
        return load_facts(found) if found else []

    @classmethod
    def fit(
        cls,
        model: Any,
        tokenizer: Any,
        texts: str | Iterable[str] | None,
        contrast: Any = (),
        *,
        config: CIRConfig | None = None,
        progress: bool = True,
    ) -> Subspaces:
        """What ordinary text and contrast facts use, in one pass over each; no weight changes.

        Of activations that is the second moment of text plus ``contrast_weight`` times that of what contrast facts
        have where their answers are predicted; of gradients, that of the contrast facts' own, each at length 1, plus
        ``text_weight`` times that of text, all of whose tokens are predicted.

        Args:
            model, tokenizer: as for :func:`cir.unlearn`.
            texts: ordinary text, of which ``config.retain_tokens`` are used; None for contrast facts alone.
            contrast: facts that must stay, of the same relations as those to be forgotten and about the same
                subjects; what :func:`cir.load_facts` reads.
            config: see :class:`CIRConfig`.

        Raises:
            ValueError: on bad texts or facts, a rank that some site has not, or nothing to fit on.
        """
        config, model = config or CIRConfig(), unwrapped(model)
        texts = texts if texts is None or isinstance(texts, str) else "\n\n".join(texts)
        facts = load_facts(contrast) if contrast else []
        if texts is None and not facts:
            raise ValueError("expected texts or contrast facts to fit on, got neither")
        with together(processes_of(model)):
            stack = find_stack(model, sharded=True)
            config = located(model, tokenizer, facts, config)
            first = config.first_layer(len(stack.mlps))
            targets = stack.writers(first)
            rows = None if texts is None else chosen(windows(tokenizer, texts, config.retain_length), config)
            with answering(model, stack, first) as tape:
                length, at_once = config.max_length, tokens_at_once(model.device)
                asked = questions(tape, tokenizer, facts, max_length=length, at_once=at_once)
                solved = fitted(tape, targets, rows, asked, config, at_once=at_once, progress=progress)
            fitted_on = {
                "fingerprint": fingerprint(targets),
                "layers": list(range(first, len(stack.mlps))),
                "contrast": [asdict(fact) for fact in facts],
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
        metadata = {"format": FORMAT, "mode": self.mode, "fitted_on": json.dumps(self.fitted_on)}
        write_file(path, lambda partial: save_file(tensors, partial, metadata=metadata))

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> Subspaces:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: if the file holds no subspaces of this format, or some that are not finite.
        """
        try:
            with safe_open(path, "pt", device=str(device)) as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise ValueError(
                        f"{path}: expected a file of format {FORMAT}, got {metadata.get('format')!r:.80}; fit it "
                        "with `cir fit`"
                    )
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
            subspaces = {}
            for key, basis in tensors.items():
                name, _, part = key.rpartition(".")
                if not basis.isfinite().all():
                    raise ValueError(f"{path}, {name!r:.80}: expected finite directions, got NaN or infinity")
                if part == "basis":
                    subspaces[name] = Subspace(basis, tensors.get(f"{name}.mixer"), tensors[f"{name}.variance"])
            return cls(subspaces, metadata["mode"], strict_json(str(path), metadata.get("fitted_on", "{}")))
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"{path}: expected subspaces, got {type(error).__name__}: {error!s:.200}") from error


def fitted(
    tape: AnswerCapture,
    targets: Sequence[Target],
    rows: Tensor | None,
    asked: Sequence[Questions],
    config: CIRConfig,
    *,
    at_once: int = TOKENS_AT_ONCE,
    progress: bool = True,
) -> SiteSubspaces:
    """What :meth:`Subspaces.fit` says, of windows of text ``rows`` (N, L) and of contrast facts as ``asked``."""
    device = targets[0].weight.device
    sites = sites_of(targets)
    for site in sites:
        if rank_at(site, config.rank) > site.width:
            raise ValueError(f"rank: expected at most {site.width}, the width of {site.name}, got {config.rank}")
    stream = SubspaceStream(
        sites,
        rank_activation=config.rank,
        rank_gradient=config.rank,
        mode="ridge",
        ridge_activation=config.ridge_activation,
        ridge_gradient=config.ridge_gradient,
        seed=config.seed,
    )
    of_facts = sum(len(part.at) for part in asked)
    of_text = 0 if rows is None else rows.numel()

    def observe(tokens: Tokens, activation: float, gradient: float) -> None:
        """Each with a weight, which counts as so many tokens do."""
        for site in (site for site in sites if site.name in tokens):
            x = tokens[site.name]
            routes = {site.routes: tokens[site.routes]} if site.experts else {}
            weight = activation if site.kind == "activation" else gradient
            if site.kind == "activation" and weight == 1:
                stream.observe({site.name: x, **routes})  # as it is: half the bytes of float32
            elif weight:
                x = x.float()
                norm = 1.0 if site.kind == "activation" else x.norm(dim=-1, keepdim=True).clamp_min(1e-30)
                stream.observe({site.name: x * (weight**0.5 / norm), **routes})

    weight = GRADIENTS_EVERY * config.text_weight * of_facts / of_text if of_facts and of_text else 1.0
    chunks: list[tuple[Tensor, bool]] = []
    if rows is not None:
        with_gradients = torch.arange(len(rows)) % GRADIENTS_EVERY == (0 if weight else -1)
        # Fewer at a time where all tokens are predicted: their logits are most of what is kept.
        for gradients, tokens in ((False, at_once), (True, min(at_once, TOKENS_AT_ONCE) // 2)):
            parts = rows[with_gradients == gradients].split(max(1, tokens // rows.shape[1]))
            chunks += [(part, gradients) for part in parts if len(part)]
    with tqdm(total=len(chunks) + len(asked), disable=not progress, unit="batch", desc="fitting") as bar:
        for chunk, gradients in chunks:
            batch = Batch(chunk, torch.ones_like(chunk, dtype=torch.bool)).to(device)
            observe(_text_tokens(tape, batch, gradients), 1.0, weight)
            bar.update()
        for facts_asked in asked:
            read = facts_asked.read(tape)
            observe(read.tokens, config.contrast_weight * of_text / of_facts if of_text else 1.0, 1.0)
            bar.update()
    return stream.solve()


def _text_tokens(tape: AnswerCapture, batch: Batch, gradients: bool) -> Tokens:
    """Inputs of all tokens but the last of each row, and gradients of the log-probabilities of those after them."""
    at = batch.predicting(0).nonzero().squeeze(1)
    if not gradients:
        with torch.no_grad():
            return tape.forward(batch, at).tokens
    logits, hidden = tape.predict(tape.below(batch), at)
    following = batch.input_ids[batch.attention_mask].roll(-1)[at].to(logits.device)
    dtype = torch.promote_types(logits.dtype, torch.float32)  # at once: a copy of the logits would be as much again
    return tape.backward(-F.nll_loss(logits.log_softmax(-1, dtype), following, reduction="sum"), hidden)


def check_fitted_on(subspaces: Subspaces, own: str) -> None:
    """Raise ValueError unless ``subspaces`` were fitted on the model whose fingerprint is ``own``."""
    if subspaces.fitted_on.get("fingerprint") != own:
        raise ValueError(
            f"subspaces: expected those of this model, {own[:12]}, got {_of(subspaces)}; fit them with Subspaces.fit"
        )


def _of(subspaces: Subspaces) -> str:
    return str(subspaces.fitted_on.get("fingerprint", "none that say of which model"))[:32]
