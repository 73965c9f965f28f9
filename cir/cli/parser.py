"""The options of every command. They are read without torch, so that help comes at once."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from typing import Any

from cir import __version__
from cir.data.datasets import SOURCES

MODEL_HELP = "a hub id, a local folder, or a GGUF file"
FACTS_HELP = (
    'JSON lines: {"id", "sentences": [...], "probes": [{"prompt", "target"}]}; or a text file, a sentence a line'
)
CONTRAST_HELP = "facts that must stay: of the same relations with other subjects, and about the same subjects"
PRESETS = ("default", "paper", "repselect")
GPUS = ("a100-40", "a100-80", "l40s", "rtx4090", "rtx5090", "rtx-pro-6000", "h100", "h200", "b200")


def parser() -> argparse.ArgumentParser:
    """The parser of the ``cir`` command; ``command`` of what it returns is the command's name."""
    found = argparse.ArgumentParser(
        prog="cir",
        description="Make a language model forget chosen facts (Collapse of Irrelevant Representations).",
        epilog="Start with `cir demo`: it needs no GPU and takes minutes.",
    )
    found.add_argument("--version", action="version", version=f"cir {__version__}")
    commands = found.add_subparsers(dest="command", required=True, metavar="command")
    shared, sources, texts = _shared(), _sources(), _texts()
    _add_demo(commands)
    _add_unlearn(commands, [shared, sources, texts])
    _add_verify(commands, [shared, sources])
    _add_eval(commands, [shared, sources])
    _add_attack(commands, [shared])
    _add_profile(commands, [shared, sources, texts])
    _add_plan(commands)
    commands.add_parser(
        "doctor",
        help="see what would run here, and whether it is right",
        description="Versions, devices, and each kernel beside its PyTorch form. Exits with 1 if one differs.",
    ).set_defaults(quiet=True)
    _add_fit(commands, [shared])
    _add_apply_and_revert(commands, [shared])
    _add_journal(commands)
    for command in commands.choices.values():
        command.add_argument("--debug", action="store_true", help="show where an error comes from")
    return found


def _rounding(name: str) -> str:
    from cir_kernels import ROUNDINGS  # which imports torch: only where the option is given

    if name not in ROUNDINGS:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(ROUNDINGS)}, got {name!r}")
    return name


def _number(kind: Callable[[str], Any], what: str, least: float) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value <= sys.maxsize:
            raise argparse.ArgumentTypeError(f"expected {what}, got {text[:80]!r}")
        return value

    return read


_count = _number(int, "a whole number of at least 1", 1)
_whole = _number(int, "a whole number of at least 0", 0)
_positive = _number(float, "a positive number", 1e-300)


def _shared() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(add_help=False)
    found.add_argument("--device", help="cpu, cuda, cuda:1, ...; by default a GPU where there is one")
    found.add_argument(
        "--dtype", default="auto", help="float32, bfloat16 or float16; by default the checkpoint's own"
    )
    found.add_argument("--quiet", action="store_true", help="no progress bars")
    return found


def _sources() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(add_help=False)
    found.add_argument("--facts", help=FACTS_HELP)
    found.add_argument(
        "--data",
        metavar="NAME",
        help=f"instead of --facts: {', '.join(name for name, source in SOURCES.items() if source.fact)}; from the "
        "hub or its cache (pip install 'cir[data]')",
    )
    found.add_argument("--data-path", metavar="PATH", help="a local copy of that data set: a file or a folder")
    found.add_argument("--limit", type=_count, metavar="N", help="use so many of its facts, evenly spread")
    found.add_argument("--neighbours", metavar="FACTS", help="facts near those, which must stay")
    found.add_argument("--same-subject", metavar="FACTS", help="other facts about the same subjects, which must stay")
    found.add_argument("--related", metavar="FACTS", help="further facts of the kind, which an attacker knows")
    return found


def _texts() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(add_help=False)
    found.add_argument(
        "--retain",
        metavar="TEXT",
        help="file of ordinary text like that the model must still handle; or wikitext or fineweb-edu, the data sets",
    )
    found.add_argument(
        "--disruption",
        metavar="TEXT",
        help="file (or data set) of text on which harm is measured; by default a held-out third of --retain, and "
        "without that of the built-in text, which is short: give your own for a budget that means something",
    )
    return found


def _add_demo(commands: Any) -> None:
    command = commands.add_parser(
        "demo",
        help="watch a small model forget capitals",
        description="SmolLM2-135M forgets the capitals of 28 countries; then an attacker tries to bring back six "
        "by training on the other 22. Shows what it knew, knows and relearns, and what was kept.",
    )
    command.add_argument("--out", default="cir-demo", help="folder for plot and report (default: %(default)s)")
    command.add_argument("--model", help=f"{MODEL_HELP}; by default SmolLM2-135M")
    command.add_argument("--quiet", action="store_true", help="no progress bars")


def _add_unlearn(commands: Any, parents: list[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "unlearn",
        parents=parents,
        help="make a model forget facts and save it",
        description="Writes a checkpoint that plain transformers loads, and report.json beside it. The model is "
        "the best one found whose loss on neutral text rose by no more than the budget.",
    )
    command.add_argument("--model", required=True, help=MODEL_HELP)
    command.add_argument("--out", required=True, help="folder for the checkpoint; written whole or not at all")
    command.add_argument(
        "--budget", type=float, help="highest relative rise of the loss on that text (default: 0.001)"
    )
    command.add_argument(
        "--disruption-tokens",
        type=_count,
        metavar="N",
        help="of that text, measured after each epoch (default: 32768)",
    )
    command.add_argument("--full-check", action="store_true", help="at the end, measure all of that text")
    command.add_argument("--target-recall", type=float, help="stop as soon as mean recall is this low")
    command.add_argument("--contrast", metavar="FACTS", help=f"{CONTRAST_HELP} (default: built-in ones)")
    command.add_argument("--subspaces", metavar="FILE", help="of `cir fit`, in place of --contrast")
    command.add_argument("--floor", type=float, help="log-odds at which an answer is gone (default: -4)")
    command.add_argument("--max-steps", type=_count, help="steps at most (default: 40)")
    command.add_argument(
        "--worst-window", type=float, help="highest rise of the loss of one window, in nats a token (default: 0.1)"
    )
    command.add_argument("--rate", type=float, help="of the other presets: size of a forget step")
    command.add_argument("--max-epochs", type=_count, help="of the other presets: passes over the facts at most")
    command.add_argument(
        "--preset",
        choices=PRESETS,
        default="default",
        help="paper: the authors' way, for Llama-3.1-8B; repselect: their later one",
    )
    command.add_argument(
        "--rounding",
        type=_rounding,
        metavar="HOW",
        help="of updated 16-bit weights: nearest, stochastic or compensated (default: nearest of paper, else "
        "stochastic)",
    )
    command.add_argument("--seed", type=_whole, help="of every random choice (default: 0)")
    command.add_argument(
        "--certify",
        action="store_true",
        help="measure and attack the model before and after, and write certificate.json and a page beside the "
        "weights; needs --neighbours and --disruption",
    )
    command.add_argument("--no-relearning", action="store_true", help="certify without attacks by fine-tuning")
    command.add_argument(
        "--sign", metavar="KEY", help="sign the certificate with this private Ed25519 key, a PEM file"
    )
    command.add_argument("--max-length", type=_count, metavar="N", help="tokens of a sentence at most (default: 128)")
    command.add_argument("--overwrite", action="store_true", help="replace --out where cir wrote it")
    command.add_argument(
        "--offload",
        choices=("auto", "always", "never"),
        default="auto",
        help="of the other presets: have the weights above the loss layers wait on the host (default: where the "
        "GPU's memory is short)",
    )


def _add_verify(commands: Any, parents: list[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "verify",
        parents=parents,
        help="recompute the certificate of a checkpoint",
        description="Says where it differs, and exits with 1 if it does, and what was not verified. Files that have "
        "moved, or lie elsewhere, are named anew.",
    )
    command.add_argument("folder", help="that `cir unlearn --certify` wrote")
    command.add_argument("--disruption", metavar="TEXT", help="the text on which the loss was certified")
    command.add_argument(
        "--original", metavar="MODEL", help="the model from before, to verify what was measured of it"
    )
    command.add_argument("--public-key", metavar="KEY", help="of who must have signed it, a PEM file")
    command.add_argument(
        "--no-relearning", action="store_true", help="leave out the attacks by fine-tuning: much faster"
    )


def _add_eval(commands: Any, parents: list[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "eval",
        parents=parents,
        help="measure recall of facts and loss on text, and try cheap attacks",
        description="Changes nothing.",
    )
    command.add_argument("--model", required=True, help=MODEL_HELP)
    command.add_argument("--text", metavar="TEXT", help="file on which to measure the loss, in nats a token")
    command.add_argument("--max-tokens", type=_count, help="of that text, evenly spread (default: all)")
    command.add_argument(
        "--generate", type=_whole, default=0, metavar="N", help="look for the answers in N greedy tokens too"
    )
    command.add_argument(
        "--tasks", nargs="+", metavar="TASK", help="also tasks of lm-eval, mmlu say (pip install 'cir[eval]')"
    )
    command.add_argument("--task-limit", type=_count, metavar="N", help="questions of each task at most")
    command.add_argument(
        "--attacks",
        action="store_true",
        help="also try quantization, sampling and, with --related, few-shot prompts and a linear probe",
    )
    command.add_argument(
        "--original", metavar="MODEL", help="the model before it forgot, for the attack that undoes small changes"
    )
    command.add_argument("--seed", type=_whole, default=0, help="of the attacks' draws (default: %(default)s)")
    command.add_argument("--json", metavar="OUT", default="-", help="where to write (default: standard output)")


def _add_attack(commands: Any, parents: list[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "attack",
        parents=parents,
        help="try to bring forgotten facts back by fine-tuning on related ones",
        description="Trains all MLP layers on one set of facts and measures recall of another after "
        "each epoch. Saves nothing: the model on disk is not touched.",
    )
    command.add_argument("--model", required=True, help=MODEL_HELP)
    command.add_argument("--relearn", metavar="FACTS", required=True, help="facts to train on: " + FACTS_HELP)
    command.add_argument("--probe", metavar="FACTS", required=True, help="facts to measure; they need probes")
    command.add_argument("--optimizer", choices=("adam", "sgd"), default="adam", help="(default: %(default)s)")
    command.add_argument("--lr", type=_positive, default=1e-5, help="learning rate (default: %(default)s)")
    command.add_argument(
        "--lora-rank", type=_whole, default=0, metavar="R", help="train adapters of this rank; 0 for the weights"
    )
    command.add_argument("--epochs", type=_count, default=6, help="passes over the facts (default: %(default)s)")
    command.add_argument("--json", metavar="OUT", default="-", help="where to write (default: standard output)")


def _add_profile(commands: Any, parents: list[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "profile",
        parents=parents,
        help="see where the time of unlearning goes",
        description="Forgets for some epochs under torch's profiler: seconds and FLOPs by phase. Saves no model.",
    )
    command.add_argument("--model", required=True, help=MODEL_HELP)
    command.add_argument("--preset", choices=PRESETS, default="default", help="as for `cir unlearn`")
    command.add_argument("--epochs", type=_count, default=1, help="(default: %(default)s)")
    command.add_argument("--out", default="cir-profile", help="folder for what is found (default: %(default)s)")


def _add_plan(commands: Any) -> None:
    command = commands.add_parser(
        "plan",
        help="see what a run will need and take on a GPU, before it is rented",
        description="From the configuration of a model alone: no weights are loaded and no GPU is needed.",
    )
    command.add_argument("--model", required=True, help="a folder, a config.json or a hub id")
    command.add_argument("--gpu", required=True, choices=GPUS, help="which it is to run on")
    command.add_argument("--facts", type=_count, required=True, metavar="N", help="how many")
    command.add_argument("--sentences", type=_count, default=3, metavar="N", help="of each (default: %(default)s)")
    command.add_argument(
        "--tokens", type=_count, default=20, metavar="N", help="of a sentence (default: %(default)s)"
    )
    command.add_argument("--json", action="store_true", help="print JSON instead of a table")
    command.add_argument("--plot", metavar="PNG", help="draw the seconds of each phase")
    command.set_defaults(quiet=True)


def _add_fit(commands: Any, parents: list[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "fit",
        parents=parents,
        help="fit subspaces, once for a model and all that it is to forget",
        description="What ordinary text and contrast facts have in common, kept in a safetensors file.",
    )
    command.add_argument("--model", required=True, help=MODEL_HELP)
    command.add_argument(
        "--contrast",
        metavar="FACTS",
        required=True,
        help=f"{CONTRAST_HELP}: {FACTS_HELP}",
    )
    command.add_argument("--text", help="file of ordinary text (default: the built-in text)")
    command.add_argument("--out", required=True, help="the safetensors file; written whole or not at all")
    command.add_argument("--overwrite", action="store_true", help="replace --out where it exists")


def _add_apply_and_revert(commands: Any, parents: list[argparse.ArgumentParser]) -> None:
    for name, sign, what in (("apply", 1, "add edits to"), ("revert", -1, "take edits out of")):
        change = commands.add_parser(
            name,
            parents=parents,
            help=f"{what} a checkpoint",
            description="Reads the new checkpoint back and compares hashes before it is put in place.",
        )
        change.add_argument("--model", required=True, help=MODEL_HELP)
        change.add_argument("--edit", nargs="+", required=True, help="files of Edit.save")
        change.add_argument("--out", required=True, help="folder for the checkpoint; written whole or not at all")
        change.add_argument("--overwrite", action="store_true", help="replace --out where cir wrote it")
        change.add_argument(
            "--force",
            action="store_true",
            help="also to a model that they were not made on"
            if sign == 1
            else "also where no record says they are in",
        )
        change.set_defaults(sign=sign)


def _add_journal(commands: Any) -> None:
    command = commands.add_parser(
        "journal",
        help="see what a journal of edits holds, and mend one that is damaged",
        description="check: exits with 1 where a record was cut short, altered, moved or left out. repair: moves all "
        "from that record on to a file beside it, and so loses what it forgot.",
    )
    command.add_argument("what", choices=("check", "repair"))
    command.add_argument("file", help="of Editor(journal=...), which no process has open")
    command.add_argument("--key-file", metavar="FILE", help="holds the key that the journal was made with")
    command.set_defaults(quiet=True)
