"""Certificates that somebody altered, with all that is made of them made anew: each is found, or what was altered is
named as unverified.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import cir
from cir.data.facts import load_facts
from cir.measures import Reference, reference_of
from cir.proof.certificate import NAME, PAGE, REFERENCE, SIGNATURE, Certificate, Evidence, Witness
from cir.proof.verdict import judge
from cir.proof.verification import ALWAYS, WITHOUT_ORIGINAL, Verification, verify
from tests.tiny import TEXT, facts, knowing_llama, word_tokenizer

FORGET, STAY = load_facts(facts(12))[:8], load_facts(facts(12))[8:]
STRANGE = {"id": "strange", "sentences": ["x1 x2 x3 x4"], "probes": [{"prompt": "x1 x2", "target": " x3"}]}


@dataclass
class Certified:
    """A folder with a tiny model that forgot, and its certificate; the model before, and the evidence."""

    folder: Path
    model: Any
    original: Any
    tokenizer: Any
    evidence: Evidence
    key: bytes
    public: bytes


def certified(folder: Path) -> Certified:
    """Of which two facts are still known, which its certificate says."""
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    private = Ed25519PrivateKey.generate()
    key = private.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption())
    public = private.public_key().public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo)
    model, tokenizer = knowing_llama(), word_tokenizer()
    original = copy.deepcopy(model)
    evidence = Evidence(
        [*FORGET, *load_facts([STRANGE])],
        STAY,
        TEXT,
        text_tokens=512,
        generate=3,
        relearning=False,
        sources={"facts": "facts.jsonl"},
    )
    witness = Witness(model, tokenizer, evidence, progress=False)
    config = cir.CIRConfig(layers=0.5, budget=9.0, worst_window=9.0)
    cir.unlearn(model, tokenizer, FORGET[:6], retain=TEXT, config=config, progress=False)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    witness.certificate({"name": "CIR"}).write(folder, key)
    return Certified(folder, model, original, tokenizer, evidence, key, public)


Content = dict[str, Any]
Alter = Callable[[Content], object]


def _into(when: str, kind: str, name: str, **changes: Any) -> Alter:
    return lambda content: content[when][kind][name].update(changes)


def _still_known_is_set_aside(content: Content) -> None:
    """The facts that did not go are said never to have been known, and all means are made to fit."""
    left = [name for name, value in content["after"]["recall"].items() if value > 0.5]
    content["set_aside"] += left
    for when in ("before", "after"):
        for name in left:
            del content[when]["recall"][name]
        values = list(content[when]["recall"].values())
        content[when]["measures"]["recall"].update(value=sum(values) / len(values), count=len(values))


def _one_fact_better(content: Content) -> None:
    name = max(content["after"]["recall"], key=content["after"]["recall"].get)
    content["after"]["recall"][name] = 0.0


def _recall_better(content: Content) -> None:
    recalls = content["after"]["recall"]
    recalls.update(dict.fromkeys(recalls, 0.01))
    content["after"]["measures"]["recall"].update(value=0.01, stderr=0.0)


def _before_worse(content: Content) -> None:
    recalls = content["before"]["recall"]
    recalls.update(dict.fromkeys(recalls, 1.0))
    content["before"]["measures"]["recall"].update(value=1.0, stderr=0.0)


def _kept(when: str, kind: str, value: float) -> Alter:
    """Every unit is said to be that, and the mean made to fit."""

    def alter(content: Content) -> None:
        units = content[when]["kept"][kind]
        units.update(dict.fromkeys(units, value))
        content[when]["measures"][kind].update(value=value, stderr=0.0)

    return alter


def _without(when: tuple[str, ...], kind: str, name: str) -> Alter:
    return lambda content: [content[w][kind].pop(name, None) for w in when]


BOTH = ("before", "after")
NAMED = (WITHOUT_ORIGINAL, ALWAYS)
CONTENT: dict[str, tuple[Alter, str | None]] = {
    "recall lowered": (_recall_better, None),
    "a fact's recall lowered": (_one_fact_better, None),
    "facts still known set aside": (_still_known_is_set_aside, None),
    "a fact not known no longer set aside": (lambda c: c["set_aside"].clear(), None),
    "an unknown id set aside": (lambda c: c["set_aside"].append("nobody"), None),
    "recall before raised": (_before_worse, WITHOUT_ORIGINAL),
    "a measure before changed": (_into("before", "measures", "token_extraction", value=0.5), WITHOUT_ORIGINAL),
    "what was kept before lowered": (_kept("before", "neighbour_recall", 0.1), WITHOUT_ORIGINAL),
    "what was kept raised": (_kept("after", "neighbour_recall", 0.9), None),
    "the loss of every window lowered": (_kept("after", "loss", 0.1), None),
    "a neighbour left out": (lambda c: c["after"]["kept"]["neighbour_recall"].popitem(), None),
    "a verdict of its own": (lambda c: c["verdict"].update(heading="Forgotten, and the rest kept"), None),
    "other bounds": (lambda c: c["thresholds"].update(dict.fromkeys(c["thresholds"], 1)), ALWAYS),
    "a bound that is none": (lambda c: c["thresholds"].update(kl="high"), None),
    "a bound left out": (lambda c: c["thresholds"].pop("kl"), None),
    "a weaker attacker": (lambda c: c["attacker"].update(asked=[]), None),
    "a stronger attacker": (lambda c: c["attacker"].update(taught=800), None),
    "another date": (lambda c: c.update(date="1999-01-01T00:00:00Z"), ALWAYS),
    "a date that is none": (lambda c: c.update(date="tomorrow"), None),
    "an error before changed": (_into("before", "measures", "loss", stderr=9.0), WITHOUT_ORIGINAL),
    "an attack before changed": (_into("before", "attacks", "few_shot", value=1.0), WITHOUT_ORIGINAL),
    "the KL before changed": (_into("before", "measures", "kl", value=0.5), None),
    "a loss lowered": (_into("after", "measures", "loss", value=0.1), None),
    "an error lowered": (_into("after", "measures", "loss", stderr=0.0), None),
    "a count raised": (_into("after", "measures", "recall", count=800), None),
    "a count raised before": (_into("before", "measures", "recall", count=800), None),
    "an attack lowered": (_into("after", "attacks", "few_shot", value=-1.0), None),
    "what undoes small changes lowered": (_into("after", "attacks", "pruned", value=0.0), WITHOUT_ORIGINAL),
    "a negative error": (_into("after", "measures", "loss", stderr=-1.0), None),
    "infinity": (_into("after", "measures", "loss", value=float("inf")), None),
    "not a number": (_into("after", "attacks", "few_shot", value=float("nan")), None),
    "a recall above one": (lambda c: c["after"]["recall"].update(f0=1.5), None),
    "a figure as text": (_into("after", "measures", "loss", value="0.1"), None),
    "a figure as true": (_into("after", "measures", "recall", count=True), None),
    "an attack left out after": (_without(("after",), "attacks", "few_shot"), None),
    "an attack left out": (_without(BOTH, "attacks", "few_shot"), None),
    "a measure left out": (_without(BOTH, "measures", "kl_worst_window"), None),
    "a measure added": (lambda c: c["after"]["measures"].update(iq={"value": 1.0, "stderr": 0.0, "count": 1}), None),
    "a key added": (lambda c: c.update(note="all is well"), None),
    "a key left out": (lambda c: c.pop("set_aside"), None),
    "a key of an outcome added": (_into("after", "measures", "loss", note="fine"), None),
    "another format": (lambda c: c.update(format="cir-certificate-2"), None),
    "relearning said to be tried": (lambda c: c["settings"].update(relearning=True), None),
    "more text": (lambda c: c["settings"].update(text_tokens=5000), None),
    "no continuations": (lambda c: c["settings"].update(generate=0), None),
    "endless continuations": (lambda c: c["settings"].update(generate=10**9), None),
    "another hash of the data": (lambda c: c["data_sha256"].update(facts="0" * 64), None),
    "no hash of the data": (lambda c: c["data_sha256"].pop("neighbours"), None),
    "another hash of the weights": (lambda c: c["weights_sha256"].update(after="0" * 64), None),
    "another hash of the weights before": (lambda c: c["weights_sha256"].update(before="0" * 64), WITHOUT_ORIGINAL),
    "another method": (lambda c: c["method"].update(name="better"), ALWAYS),
    "other versions": (lambda c: c["versions"].update(torch="9.9"), ALWAYS),
    "other sources": (lambda c: c["sources"].update(facts="others.jsonl"), ALWAYS),
}
"""What is altered in certificate.json, and what then names it where it is not found without the model from before."""


def _appended(name: str, text: str = "\n") -> Callable[[Path], object]:
    return lambda folder: (folder / name).open("a").write(text)


def _one_key_twice(folder: Path) -> None:
    said = (folder / NAME).read_text()
    (folder / NAME).write_text(said.replace('"set_aside":', '"set_aside": [],\n  "set_aside":', 1))


def _other_rows(folder: Path) -> None:
    save_file(
        {"rows": torch.ones(1, 9).long(), "ids": torch.ones(1, 8, 2).int(), "logprobs": -torch.ones(1, 8, 2)},
        folder / REFERENCE,
    )


FILES: dict[str, Callable[[Path], object]] = {
    "the page": lambda folder: (folder / PAGE).write_text((folder / PAGE).read_text().replace("0.", "1.")),
    "the signature gone": lambda folder: (folder / SIGNATURE).unlink(),
    "the page gone": lambda folder: (folder / PAGE).unlink(),
    "a file added": lambda folder: (folder / "modeling.py").write_text("import os"),
    "the configuration": _appended("config.json"),
    "the tokenizer": _appended("tokenizer.json"),
    "the tokenizer's settings gone": lambda folder: (folder / "tokenizer_config.json").unlink(),
    "the reference": lambda folder: (folder / REFERENCE).write_bytes(b"\0" * 100),
    "the reference of other text": _other_rows,
    "the reference a pipe": lambda folder: [
        (folder / REFERENCE).unlink(),
        os.mkfifo(folder / REFERENCE),
    ],
    "one key twice": _one_key_twice,
    "another encoding": lambda folder: (folder / NAME).write_bytes((folder / NAME).read_text().encode("utf-16")),
    "a link to no end": lambda folder: [(folder / NAME).unlink(), (folder / NAME).symlink_to("/dev/zero")],
}
"""What is altered of the files, in a certificate that is left as it is."""


def checked(of: Certified, folder: Path, original: bool, public: bytes | None = None) -> Verification | ValueError:
    """What `cir verify` would say of ``folder``."""
    try:
        certificate = Certificate.read(folder, public)
        evidence = replace(of.evidence, **{**certificate.content["settings"], "relearning": False})
        before = of.original if original else None
        return verify(certificate, of.model, of.tokenizer, evidence, folder=folder, original=before, progress=False)
    except ValueError as error:
        return error


def found(outcome: Verification | ValueError) -> bool:
    return isinstance(outcome, ValueError) or not outcome.holds


def named(outcome: Verification | ValueError, by: str | None) -> bool:
    """Whether it was found or, where that cannot be, said to be unverified."""
    return found(outcome) or (by is not None and isinstance(outcome, Verification) and by in outcome.unverified)


def _forged(of: Certified, folder: Path, alter: Alter, reference: Reference | None = None) -> None:
    """``folder`` as somebody leaves it who alters the certificate, and makes the verdict, page and hashes fit."""
    content = json.loads((folder / NAME).read_text())
    verdict = copy.deepcopy(content["verdict"])
    alter(content)
    own = Certificate.read(folder).reference
    try:
        if content["verdict"] == verdict:
            content["verdict"] = judge(content).stated()
        Certificate(content, reference or own).write(folder)
    except (ValueError, KeyError, TypeError, AttributeError):  # what the library would not write
        (folder / NAME).write_text(json.dumps(content, indent=2) + "\n")


def sweep(share: float = 1.0) -> tuple[int, list[str]]:
    """How many were altered, of that share of all, and those that went unnoticed and unnamed."""
    unnoticed, every = [], max(1, round(1 / share))
    with tempfile.TemporaryDirectory() as place:
        of = certified(Path(place) / "whole")
        for original in (False, True):
            right = checked(of, of.folder, original, of.public)
            if found(right):
                unnoticed.append(f"nothing altered: {right}")
        swapped = reference_of(of.model, Certificate.read(of.folder).reference.rows)

        def no_change(content: Content) -> None:
            for name in ("kl", "kl_worst_window"):
                content["after"]["measures"][name].update(value=0.0, stderr=0.0)

        altered: list[tuple[str, Callable[[Path], object], str | None]] = [
            (name, lambda folder, alter=alter: _forged(of, folder, alter), by)
            for name, (alter, by) in CONTENT.items()
        ]
        altered += [(name, alter, None) for name, alter in FILES.items()]
        altered += [
            ("the text as it is said now", lambda folder: _forged(of, folder, no_change, swapped), WITHOUT_ORIGINAL)
        ]
        chosen = altered[::every]
        for name, alter, by in chosen:
            folder = Path(place) / "altered"
            shutil.copytree(of.folder, folder)
            alter(folder)
            if not named(checked(of, folder, original=False), by):
                unnoticed.append(name)
            if by != ALWAYS and not found(checked(of, folder, original=True)):
                unnoticed.append(f"{name}, by one who has the model from before")
            if (folder / SIGNATURE).is_file() and not found(checked(of, folder, original=False, public=of.public)):
                unnoticed.append(f"{name}, by one who has the key")
            shutil.rmtree(folder)
    return len(chosen), unnoticed
