"""A certificate: what was forgotten, every measure and attack before and after, and all it takes to check it."""

from __future__ import annotations

import hashlib
import html
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from cir.data.facts import Fact, check_apart, leaking, split_facts
from cir.data.sampling import spread
from cir.data.tokens import windows
from cir.forgetting.report import hash_facts, library_versions
from cir.forgetting.update import fingerprint_of, snapshot
from cir.measures import Estimate, Reference, evaluate, reference_of, unknown_facts
from cir.model.sites import find_stack
from cir.proof.attacks import attack
from cir.proof.relearning import worst_relearning

FORMAT = "cir-certificate-1"
NAME, PAGE, REFERENCE = "certificate.json", "certificate.html", "certificate-reference.safetensors"
LATER = ("kl_worst_window",)
"""Measures that certificates made before there were these do not state."""
ATTACKER_KNOWS = 0.8
TOLERANCE = 2e-3
LOOSE_TOLERANCE = 0.05
"""For what draws or trains, and for shares of few probes: rounding in another order may tip one of them."""
LOOSE = ("sampled", "extraction", "linear_probe", "relearning", "accuracy", "quantized")


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
    """A model's measures, the outcome of attacks on it, and its recall by fact id."""

    measures: dict[str, Estimate]
    attacks: dict[str, Estimate]
    recall: dict[str, float]


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
        self._model, self._tokenizer, self._evidence, self._progress = model, tokenizer, evidence, progress
        self.unknown = list(unknown_facts(model, tokenizer, evidence.facts) if unknown is None else unknown)
        self._facts = [fact for fact in evidence.facts if fact.id not in self.unknown]
        if not self._facts:
            raise ValueError("facts: expected some that the model knows, got none")
        rows = spread(windows(tokenizer, evidence.text, 256), evidence.text_tokens)
        self.reference = reference or reference_of(model, rows)

    def examine(self, original: Mapping[str, Tensor] | None = None) -> Examination:
        """Every measure and attack on the model as it is; it ends as it came in.

        ``original``: parameters by name from before it forgot, for the attack that undoes small changes.
        """
        model, tokenizer, evidence = self._model, self._tokenizer, self._evidence
        measured = evaluate(
            model,
            tokenizer,
            self._facts,
            neighbours=evidence.neighbours,
            same_subject=evidence.same_subject,
            text=evidence.text,
            max_tokens=evidence.text_tokens,
            generate=evidence.generate,
            reference=self.reference,
        )
        known, probed = split_facts(self._facts, ATTACKER_KNOWS, evidence.seed)
        related = [*known, *evidence.related]
        attacks = attack(model, tokenizer, probed, related=related, original=original, seed=evidence.seed)
        if evidence.relearning and related:
            relearned = worst_relearning(model, tokenizer, related, probed, progress=self._progress)
            attacks |= {f"relearning, {name}": outcome for name, outcome in relearned.items()}
        return Examination(measured.measures, attacks, measured.recall)


class Witness:
    """Examines a model when made and, once it has forgotten, again: the two make its certificate.

    Keeps copies of the MLP weights on the host.

    Raises:
        ValueError: see :class:`Examiner`.
    """

    def __init__(self, model: Any, tokenizer: Any, evidence: Evidence, *, progress: bool = True) -> None:
        self._model, self._evidence = model, evidence
        self._examiner = Examiner(model, tokenizer, evidence, progress=progress)
        self._hash, self._before = weights_hash(model), self._examiner.examine()
        stack = find_stack(model)
        targets = stack.targets(len(stack.mlps) - 1)
        names = [f"{target.name}.weight" for target in targets]
        self._original = dict(zip(names, snapshot(targets), strict=True))

    def certificate(self, method: Mapping[str, Any]) -> Certificate:
        """What happened to the model since, by ``method``, which is to be noted."""
        after = self._examiner.examine(self._original)
        content = {
            "format": FORMAT,
            "method": dict(method),
            "sources": dict(self._evidence.sources),
            "settings": self._evidence.settings,
            "data_sha256": self._evidence.hashes(),
            "weights_sha256": {"before": self._hash, "after": weights_hash(self._model)},
            "set_aside": self._examiner.unknown,
            "before": asdict(self._before),
            "after": asdict(after),
            "versions": library_versions(),
        }
        return Certificate(content, self._examiner.reference)


@dataclass(frozen=True)
class Certificate:
    """``content``: plain data, see the page that :func:`page` makes of it. ``reference``: of the model before."""

    content: dict[str, Any]
    reference: Reference

    def write(self, folder: Path) -> None:
        """certificate.json, the page, and the reference, into ``folder``."""
        (folder / NAME).write_text(json.dumps(self.content, indent=2) + "\n", encoding="utf-8")
        (folder / PAGE).write_text(page(self.content), encoding="utf-8")
        save_file({name: rows.contiguous() for name, rows in vars(self.reference).items()}, folder / REFERENCE)

    @classmethod
    def read(cls, folder: str | Path) -> Certificate:
        """What :meth:`write` wrote.

        Raises:
            FileNotFoundError: if there is none. ValueError: if it is of another format.
        """
        path = Path(folder) / NAME
        if not path.is_file():
            raise FileNotFoundError(f"expected {NAME} in {folder}, got no such file; cir unlearn --certify writes it")
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.get("format") != FORMAT:
            raise ValueError(f"{path}: expected format {FORMAT}, got {content.get('format')}")
        return cls(content, Reference(**load_file(Path(folder) / REFERENCE)))


def verify(
    certificate: Certificate, model: Any, tokenizer: Any, evidence: Evidence, *, progress: bool = True
) -> list[str]:
    """Recompute ``certificate`` from the checkpoint that it came with, and say where it differs.

    The attack that needs the weights from before is left out, and so is relearning where ``evidence`` says so.

    Returns:
        A line for each difference; empty if the certificate holds. Figures may differ by 0.002 (losses: relatively),
        those that draw, train or count few probes by 0.05.
    """
    stated = certificate.content
    was, own = stated["data_sha256"], evidence.hashes()
    hashes = {f"data, {name}": (was.get(name, "none"), own.get(name, "none")) for name in {**was, **own}}
    hashes["weights"] = stated["weights_sha256"]["after"], weights_hash(model)
    found = [f"{name}: expected {was[:12]}, got {own[:12]}" for name, (was, own) in hashes.items() if was != own]
    examiner = Examiner(
        model, tokenizer, evidence, unknown=stated["set_aside"], reference=certificate.reference, progress=progress
    )
    now = asdict(examiner.examine())
    for kind in ("measures", "attacks"):
        for name, outcome in now[kind].items():
            if name in LATER and name not in stated["after"][kind]:
                continue
            was = stated["after"][kind].get(name, {"value": math.nan})["value"]
            if not _agree(name, was, outcome["value"]):
                found.append(f"{name}: expected {was:.4f}, got {outcome['value']:.4f}")
    return found


def _agree(name: str, stated: float, found: float) -> bool:
    tolerance = LOOSE_TOLERANCE if any(word in name for word in LOOSE) else TOLERANCE
    return abs(stated - found) <= tolerance * max(1.0, abs(stated))


def weights_hash(model: Any) -> str:
    """SHA-256 over the names, types, shapes and bits of all parameters."""
    return fingerprint_of((name, parameter.detach()) for name, parameter in model.named_parameters())


LABELS = {
    "recall": "Recall: probability of the answer",
    "paraphrase_recall": "Recall when asked in other words",
    "token_extraction": "Answer tokens that are the likeliest",
    "generation_extraction": "Probes whose greedy continuation holds the answer",
    "accuracy": "Multiple choice, right letter first",
    "accuracy_t1": "Multiple choice, probability of the right letter",
    "neighbour_recall": "Recall of neighbours (should stay)",
    "same_subject_recall": "Recall of other facts about the same subjects (should stay)",
    "loss": "Loss on ordinary text, nats a token (should stay)",
    "kl": "Change of what is said about that text, KL in nats a token",
    "kl_worst_window": "The same, of the window that changed most",
    "quantized_8bit": "Recall with weights rounded to 8 bits",
    "quantized_4bit": "Recall with weights rounded to 4 bits",
    "pruned": "Recall with the smaller half of the changes undone",
    "sampled": "Probes with the answer in one of many drawn continuations",
    "few_shot": "Recall after four related questions and answers",
    "linear_probe": "Answers that a linear map reads from hidden states",
}
LIMITS = (
    "It holds for the probes, texts and attacks listed, not for every way to ask or to attack.",
    "Facts that share no probe with these, and knowledge from which the facts follow, were not examined.",
    "A fine-tuning attacker who has the facts themselves can always teach them again.",
    "Figures are means; the one after the ± is a standard error over facts, questions or windows of text.",
)


def page(certificate: Mapping[str, Any]) -> str:
    """The certificate as one self-contained HTML page."""
    before, after = certificate["before"], certificate["after"]
    recalls = [
        [name, f"{was:.1%}", f"{after['recall'].get(name, float('nan')):.1%}"]
        for name, was in before["recall"].items()
    ]
    aside = certificate["set_aside"]
    parts = [
        "<h1>Certificate of unlearning</h1>",
        f"<p>{len(recalls)} facts were to be forgotten.",
        f" Not known to begin with, and counted nowhere: {html.escape(', '.join(aside))}." if aside else "",
        "</p>",
        "<h2>Measures</h2>",
        _table(("", "before", "after"), _outcomes(before["measures"], after["measures"])),
        "<h2>Attacks</h2>",
        _table(("", "before", "after"), _outcomes(before["attacks"], after["attacks"])),
        "<h2>Each fact: recall</h2>",
        _table(("fact", "before", "after"), recalls),
        "<h2>What this does not guarantee</h2>",
        "<ul>" + "".join(f"<li>{html.escape(limit)}</li>" for limit in LIMITS) + "</ul>",
        "<h2>How it was made</h2>",
        f"<pre>{html.escape(json.dumps({k: certificate[k] for k in _MADE}, indent=2))}</pre>",
    ]
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Certificate of unlearning</title><style>'
        "body{font:16px/1.5 system-ui,sans-serif;max-width:52rem;margin:2rem auto;padding:0 1rem}"
        "table{border-collapse:collapse;width:100%}td,th{padding:.25rem .5rem;border-bottom:1px solid #ddd;"
        "text-align:right;font-variant-numeric:tabular-nums}td:first-child,th:first-child{text-align:left}"
        "pre{overflow-x:auto;background:#f6f6f6;padding:1rem}</style><body>" + "".join(parts) + "</body></html>\n"
    )


_MADE = ("method", "sources", "settings", "data_sha256", "weights_sha256", "versions")


def _outcomes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[list[str]]:
    return [
        [LABELS.get(name, name[:1].upper() + name[1:]), *(_figure(side.get(name)) for side in (before, after))]
        for name in {**before, **after}
    ]


def _figure(outcome: Mapping[str, float] | None) -> str:
    return "" if outcome is None else f"{outcome['value']:.4f} ± {outcome['stderr']:.4f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return f"<table>{line(head, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"
