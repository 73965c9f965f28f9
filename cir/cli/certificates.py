"""Certificates: what they rest on, their making in a run, and ``cir verify``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from cir.cli.inputs import DATA_SETS, SOURCES, Inputs
from cir.cli.output import DONE, FAILED, Outcome, say
from cir.model.checkpoints import load_model
from cir.proof.certificate import Certificate, Evidence, Witness
from cir.proof.stated import signature
from cir.proof.verdict import judge
from cir.proof.verification import verify


def evidence_of(inputs: Inputs, **settings: Any) -> Evidence:
    """What a certificate rests on, of what the options named."""
    if inputs.disruption is None:
        raise ValueError("expected text on which the loss is certified, with --disruption or --data, got none")
    return Evidence(
        inputs.facts,
        inputs.neighbours,
        inputs.disruption,
        inputs.related,
        same_subject=inputs.same_subject,
        sources=inputs.sources,
        **settings,
    )


def certified(witness: Witness, method: dict[str, Any]) -> tuple[Certificate, None] | tuple[None, BaseException]:
    """The certificate, or what was in its way: what was forgotten by then is not thrown away for it."""
    try:
        return witness.certificate(method), None
    except (Exception, KeyboardInterrupt) as error:
        return None, error


def signing_key(arguments: argparse.Namespace) -> bytes | None:
    """What the certificate is to be signed with, tried before there is one."""
    if arguments.sign is None:
        return None
    if not arguments.certify:
        raise ValueError("--sign: expected a certificate to sign, with --certify, got none")
    key = Path(arguments.sign).read_bytes()
    signature(b"", key)
    return key


def run(arguments: argparse.Namespace) -> Outcome:
    """``cir verify``: :data:`FAILED` where something differs."""
    public = None if arguments.public_key is None else Path(arguments.public_key).read_bytes()
    certificate = Certificate.read(arguments.folder, public)
    stated = certificate.content
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    settings = {**stated["settings"], "relearning": stated["settings"]["relearning"] and not arguments.no_relearning}
    evidence = evidence_of(Inputs.read({**_sources(stated["sources"], given), **given}), **settings)
    model, tokenizer = load_model(arguments.folder, device=arguments.device, dtype=arguments.dtype)
    original = None
    if arguments.original is not None:
        original, _ = load_model(arguments.original, device=arguments.device, dtype=arguments.dtype)
    found = verify(
        certificate,
        model,
        tokenizer,
        evidence,
        folder=arguments.folder,
        original=original,
        progress=not arguments.quiet,
    )
    verdict = judge(stated)
    say(f"verdict    {verdict.heading}")
    for claim in verdict.claims:
        say(f"claim      {claim.name}: {claim.word}. {claim.why}")
    for difference in found.differences:
        say(f"differs    {difference}")
    unverified = [*found.unverified, *(["who made it: give their --public-key"] if public is None else [])]
    for what in unverified:
        say(f"unverified {what}")
    say("All that was verified is as stated." if found.holds else "The certificate does not hold.")
    document = {"holds": found.holds, "verdict": verdict.stated(), "differences": list(found.differences)}
    return DONE if found.holds else FAILED, {**document, "unverified": unverified}


def _sources(stated: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The options that a certificate names, none of which leads out of where this runs: it may be a stranger's."""
    left = {name: value for name, value in stated.items() if name in SOURCES and name not in given}
    here = Path.cwd().resolve()
    foreign = [
        f"--{name.replace('_', '-')} {value}"
        for name, value in left.items()
        if name not in ("data", "limit") and value not in DATA_SETS and not _within(here, value)
    ]
    if foreign:
        raise ValueError(
            f"expected files in {here}, got a certificate that names others; if they are yours: {' '.join(foreign)}"
        )
    return left


def _within(folder: Path, name: Any) -> bool:
    path = (folder / str(name)).resolve()
    return path.is_relative_to(folder) and (path.is_file() or path.is_dir() or not path.exists())
