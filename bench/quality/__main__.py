from __future__ import annotations

import argparse
from pathlib import Path

import bench.quality
from bench.baselines import BASELINES
from bench.quality.measuring import Bench, Task, controls
from bench.quality.report import report
from bench.quality.rows import Rows
from bench.quality.runs import METHODS, ablate, compare, untouched
from bench.records import ROOT
from cir import load_facts
from cir.data.facts import check_apart
from cir.data.shipped import DATA, builtin_text
from cir.forgetting.report import hash_facts
from cir.model.checkpoints import demo_model
from cir.proof.relearning import RELEARNINGS, STRONG

FAMILIES = {"strong": list(STRONG), "controls": list(controls(RELEARNINGS["adam, fast"]))}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=bench.quality.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=demo_model())
    parser.add_argument("--relearn", default=str(DATA / "demo_related.jsonl"))
    parser.add_argument("--probe", default=str(DATA / "demo_forget.jsonl"))
    parser.add_argument("--neighbours", default=str(DATA / "demo_neighbours.jsonl"))
    parser.add_argument("--forget", help="facts; default: those of --relearn and --probe")
    parser.add_argument("--contrast", help="facts of which cir is told that they must stay")
    parser.add_argument("--same-subject", help="facts: other relations of the same subjects, which must stay")
    parser.add_argument("--gold", help="a model that never knew the facts, with which each is compared")
    parser.add_argument("--retain", help="text; default: the built-in one, of which a third measures disruption")
    parser.add_argument("--disruption", help="text; needs --retain")
    every = ["untouched", *METHODS, *BASELINES]
    parser.add_argument("--methods", nargs="+", choices=every, default=every)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--budgets", type=float, nargs="+", help="default: 0.001 0.003; 0.01 if --small")
    parser.add_argument("--tokens", type=int, default=32768, help="of the disruption text")
    parser.add_argument(
        "--attacks",
        nargs="+",
        choices=[*RELEARNINGS, *STRONG, *FAMILIES["controls"], *FAMILIES],
        default=list(RELEARNINGS),
        help="strong, controls: all of these",
    )
    parser.add_argument("--ablate", action="store_true", help="variants of cir instead, at the last budget")
    parser.add_argument(
        "--small", action="store_true", help="one seed, one attack, every other rate of a baseline, two of its epochs"
    )
    parser.add_argument("--report", action="store_true", help="only draw the report of the rows in --out")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    arguments = parser.parse_args()
    texts = [
        None if path is None else Path(path).read_text(encoding="utf-8")
        for path in (arguments.retain, arguments.disruption)
    ]
    if texts[1] is None:
        # The built-in text is short: its paragraphs in turn, so that both parts are of the same subjects.
        paragraphs = (texts[0] or builtin_text()).split("\n\n")
        texts = ["\n\n".join(p for i, p in enumerate(paragraphs) if (i % 3 == 2) == held) for held in (False, True)]
    if arguments.small:
        arguments.seeds = arguments.seeds[:1]
    budgets = arguments.budgets or ([0.01] if arguments.small else [0.001, 0.003])
    attacks = [name for asked in arguments.attacks for name in FAMILIES.get(asked, [asked])]
    task = Task(
        *(load_facts(path) for path in (arguments.relearn, arguments.probe, arguments.neighbours)),
        *texts,
        tokens=arguments.tokens,
        attacks=tuple(attacks[:1] if arguments.small or arguments.ablate else attacks),
        thorough=not arguments.small,
        same_subject=load_facts(arguments.same_subject) if arguments.same_subject else [],
        contrast=load_facts(arguments.contrast) if arguments.contrast else [],
        forget=load_facts(arguments.forget) if arguments.forget else [],
        gold=arguments.gold,
    )
    check_apart(task.relearn, task.probe)
    common = {
        "model": Path(arguments.model).stem,
        "facts": hash_facts(task.facts)[:12],
        "tokens": arguments.tokens,
    }
    # What is measured beside them is part of which rows these are.
    if arguments.gold:
        common["gold_model"] = Path(arguments.gold).stem
    if task.same_subject:
        common["same_subject_facts"] = hash_facts(task.same_subject)[:12]
    rows = Rows(arguments.out / "quality.jsonl", common, task.attacks)
    if not arguments.report:
        model = Bench(arguments.model, task)
        if arguments.ablate:
            ablate(model, rows, budgets[-1], arguments.seeds)
        else:
            if "untouched" in arguments.methods:
                untouched(model, rows)
            methods = [name for name in arguments.methods if name != "untouched"]
            compare(model, rows, methods, budgets, arguments.seeds)
    report(rows.found, arguments.out / "quality.html")


if __name__ == "__main__":
    main()
