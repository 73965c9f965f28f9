"""``cir unlearn``: read what was given, forget, say what came of it and what to do where it is not enough."""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from cir import CIRConfig, Report, Subspaces, load_facts, unlearn
from cir.cli.certificates import certified, evidence_of, signing_key
from cir.cli.inputs import Inputs, paths
from cir.cli.output import DONE, FAILED, INTERRUPTED, PARTLY, Outcome, complain, say
from cir.cli.processes import way_to_shard
from cir.cli.settings import NAME, used
from cir.config import BreakingConfig
from cir.data.facts import Fact
from cir.forgetting.factors import LORA_FILES
from cir.model.checkpoints import load_model, weights_of, whole_state
from cir.proof.certificate import Witness
from cir.system.processes import all_here
from cir.system.signals import Held
from cir.system.writing import check_output, write_folder

HIGH = 0.1
"""Share of the recall there was, above which what is left is worth a word."""


def run(arguments: argparse.Namespace) -> Outcome:
    with tempfile.TemporaryDirectory() as place:
        return _run(arguments, Path(place, "adapter") if arguments.adapter else None)


def _run(arguments: argparse.Namespace, adapter: Path | None) -> Outcome:
    """``adapter``: where one is to be written for a while, if it is to be in place of a model."""
    # Everything that can be wrong is found before the model is loaded.
    shard = way_to_shard(arguments.device, arguments.shard)
    nbytes, _ = weights_of(arguments.model, arguments.dtype)
    out = Path(arguments.out)
    if arguments.process == 0:
        out = check_output(out, arguments.overwrite, paths(arguments), nbytes if adapter is None else 0)
    if adapter is not None and (arguments.certify or arguments.preset != "default" or shard is not None):
        raise ValueError(
            "--adapter: expected neither --certify, which is for models, nor another preset, nor several processes"
        )
    inputs = Inputs.read(vars(arguments))
    base = CIRConfig.preset(arguments.preset)
    config = replace(base, **_given(arguments, base))
    if shard is not None and (arguments.certify or isinstance(config, BreakingConfig)):
        raise ValueError("expected neither --certify nor the paper's preset in several processes")
    contrast = None if arguments.contrast is None else load_facts(arguments.contrast)
    subspaces = None if arguments.subspaces is None else Subspaces.load(arguments.subspaces)
    evidence = evidence_of(inputs, relearning=not arguments.no_relearning) if arguments.certify else None
    key = signing_key(arguments)
    if arguments.require_recall is not None:
        _check_measurable(inputs.facts)
    model, tokenizer = load_model(
        arguments.model,
        device=arguments.device,
        dtype=arguments.dtype,
        offload_for=config if isinstance(config, BreakingConfig) and arguments.offload != "never" else None,
        shard=shard,
    )
    witness = None if evidence is None else Witness(model, tokenizer, evidence, progress=not arguments.quiet)
    report = unlearn(
        model,
        tokenizer,
        inputs.facts,
        contrast=contrast,
        retain=inputs.retain,
        disruption=inputs.disruption,
        config=config,
        subspaces=subspaces,
        offload=arguments.offload,
        adapter=adapter,
        progress=not arguments.quiet,
    )
    method = {"name": "CIR", "model": arguments.model, **asdict(report.config)}
    certificate, failed = (None, None) if witness is None else certified(witness, method)

    weights = whole_state(model)

    def fill(folder: Path) -> None:
        if adapter is None:
            model.save_pretrained(folder, state_dict=weights)
            tokenizer.save_pretrained(folder)
        else:
            for name in LORA_FILES:
                shutil.copy(adapter / name, folder)
        (folder / "report.json").write_text(report.to_json(), encoding="utf-8")
        (folder / NAME).write_text(used(arguments, config), encoding="utf-8")
        if certificate is not None:
            certificate.write(folder, key)

    if certificate is not None:
        say(f"verdict    {certificate.content['verdict']['heading']}")
    with Held():
        if arguments.process == 0:
            out = write_folder(out, fill, arguments.overwrite)
        _tell(report, out)
        missed = _missed(report, arguments.require_recall)
        if shard is not None:
            all_here()  # torchrun ends the first process, which writes, where another exits with a status of its own
    status = PARTLY if missed else DONE
    if failed is not None:
        complain(f"written without a certificate: {type(failed).__name__} {failed}")
        status = INTERRUPTED if isinstance(failed, KeyboardInterrupt) else FAILED
    if report.stopped == "interrupted":
        status = INTERRUPTED
    return status, {
        **report.to_dict(),
        "advice": advice(report),
        "certified": certificate is not None,
        "out": str(out),
    }


def _given(arguments: argparse.Namespace, base: Any) -> dict[str, Any]:
    """The settings among ``arguments``, of which the preset ``base`` must have each."""
    names = (
        *("budget", "worst_window", "disruption_tokens", "full_check", "target_recall", "rounding", "seed"),
        *("floor", "max_steps", "layers", "max_length", "rate", "max_epochs", "adapter_rank"),
    )
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    known = {field.name for field in fields(base)}
    if others := [f"--{name.replace('_', '-')}" for name in given if name not in known]:
        raise ValueError(f"{', '.join(others)}: not of the preset {arguments.preset}")
    return given


def _check_measurable(facts: Sequence[Fact]) -> None:
    if not any(fact.probes or fact.choices for fact in facts):
        raise ValueError(
            "--require-recall: expected facts with probes, whose recall is measured, got sentences alone; write them "
            'as JSON lines with "probes"'
        )


def _tell(report: Report, out: Path) -> None:
    before, after = report.before, report.after
    if before.mean_recall is not None and after.mean_recall is not None:
        say(f"recall     {before.mean_recall:.3f} -> {after.mean_recall:.3f}")
    say(f"text loss  {before.loss:.4f} -> {after.loss:.4f} ({after.rise:+.2%}, budget {report.config.budget:+.2%})")
    if report.adapter is not None:
        say(f"adapter    rank {report.adapter.rank}, {report.adapter.energy:.1%} of the change")
    say(f"layers     {report.layers[0]} to {report.layers[1]} changed")
    say(f"stopped    {report.stopped}, after {report.seconds['total']:.0f} s")
    if (what := advice(report)) is not None:
        say(f"advice     {what}")
    say(f"written    {out}")


def _missed(report: Report, required: float | None) -> bool:
    """Say so where recall did not come down to what is required."""
    recall = report.after.mean_recall
    if required is None or (recall is not None and recall <= required):
        return False
    say(f"required   a recall of {required:g} at most: not reached")
    return True


def advice(report: Report) -> str | None:
    """What to raise where much is still recalled, and most of what the text may suffer is not used."""
    before, after, config = report.before.mean_recall, report.after.mean_recall, report.config
    if before is None or after is None or not after > HIGH * before or report.after.rise > config.budget / 2:
        return None
    left = f"recall is still high, and {1 - max(report.after.rise, 0) / config.budget:.0%} of the budget is left: "
    if isinstance(config, BreakingConfig):
        more = f"raise --rate (now {config.rate:g}) or --max-epochs (now {config.max_epochs})"
        return left + more if report.stopped == "all epochs done" else None
    first, last = report.layers
    lower = f"lower --floor (now {config.floor:g})"
    more = (
        f"raise --max-steps (now {config.max_steps}), {lower}, or raise --layers "
        f"(now {(last - first + 1) / (last + 1):.2f} of the depth)"
    )
    return {"all epochs done": left + more, "forgotten": left + lower}.get(report.stopped)
