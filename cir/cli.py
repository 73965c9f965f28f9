"""The ``cir`` command."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cir import __version__

if TYPE_CHECKING:
    from cir.certificate import Evidence
    from cir.inputs import Inputs

MODEL_HELP = "a hub id, a local folder, or a GGUF file"
FACTS_HELP = (
    'JSON lines: {"id", "sentences": [...], "probes": [{"prompt", "target"}]}; or a text file, a sentence a line'
)
PRESETS = ("default", "paper", "repselect")
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status: 0, 1 on an error, 130 where a signal ended the run early."""
    arguments = _parser().parse_args(argv)
    if arguments.quiet:
        _silence_transformers()
    try:
        return arguments.run(arguments)
    except (ValueError, OSError, ArithmeticError, MemoryError) as error:
        print(f"cir: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED


def _unlearn(arguments: argparse.Namespace) -> int:
    from cir import CIRConfig, unlearn
    from cir.certificate import Witness
    from cir.checkpoints import check_output, load_model, write_folder
    from cir.inputs import Inputs

    # Everything that can be wrong is found before the model is loaded.
    out = check_output(arguments.out, arguments.overwrite)
    inputs = Inputs.read(vars(arguments))
    base = CIRConfig.preset(arguments.preset)
    names = ("budget", "full_check", "seed", "rate", "max_epochs", "target_recall", "rounding", "disruption_tokens")
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    config = CIRConfig(**{**asdict(base), **given})
    evidence = _evidence(inputs, relearning=not arguments.no_relearning) if arguments.certify else None
    model, tokenizer = load_model(
        arguments.model,
        device=arguments.device,
        dtype=arguments.dtype,
        offload_for=None if arguments.offload == "never" else config,
    )
    witness = None if evidence is None else Witness(model, tokenizer, evidence, progress=not arguments.quiet)
    report = unlearn(
        model,
        tokenizer,
        inputs.facts,
        retain=inputs.retain,
        disruption=inputs.disruption,
        config=config,
        offload=arguments.offload,
        progress=not arguments.quiet,
    )
    method = {"name": "CIR", "model": arguments.model, **asdict(report.config)}
    certificate = None if witness is None else witness.certificate(method)

    def fill(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "report.json").write_text(report.to_json(), encoding="utf-8")
        if certificate is not None:
            certificate.write(folder)

    write_folder(out, fill)
    before, after = report.before, report.after
    if before.mean_recall is not None and after.mean_recall is not None:
        print(f"recall     {before.mean_recall:.3f} -> {after.mean_recall:.3f}")
    print(f"text loss  {before.loss:.4f} -> {after.loss:.4f} ({after.rise:+.2%}, budget {config.budget:+.2%})")
    epochs = report.epochs[-1].number if report.epochs else 0
    print(f"stopped    {report.stopped}, after {epochs} epochs, {report.seconds['total']:.0f} s")
    print(f"written    {out}")
    return INTERRUPTED if report.stopped == "interrupted" else 0


def _eval(arguments: argparse.Namespace) -> int:
    from cir import evaluate
    from cir.attack import attack
    from cir.checkpoints import load_model
    from cir.harness import check_installed, harness
    from cir.inputs import Inputs

    inputs = Inputs.read(vars(arguments))
    if arguments.tasks:
        check_installed()
    model, tokenizer = load_model(arguments.model, device=arguments.device, dtype=arguments.dtype)
    evaluation = evaluate(
        model,
        tokenizer,
        inputs.facts,
        neighbours=inputs.neighbours,
        text=_read(arguments.text),
        max_tokens=arguments.max_tokens,
        generate=arguments.generate,
    )
    plain = {name: getattr(evaluation, name) for name in ("mean_recall", "accuracy", "loss")}
    result = {**plain, **asdict(evaluation)}
    if arguments.tasks:
        scores = harness(model, tokenizer, arguments.tasks, limit=arguments.task_limit)
        result["tasks"] = {name: asdict(score) for name, score in scores.items()}
    if arguments.attacks:
        original = None
        if arguments.original is not None:
            before, _ = load_model(arguments.original, device="cpu", dtype=arguments.dtype)
            original = {name: parameter.detach() for name, parameter in before.named_parameters()}
        outcomes = attack(
            model, tokenizer, inputs.facts, related=inputs.related, original=original, seed=arguments.seed
        )
        result["attacks"] = {name: asdict(outcome) for name, outcome in outcomes.items()}
    return _write_json(arguments.json, result)


def _evidence(inputs: Inputs, **settings: Any) -> Evidence:
    from cir.certificate import Evidence

    if inputs.disruption is None:
        raise ValueError("expected text on which the loss is certified, with --disruption or --data, got none")
    return Evidence(
        inputs.facts, inputs.neighbours, inputs.disruption, inputs.related, sources=inputs.sources, **settings
    )


def _verify(arguments: argparse.Namespace) -> int:
    from cir.certificate import Certificate, verify
    from cir.checkpoints import load_model
    from cir.inputs import Inputs

    certificate = Certificate.read(arguments.folder)
    stated = certificate.content
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    settings = {**stated["settings"], "relearning": stated["settings"]["relearning"] and not arguments.no_relearning}
    evidence = _evidence(Inputs.read({**stated["sources"], **given}), **settings)
    model, tokenizer = load_model(arguments.folder, device=arguments.device, dtype=arguments.dtype)
    differences = verify(certificate, model, tokenizer, evidence, progress=not arguments.quiet)
    for difference in differences:
        print(f"differs    {difference}")
    print("The certificate does not hold." if differences else "The certificate holds.")
    return 1 if differences else 0


def _attack(arguments: argparse.Namespace) -> int:
    from cir import load_facts, relearn
    from cir.checkpoints import load_model
    from cir.evaluation import mean_recall
    from cir.facts import check_apart

    facts, probe = load_facts(arguments.relearn), load_facts(arguments.probe)
    try:
        check_apart(facts, probe)
    except ValueError as error:
        # To learn the probed facts themselves is a question one may ask; but it shows nothing of forgetting.
        print(f"cir: warning: {error}", file=sys.stderr)
    model, tokenizer = load_model(arguments.model, device=arguments.device, dtype=arguments.dtype)
    settings = {"optimizer": arguments.optimizer, "lr": arguments.lr, "lora_rank": arguments.lora_rank}
    history = relearn(
        model, tokenizer, facts, probe, **settings, epochs=arguments.epochs, progress=not arguments.quiet
    )
    epochs = [{"mean_recall": mean_recall(recalls), "recall": recalls} for recalls in history]
    return _write_json(arguments.json, {**settings, "epochs": epochs})


def _profile(arguments: argparse.Namespace) -> int:
    from cir import CIRConfig, profile
    from cir.checkpoints import load_model
    from cir.inputs import Inputs

    inputs, out = Inputs.read(vars(arguments)), Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    config = CIRConfig.preset(arguments.preset)
    model, tokenizer = load_model(arguments.model, device=arguments.device, dtype=arguments.dtype)
    found = profile(
        model,
        tokenizer,
        inputs.facts,
        retain=inputs.retain,
        disruption=inputs.disruption,
        config=config,
        epochs=arguments.epochs,
        trace=out / "trace.json.gz",
    )
    (out / "profile.json").write_text(found.to_json(), encoding="utf-8")
    found.plot(out / "profile.png")
    print(found.table())
    print(f"written    {out}: profile.json, profile.png, trace.json.gz (for chrome://tracing or Perfetto)")
    return 0


def _fit(arguments: argparse.Namespace) -> int:
    from cir import Subspaces, load_facts
    from cir.checkpoints import load_model
    from cir.unlearning import builtin_text

    out = Path(arguments.out)
    if out.exists() and not arguments.overwrite:
        raise FileExistsError(f"expected a new file, got {out}, which exists; --overwrite replaces it")
    contrast, texts = load_facts(arguments.contrast), _read(arguments.text)
    known = None if arguments.known is None else Subspaces.load(arguments.known)
    model, tokenizer = load_model(arguments.model, device=arguments.device, dtype=arguments.dtype)
    subspaces = Subspaces.fit(
        model,
        tokenizer,
        builtin_text() if texts is None else texts,
        contrast,
        known=known,
        progress=not arguments.quiet,
    )
    subspaces.save(out)
    print(f"model      {subspaces.fitted_on['fingerprint'][:12]}")
    print(f"written    {out}, {out.stat().st_size / 1e6:.1f} MB")
    return 0


def _apply(arguments: argparse.Namespace) -> int:
    """``cir apply`` and ``cir revert``: they differ in the sign."""
    from cir import Edit
    from cir.checkpoints import check_output, load_model, saved_weights, write_folder
    from cir.engine import fingerprint, fingerprint_of

    out = check_output(arguments.out, arguments.overwrite)
    edits = [Edit.load(path) for path in arguments.edit]
    model, tokenizer = load_model(arguments.model, device=arguments.device, dtype=arguments.dtype)
    targets = edits[0].targets_in(model)
    before = fingerprint(targets)
    if arguments.sign == 1 and not arguments.force and (others := [e.id for e in edits if e.fingerprint != before]):
        raise ValueError(
            f"expected edits of the model {before[:12]}, got {', '.join(others)} of another; --force applies them"
        )
    for edit in edits:
        edit.apply_(model, sign=arguments.sign)
    after = fingerprint(targets)

    def fill(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        saved = fingerprint_of(saved_weights(folder, [target.name for target in targets]))
        if saved != after:
            raise OSError(f"expected the checkpoint to read back as {after[:12]}, got {saved[:12]}; it was not kept")

    write_folder(out, fill)
    print(f"weights    {before[:12]} -> {after[:12]}, read back equal")
    print(f"written    {out}")
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    from cir.demo import run

    return run(Path(arguments.out), arguments.model, progress=not arguments.quiet)


def _silence_transformers() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()


def _read(path: str | None) -> str | None:
    return None if path is None else Path(path).read_text(encoding="utf-8")


def _write_json(path: str, value: object) -> int:
    text = json.dumps(value, indent=2) + "\n"
    if path == "-":
        sys.stdout.write(text)
        return 0
    partial = Path(path).with_name(Path(path).name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cir",
        description="Make a language model forget chosen facts (Collapse of Irrelevant Representations).",
        epilog="Start with `cir demo`: it needs no GPU and takes minutes.",
    )
    parser.add_argument("--version", action="version", version=f"cir {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")

    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--device", help="cpu, cuda, cuda:1, ...; by default a GPU where there is one")
    shared.add_argument("--dtype", default="auto", help="float32, bfloat16, ...; by default the checkpoint's own")
    shared.add_argument("--quiet", action="store_true", help="no progress bars")

    sources = argparse.ArgumentParser(add_help=False)
    sources.add_argument("--facts", help=FACTS_HELP)
    sources.add_argument(
        "--data",
        metavar="NAME",
        help="instead of --facts: wmdp-bio, wmdp-cyber, rwku, tofu, muse-news, muse-books, counterfact, zsre, mmlu; "
        "from the hub or its cache (pip install 'cir[data]')",
    )
    sources.add_argument("--data-path", metavar="PATH", help="a local copy of that data set: a file or a folder")
    sources.add_argument("--limit", type=int, metavar="N", help="use so many of its facts, evenly spread")
    sources.add_argument("--neighbours", metavar="FACTS", help="facts near those, which must stay")
    sources.add_argument("--related", metavar="FACTS", help="further facts of the kind, which an attacker knows")

    texts = argparse.ArgumentParser(add_help=False)
    texts.add_argument(
        "--retain",
        metavar="TEXT",
        help="file of ordinary text like that the model must still handle; or wikitext or fineweb-edu, the data sets",
    )
    texts.add_argument(
        "--disruption",
        metavar="TEXT",
        help="file (or data set) of text on which harm is measured; by default a held-out third of --retain, and "
        "without that of the built-in text, which is short: give your own for a budget that means something",
    )

    demo = commands.add_parser(
        "demo",
        help="watch a small model forget capitals",
        description="SmolLM2-135M forgets the capitals of 28 countries; then an attacker tries to bring back six "
        "by training on the other 22. Shows what it knew, knows and relearns, and what was kept.",
    )
    demo.add_argument("--out", default="cir-demo", help="folder for plot and report (default: %(default)s)")
    demo.add_argument("--model", help=f"{MODEL_HELP}; by default SmolLM2-135M")
    demo.add_argument("--quiet", action="store_true", help="no progress bars")
    demo.set_defaults(run=_demo)

    unlearn = commands.add_parser(
        "unlearn",
        parents=[shared, sources, texts],
        help="make a model forget facts and save it",
        description="Writes a checkpoint that plain transformers loads, and report.json beside it. The model is "
        "the best one found whose loss on neutral text rose by no more than the budget.",
    )
    unlearn.add_argument("--model", required=True, help=MODEL_HELP)
    unlearn.add_argument("--out", required=True, help="folder for the checkpoint; written whole or not at all")
    unlearn.add_argument(
        "--budget", type=float, help="highest relative rise of the loss on that text (default: 0.001)"
    )
    unlearn.add_argument(
        "--disruption-tokens", type=int, metavar="N", help="of that text, measured after each epoch (default: 32768)"
    )
    unlearn.add_argument("--full-check", action="store_true", help="at the end, measure all of that text")
    unlearn.add_argument("--target-recall", type=float, help="stop as soon as mean recall is this low")
    unlearn.add_argument(
        "--rate", type=float, help="size of a forget step; larger models want smaller ones (default: 3)"
    )
    unlearn.add_argument("--max-epochs", type=int, help="passes over the facts at most (default: 10)")
    unlearn.add_argument(
        "--preset",
        choices=PRESETS,
        default="default",
        help="paper: the authors' for Llama-3.1-8B; repselect: soft collapse of the weight gradients' components",
    )
    unlearn.add_argument(
        "--rounding",
        choices=("nearest", "stochastic", "compensated"),
        help="of updated 16-bit weights (default: the preset's, nearest of paper and stochastic of the others)",
    )
    unlearn.add_argument("--seed", type=int, help="of every random choice (default: 0)")
    unlearn.add_argument(
        "--certify",
        action="store_true",
        help="measure and attack the model before and after, and write certificate.json and a page beside the "
        "weights; needs --neighbours and --disruption",
    )
    unlearn.add_argument("--no-relearning", action="store_true", help="certify without attacks by fine-tuning")
    unlearn.add_argument("--overwrite", action="store_true", help="replace --out where it exists")
    unlearn.add_argument(
        "--offload",
        choices=("auto", "always", "never"),
        default="auto",
        help="have the weights above the loss layers wait on the host (default: where the GPU's memory is short)",
    )
    unlearn.set_defaults(run=_unlearn)

    verify = commands.add_parser(
        "verify",
        parents=[shared, sources],
        help="recompute the certificate of a checkpoint",
        description="Says where it differs, and exits with 1 if it does. Files that have moved are named anew.",
    )
    verify.add_argument("folder", help="that `cir unlearn --certify` wrote")
    verify.add_argument("--disruption", metavar="TEXT", help="the text on which the loss was certified")
    verify.add_argument(
        "--no-relearning", action="store_true", help="leave out the attacks by fine-tuning: much faster"
    )
    verify.set_defaults(run=_verify)

    evaluate = commands.add_parser(
        "eval",
        parents=[shared, sources],
        help="measure recall of facts and loss on text, and try cheap attacks",
        description="Changes nothing.",
    )
    evaluate.add_argument("--model", required=True, help=MODEL_HELP)
    evaluate.add_argument("--text", metavar="TEXT", help="file on which to measure the loss, in nats a token")
    evaluate.add_argument("--max-tokens", type=int, help="of that text, evenly spread (default: all)")
    evaluate.add_argument(
        "--generate", type=int, default=0, metavar="N", help="look for the answers in N greedy tokens too"
    )
    evaluate.add_argument(
        "--tasks", nargs="+", metavar="TASK", help="also tasks of lm-eval, mmlu say (pip install 'cir[eval]')"
    )
    evaluate.add_argument("--task-limit", type=int, metavar="N", help="questions of each task at most")
    evaluate.add_argument(
        "--attacks",
        action="store_true",
        help="also try quantization, sampling and, with --related, few-shot prompts and a linear probe",
    )
    evaluate.add_argument(
        "--original", metavar="MODEL", help="the model before it forgot, for the attack that undoes small changes"
    )
    evaluate.add_argument("--seed", type=int, default=0, help="of the attacks' draws (default: %(default)s)")
    evaluate.add_argument("--json", metavar="OUT", default="-", help="where to write (default: standard output)")
    evaluate.set_defaults(run=_eval)

    attack = commands.add_parser(
        "attack",
        parents=[shared],
        help="try to bring forgotten facts back by fine-tuning on related ones",
        description="Trains all MLP layers on one set of facts and measures recall of another after "
        "each epoch. Saves nothing: the model on disk is not touched.",
    )
    attack.add_argument("--model", required=True, help=MODEL_HELP)
    attack.add_argument("--relearn", metavar="FACTS", required=True, help="facts to train on: " + FACTS_HELP)
    attack.add_argument("--probe", metavar="FACTS", required=True, help="facts to measure; they need probes")
    attack.add_argument("--optimizer", choices=("adam", "sgd"), default="adam", help="(default: %(default)s)")
    attack.add_argument("--lr", type=float, default=1e-5, help="learning rate (default: %(default)s)")
    attack.add_argument(
        "--lora-rank", type=int, default=0, metavar="R", help="train adapters of this rank; 0 for the weights"
    )
    attack.add_argument("--epochs", type=int, default=6, help="passes over the facts (default: %(default)s)")
    attack.add_argument("--json", metavar="OUT", default="-", help="where to write (default: standard output)")
    attack.set_defaults(run=_attack)

    profile = commands.add_parser(
        "profile",
        parents=[shared, sources, texts],
        help="see where the time of unlearning goes",
        description="Forgets for some epochs under torch's profiler: seconds and FLOPs by phase. Saves no model.",
    )
    profile.add_argument("--model", required=True, help=MODEL_HELP)
    profile.add_argument("--preset", choices=PRESETS, default="default", help="as for `cir unlearn`")
    profile.add_argument("--epochs", type=int, default=1, help="(default: %(default)s)")
    profile.add_argument("--out", default="cir-profile", help="folder for what is found (default: %(default)s)")
    profile.set_defaults(run=_profile)

    fit = commands.add_parser(
        "fit",
        parents=[shared],
        help="fit the subspaces that an Editor needs, once for a model",
        description="What ordinary text and contrast facts have in common, kept in a safetensors file.",
    )
    fit.add_argument("--model", required=True, help=MODEL_HELP)
    fit.add_argument(
        "--contrast",
        metavar="FACTS",
        required=True,
        help="facts like those to be edited that must stay: " + FACTS_HELP,
    )
    fit.add_argument("--text", help="file of ordinary text (default: the built-in text)")
    fit.add_argument("--known", metavar="SUBSPACES", help="a file of this command to be added to")
    fit.add_argument("--out", required=True, help="the safetensors file; written whole or not at all")
    fit.add_argument("--overwrite", action="store_true", help="replace --out where it exists")
    fit.set_defaults(run=_fit)

    for name, sign, what in (("apply", 1, "add edits to"), ("revert", -1, "take edits out of")):
        change = commands.add_parser(
            name,
            parents=[shared],
            help=f"{what} a checkpoint",
            description="Reads the new checkpoint back and compares hashes before it is put in place.",
        )
        change.add_argument("--model", required=True, help=MODEL_HELP)
        change.add_argument("--edit", nargs="+", required=True, help="files of Edit.save")
        change.add_argument("--out", required=True, help="folder for the checkpoint; written whole or not at all")
        change.add_argument("--overwrite", action="store_true", help="replace --out where it exists")
        if sign == 1:
            change.add_argument("--force", action="store_true", help="also on a model that they were not made on")
        change.set_defaults(run=_apply, sign=sign)
    return parser


if __name__ == "__main__":
    sys.exit(main())
