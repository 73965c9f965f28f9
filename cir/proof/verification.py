"""Checking a certificate: recompute what can be, and name the rest."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from cir.data.sampling import spread
from cir.data.tokens import windows
from cir.measures import WINDOW, unknown_facts
from cir.model.finding import find_stack
from cir.proof.certificate import PAGE, SIGNATURE, Certificate, Evidence, Examiner, hashed_files, page, weights_hash
from cir.proof.relearning import RELEARNINGS
from cir.proof.verdict import Thresholds

TOLERANCE = 2e-3
LOOSE_TOLERANCE = 0.05
"""For what draws or trains, and for shares of few probes: rounding in another order may tip one of them."""
LOOSE = ("sampled", "extraction", "linear_probe", "relearning", "accuracy", "quantized")
WITHOUT_ORIGINAL = (
    "the figures from before, the text as it was said before (on which the KL rests), that the facts set aside were "
    "not known, and the attack that undoes small changes: give the model from before, --original"
)
ALWAYS = "the method, the date, the names of the sources, the thresholds and the versions: they are as stated"


@dataclass(frozen=True)
class Verification:
    """``differences`` from what the certificate states, a line each, and what was ``unverified``."""

    differences: list[str] = field(default_factory=list)
    unverified: list[str] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        """Whether all that was verified is as stated."""
        return not self.differences


def verify(
    certificate: Certificate,
    model: Any,
    tokenizer: Any,
    evidence: Evidence,
    *,
    folder: str | Path | None = None,
    original: Any = None,
    progress: bool = True,
) -> Verification:
    """Recompute ``certificate`` from the checkpoint that it came with.

    Args:
        model, tokenizer: the checkpoint. evidence: the data; without relearning, those attacks are left out.
        folder: of the checkpoint, whose other files and page are then compared too.
        original: the model before, from which the figures before and the rest of :data:`WITHOUT_ORIGINAL` are too.

    Returns:
        What differs and what was not looked at. Figures may differ by 0.002 (losses: relatively), those that draw,
        train or count few probes by 0.05.
    """
    stated = certificate.content
    own = {f"data, {name}": digest for name, digest in evidence.hashes().items()}
    own["weights, after"] = weights_hash(model)
    was = {f"data, {name}": digest for name, digest in stated["data_sha256"].items()}
    was |= {f"weights, {when}": digest for when, digest in stated["weights_sha256"].items()}
    unverified = [ALWAYS] if original is not None else [WITHOUT_ORIGINAL, ALWAYS]
    usual = asdict(Thresholds())
    if own_bounds := [name for name, bound in stated["thresholds"].items() if bound != usual[name]]:
        unverified.append(f"whether its own bounds are fit to judge by: {', '.join(own_bounds)}")
    if original is not None:
        own["weights, before"] = weights_hash(original)
    else:
        del was["weights, before"]
    found = [f"{name}: expected {_short(was, name)}, got {_short(own, name)}" for name in _differ(was, own)]
    if folder is None:
        unverified.append("the other files of the checkpoint, and the page")
    else:
        found += _files(Path(folder), certificate)
    found += _set_aside(stated, model, tokenizer, evidence)
    own_rows = spread(windows(tokenizer, evidence.text, WINDOW), evidence.text_tokens)
    if not torch.equal(own_rows, certificate.reference.rows):
        # Nothing on it can be computed.
        return Verification([*found, "reference: expected the windows of the text, got others"], unverified)
    found += _in_itself(stated)

    def examined(of: Any, weights: Mapping[str, Any] | None = None) -> dict[str, Any]:
        examiner = Examiner(
            of, tokenizer, evidence, unknown=stated["set_aside"], reference=certificate.reference, progress=progress
        )
        if examiner.attacker != stated["attacker"]:
            found.append(f"attacker: expected {examiner.attacker!r:.80}, got {stated['attacker']!r:.80}")
        return asdict(examiner.examine(weights))

    left_out = set() if original is not None else {"pruned"}
    if stated["settings"]["relearning"] and not evidence.relearning:
        left_out |= {f"relearning, {name}" for name in (*RELEARNINGS, "worst")}
        unverified.insert(0, "the attacks by fine-tuning: they were left out")
    if original is not None:
        found += _reference(original, tokenizer, evidence, certificate)
        found += _compared(stated["before"], examined(original), left_out | {"pruned"}, "before, ")
    weights = None if original is None else _weights(original)
    found += _compared(stated["after"], examined(model, weights), left_out)
    return Verification(found, unverified)


def _differ(was: Mapping[str, str], own: Mapping[str, str]) -> list[str]:
    return [name for name in {**was, **own} if was.get(name) != own.get(name)]


def _short(digests: Mapping[str, str], name: str) -> str:
    return digests.get(name, "none")[:12]


def _files(folder: Path, certificate: Certificate) -> list[str]:
    """Whether all that lies beside the certificate is what lay there."""
    was, own = certificate.content["files_sha256"], hashed_files(folder)
    found = [f"{name}: expected {_short(was, name)}, got {_short(own, name)}" for name in _differ(was, own)]
    path = folder / PAGE
    if not path.is_file() or path.read_text(encoding="utf-8", errors="replace") != page(certificate.content):
        found.append(f"{PAGE}: expected the page of this certificate, got another or none")
    if certificate.content["signer"] is not None and not (folder / SIGNATURE).is_file():
        found.append(f"{SIGNATURE}: expected the signature that the certificate names, got none")
    return found


def _set_aside(stated: Mapping[str, Any], model: Any, tokenizer: Any, evidence: Evidence) -> list[str]:
    """What was set aside as not known must be a fact, and is not known now either."""
    facts = {fact.id: fact for fact in evidence.facts}
    aside = [name for name in stated["set_aside"] if name in facts]
    unknown = unknown_facts(model, tokenizer, [facts[name] for name in aside])
    found = [
        f"set aside: expected the id of a fact, got {name!r:.80}" for name in stated["set_aside"] if name not in facts
    ]
    return found + [
        f"set aside: expected facts that are not known, got {name!r:.80}, which is" for name in _less(aside, unknown)
    ]


def _less(names: Sequence[str], others: Sequence[str]) -> list[str]:
    return [name for name in names if name not in others]


def _in_itself(stated: Mapping[str, Any]) -> list[str]:
    """What the figures say of each other, and must whatever the model was."""
    before, after = stated["before"], stated["after"]
    found = [
        f"{kind}: expected the same before and after, got {', '.join(sorted(differ))!r:.80} once"
        for kind in ("measures", "recall", "kept")
        if (differ := set(before[kind]) ^ set(after[kind]))
    ]
    if stated["settings"]["relearning"] != any(name.startswith("relearning") for name in after["attacks"]):
        found.append("relearning: expected its outcomes where it is said to have been tried, and only there")
    for kind in ("measures", "attacks"):
        pairs = {name: (before[kind][name], after[kind][name]) for name in before[kind].keys() & after[kind].keys()}
        found += [
            f"{name}: expected as many before as after, got {was['count']} and {now['count']}"
            for name, (was, now) in sorted(pairs.items())
            if was["count"] != now["count"]
        ]
    for when, side in (("before", before), ("after", after)):
        values, said = list(side["recall"].values()), side["measures"].get("recall")
        if said and not (values and _agree("recall", said["value"], sum(values) / len(values))):
            found.append(f"recall {when}: expected the mean of the facts', got {said['value']:.4f}")
        found += [
            f"{name} {when}: expected the mean of its units, got {_said(side['measures'].get(name))}"
            for name, units in side["kept"].items()
            if not _is_mean(name, side["measures"].get(name), list(units.values()))
        ]
    first = {
        name: before["measures"][name]["value"] for name in ("kl", "kl_worst_window") if name in before["measures"]
    }
    found += [
        f"{name} before: expected 0, of a model from itself, got {value:.4f}"
        for name, value in first.items()
        if not _agree(name, value, 0.0)
    ]
    return found


def _is_mean(name: str, said: Mapping[str, Any] | None, units: Sequence[float]) -> bool:
    if not said or said["count"] != len(units):
        return False
    return _agree(name, said["value"], sum(units) / len(units))


def _reference(original: Any, tokenizer: Any, evidence: Evidence, certificate: Certificate) -> list[str]:
    """Whether the text was said so, and the facts set aside not known, by the model from before."""
    examiner = Examiner(original, tokenizer, replace(evidence, relearning=False), progress=False)
    found = []
    if sorted(examiner.unknown) != sorted(certificate.content["set_aside"]):
        found.append(f"set aside: expected {examiner.unknown!r:.80}, got {certificate.content['set_aside']!r:.80}")
    own = examiner.reference
    for name, rows in vars(certificate.reference).items():
        same = rows.shape == getattr(own, name).shape
        close = same and float((rows.double() - getattr(own, name).double()).abs().mean()) <= TOLERANCE
        if name != "ids" and not close:  # which of two tokens is likelier, rounding may tip
            found.append(f"reference, {name}: expected what the model from before says, got something else")
    return found


def _compared(stated: Mapping[str, Any], now: Mapping[str, Any], left_out: set[str], when: str = "") -> list[str]:
    """Each figure, its error and its count, the recall of each fact, and each unit of what should stay."""
    found = []
    for kind in ("measures", "attacks"):
        names = {**stated[kind], **now[kind]}.keys() - left_out
        for name in sorted(names):
            was, own = stated[kind].get(name), now[kind].get(name)
            if was is None or own is None or not _same(name, was, own):
                found.append(f"{when}{name}: expected {_said(was)}, got {_said(own)}")
    for name in sorted({**stated["recall"], **now["recall"]}):
        was, own = (side["recall"].get(name, math.nan) for side in (stated, now))
        if not _agree("recall", was, own):
            found.append(f"{when}recall of {name!r:.80}: expected {was:.4f}, got {own:.4f}")
    for kind in sorted({**stated["kept"], **now["kept"]}):
        units, own_units = (side["kept"].get(kind, {}) for side in (stated, now))
        found += [
            f"{when}{kind} of {name!r:.80}: expected {units.get(name)}, got {own_units.get(name)}"
            for name in sorted({**units, **own_units})
            if not _agree(kind, units.get(name, math.nan), own_units.get(name, math.nan))
        ]
    return found


def _same(name: str, was: Mapping[str, Any], own: Mapping[str, Any]) -> bool:
    return was["count"] == own["count"] and all(_agree(name, was[part], own[part]) for part in ("value", "stderr"))


def _said(outcome: Mapping[str, Any] | None) -> str:
    return "none" if outcome is None else f"{outcome['value']:.4f} ± {outcome['stderr']:.4f} of {outcome['count']}"


def _agree(name: str, stated: float, found: float) -> bool:
    tolerance = LOOSE_TOLERANCE if any(word in name for word in LOOSE) else TOLERANCE
    return abs(stated - found) <= tolerance * max(1.0, abs(stated))


def _weights(original: Any) -> dict[str, Any]:
    stack = find_stack(original)
    return {t.parameter_name: t.parameter.detach() for t in stack.targets(len(stack.mlps) - 1)}
