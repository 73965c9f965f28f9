"""A certificate: what was forgotten, every measure and attack before and after, and all it takes to check it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from cir.data.facts import Fact, check_apart, leaking, split_facts
from cir.data.sampling import spread
from cir.data.tokens import windows
from cir.forgetting.report import hash_facts, library_versions
from cir.forgetting.update import fingerprint_of, snapshot
from cir.measures import (
    WINDOW,
    Estimate,
    Reference,
    estimate,
    evaluate,
    recall,
    reference_of,
    token_losses,
    unknown_facts,
)
from cir.model.finding import find_stack, unwrapped
from cir.model.shards import check_whole
from cir.proof.attacks import attack
from cir.proof.page import page
from cir.proof.relearning import worst_relearning
from cir.proof.stated import FORMAT, check_content, check_signature, fingerprint, signature, signer
from cir.proof.verdict import Thresholds, judge
from cir.system.files import strict_json
from cir.system.writing import MARK

NAME, PAGE, REFERENCE = "certificate.json", "certificate.html", "certificate-reference.safetensors"
SIGNATURE = "certificate.sig"
MOST_BYTES = 2**26
"""Of a certificate that is read."""
ATTACKER_KNOWS = 0.8


@dataclass(frozen=True)
class Evidence:
    """What a certificate is measured on.

    Attributes:
        facts: all that is forgotten. text: ordinary text.
        neighbours: what must stay: the same relations of other subjects. same_subject: and other relations of the
            same subjects, the other side of a fact.
        related: what an attacker knows besides: four fifths of ``facts``, on which the attacks that learn anything
            are made (the T split), while the other fifth (V) shows what they bring back.
        sources: where these came from, for people and for ``cir verify``.
        text_tokens: of the text measured, evenly spread. generate: tokens of greedy continuations.
        relearning: attack by fine-tuning too: the strongest attack, and by far the slowest.
        seed: of the split and of the attacks' draws.

    Raises:
        ValueError: if splits overlap, a probe gives its answer away, or there are no facts or neighbours to ask for.
    """

    facts: Sequence[Fact]
    neighbours: Sequence[Fact]
    text: str
    related: Sequence[Fact] = ()
    sources: Mapping[str, Any] = field(default_factory=dict)
    text_tokens: int = 8192
    generate: int = 12
    relearning: bool = True
    seed: int = 0
    same_subject: Sequence[Fact] = ()

    def __post_init__(self) -> None:
        for name, facts in (("facts", self.facts), ("neighbours", self.neighbours)):
            if not any(fact.probes or fact.choices for fact in facts):
                raise ValueError(f"{name}: expected some with probes or choices, got none: nothing could be shown")
        for others in (self.neighbours, self.same_subject, self.related):
            check_apart(others, self.facts)
        if told := leaking([*self.facts, *self.neighbours, *self.same_subject]):
            raise ValueError(f"expected probes that do not hold their answer, got some of {', '.join(told[:5])}")

    @property
    def settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("text_tokens", "generate", "relearning", "seed")}

    def hashes(self) -> dict[str, str]:
        """SHA-256 of each part."""
        names = ["facts", "neighbours", "related", *(["same_subject"] if self.same_subject else [])]
        parts = {name: hash_facts(getattr(self, name)) for name in names}
        return {**parts, "text": hashlib.sha256(self.text.encode()).hexdigest()}


@dataclass
class Examination:
    """A model's measures, the outcome of attacks on it, and its recall by fact id; ``kept``: by measure of what
    should stay, the recall of each fact or the loss of each window of text, so that each can be its own control.
    """

    measures: dict[str, Estimate]
    attacks: dict[str, Estimate]
    recall: dict[str, float]
    kept: dict[str, dict[str, float]]


class Examiner:
    """Measures one model before and after it forgets, on the same evidence.

    Made before: facts that the model does not know are set aside, and counted nowhere.

    Args:
        model, tokenizer: in the state to compare with. evidence: see :class:`Evidence`.
        unknown, reference: of an earlier examiner, so that a certificate can be checked without that state.

    Raises:
        ValueError: if the model knows none of the facts, or the text is shorter than a window.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        evidence: Evidence,
        *,
        unknown: Sequence[str] | None = None,
        reference: Reference | None = None,
        progress: bool = True,
    ) -> None:
        model = unwrapped(model)
        check_whole(model)
        self._model, self._tokenizer, self._evidence, self._progress = model, tokenizer, evidence, progress
        self.unknown = list(unknown_facts(model, tokenizer, evidence.facts) if unknown is None else unknown)
        self._facts = [fact for fact in evidence.facts if fact.id not in self.unknown]
        if not self._facts:
            raise ValueError("facts: expected some that the model knows, got none")
        taught, self._probed = split_facts(self._facts, ATTACKER_KNOWS, evidence.seed)
        self._related = [*taught, *evidence.related]
        rows = spread(windows(tokenizer, evidence.text, WINDOW), evidence.text_tokens)
        self.reference = reference or reference_of(model, rows)

    @property
    def attacker(self) -> dict[str, Any]:
        """How many facts the attacks that learn are taught, and the ids of those that all attacks ask for."""
        return {"taught": len(self._related), "asked": [fact.id for fact in self._probed]}

    def examine(self, original: Mapping[str, Tensor] | None = None) -> Examination:
        """Every measure and attack on the model as it is; it ends as it came in.

        ``original``: parameters by name from before it forgot, for the attack that undoes small changes.
        """
        model, tokenizer, evidence = self._model, self._tokenizer, self._evidence
        measured = evaluate(model, tokenizer, self._facts, generate=evidence.generate, reference=self.reference)
        kept = {
            "neighbour_recall": recall(model, tokenizer, evidence.neighbours),
            "same_subject_recall": recall(model, tokenizer, evidence.same_subject),
        }
        losses = token_losses(model, self.reference.rows).mean(1).tolist()
        kept["loss"] = {str(window): loss for window, loss in enumerate(losses)}
        means = {name: mean for name, values in kept.items() if (mean := estimate(values.values()))}
        kept = {name: kept[name] for name in means}
        attacks = attack(model, tokenizer, self._probed, related=self._related, original=original, seed=evidence.seed)
        if evidence.relearning and self._related:
            relearned = worst_relearning(model, tokenizer, self._related, self._probed, progress=self._progress)
            attacks |= {f"relearning, {name}": outcome for name, outcome in relearned.items()}
        return Examination({**measured.measures, **means}, attacks, measured.recall, kept)


class Witness:
    """Examines a model when made and, once it has forgotten, again: the two make its certificate.

    Keeps copies of the MLP weights on the host.

    Raises:
        ValueError: see :class:`Examiner`.
    """

    def __init__(self, model: Any, tokenizer: Any, evidence: Evidence, *, progress: bool = True) -> None:
        self._model, self._evidence = unwrapped(model), evidence
        self._examiner = Examiner(model, tokenizer, evidence, progress=progress)
        self._hash, self._before = weights_hash(model), self._examiner.examine()
        stack = find_stack(self._model)
        targets = stack.targets(len(stack.mlps) - 1)
        names = [target.parameter_name for target in targets]
        self._original = dict(zip(names, snapshot(targets), strict=True))

    def certificate(self, method: Mapping[str, Any], thresholds: Thresholds | None = None) -> Certificate:
        """What happened to the model since, by ``method``, which is to be noted, and the verdict on it against
        ``thresholds``.
        """
        after = self._examiner.examine(self._original)
        content = {
            "format": FORMAT,
            "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "signer": None,
            "method": dict(method),
            "sources": dict(self._evidence.sources),
            "settings": self._evidence.settings,
            "data_sha256": self._evidence.hashes(),
            "weights_sha256": {"before": self._hash, "after": weights_hash(self._model)},
            "set_aside": self._examiner.unknown,
            "attacker": self._examiner.attacker,
            "before": asdict(self._before),
            "after": asdict(after),
            "thresholds": asdict(thresholds or Thresholds()),
            "versions": library_versions(),
        }
        content["verdict"] = judge(content).stated()
        check_content({**content, "files_sha256": {}})  # now, and not when it is written beside what was forgotten
        return Certificate(content, self._examiner.reference)


@dataclass(frozen=True)
class Certificate:
    """``content``: plain data, see the page that :func:`page` makes of it. ``reference``: of the model before."""

    content: dict[str, Any]
    reference: Reference

    def write(self, folder: Path, key: bytes | None = None) -> None:
        """certificate.json, the page, and the reference, into ``folder``, whose files it states; with a ``key``, see
        :func:`signature`, certificate.sig too.
        """
        save_file({name: rows.contiguous() for name, rows in vars(self.reference).items()}, folder / REFERENCE)
        content = {
            **self.content,
            "signer": None if key is None else signer(key),
            "files_sha256": hashed_files(folder),
        }
        said = _said(content)
        (folder / NAME).write_bytes(said)
        (folder / PAGE).write_text(page(content), encoding="utf-8")
        if key is not None:
            (folder / SIGNATURE).write_bytes(signature(said, key))

    @classmethod
    def read(cls, folder: str | Path, public_key: bytes | None = None) -> Certificate:
        """What :meth:`write` wrote.

        Args:
            public_key: of the signer, PEM: the certificate must be signed by them.

        Raises:
            FileNotFoundError: if there is none. ValueError: if it is of another format, not as it is written, or not
                signed by that key.
        """
        said = _bytes(Path(folder) / NAME, MOST_BYTES)
        if public_key is not None:
            check_signature(said, _bytes(Path(folder) / SIGNATURE, 1024), public_key)
        content = strict_json(NAME, said.decode())
        check_content(content)
        if said != _said(content):  # a key that is there twice, for one
            raise ValueError(f"{NAME}: expected JSON as it is written, got the same in another form")
        if public_key is not None and content["signer"] != fingerprint(public_key):
            raise ValueError(f"{NAME}: expected that key as its signer, got {content['signer']!r:.80}")
        return cls(content, _reference(_bytes(Path(folder) / REFERENCE, 2**33)))


def _said(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, allow_nan=False) + "\n").encode()


def _reference(data: bytes) -> Reference:
    try:
        found = Reference(**load(data))
    except (SafetensorError, TypeError) as error:
        raise ValueError(f"{REFERENCE}: expected what a model said of a text, got {error!s:.200}") from error
    rows, ids, logprobs = found.rows, found.ids, found.logprobs
    shapes = [tuple(part.shape) for part in (rows, ids, logprobs)]
    n, length = shapes[0] if rows.ndim == 2 else (0, 0)
    if ids.ndim != 3 or shapes[1:] != [(n, length - 1, ids.shape[-1])] * 2 or min(rows.numel(), ids.numel()) < 1:
        raise ValueError(f"{REFERENCE}: expected rows (N, L), ids and logprobs (N, L - 1, k), got {shapes}")
    if any(part.is_floating_point() for part in (rows, ids)) or min(int(rows.min()), int(ids.min())) < 0:
        raise ValueError(f"{REFERENCE}: expected token ids, got {rows.dtype} and {ids.dtype}, or negative ones")
    if not (logprobs.is_floating_point() and logprobs.isfinite().all() and (logprobs <= 1e-3).all()):
        raise ValueError(f"{REFERENCE}: expected log-probabilities, got others")
    return found


def hashed_files(folder: Path) -> dict[str, str]:
    """SHA-256 of each file in ``folder`` but those that are made of the certificate, by name."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in (NAME, PAGE, SIGNATURE, MARK):
            digest = hashlib.sha256()
            with path.open("rb") as file:
                while block := file.read(2**20):
                    digest.update(block)
            found[name] = digest.hexdigest()
    return found


def _bytes(path: Path, most: int) -> bytes:
    """Of a regular file of no more than that."""
    if not path.exists():
        raise FileNotFoundError(
            f"expected {path.name} in {path.parent}, got no such file; cir unlearn --certify writes it"
        )
    if not path.is_file() or path.stat().st_size > most:
        raise ValueError(f"{path}: expected a regular file of at most {most} bytes, got something else")
    return path.read_bytes()


def weights_hash(model: Any) -> str:
    """SHA-256 over the names, types, shapes and bits of all parameters."""
    return fingerprint_of((name, parameter.detach()) for name, parameter in unwrapped(model).named_parameters())
