from __future__ import annotations

import argparse
import ast
from pathlib import Path
from typing import Any

import bench.world
from bench.records import ROOT
from bench.world.report import table
from bench.world.runs import ATTACKS, FAMILIES, METHODS, RELEARNINGS, changed, compare
from bench.world.training import SIZES


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m bench.world", description=bench.world.__doc__, formatter_class=form)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["2m"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--methods", nargs="*", choices=list(METHODS), default=list(METHODS), help="(default: all)")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.01])
    parser.add_argument("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="of the configurations of ours")
    parser.add_argument("--rates", type=float, nargs="+", help="tried instead of each method's own")
    parser.add_argument("--subjects", type=int, default=20, help="of each kind (default: %(default)s)")
    parser.add_argument("--attacks", nargs="+", choices=[*RELEARNINGS, *FAMILIES], default=list(ATTACKS))
    parser.add_argument("--models", type=Path, default=ROOT / "worlds", help="where models are kept")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    arguments = parser.parse_args()
    attacks = [name for asked in arguments.attacks for name in FAMILIES.get(asked, [asked])]
    fields = dict(_field(parser, pair) for pair in arguments.set)
    methods = {name: changed(METHODS[name], fields, arguments.rates) for name in arguments.methods}
    rows = [
        row
        for size in arguments.sizes
        for seed in arguments.seeds
        for row in compare(
            size,
            seed,
            methods,
            budgets=arguments.budgets,
            attacks=attacks,
            subjects=arguments.subjects,
            models=arguments.models,
            path=arguments.out / "world.jsonl",
            changes=fields,
        )
    ]
    print(table(rows))


def _field(parser: argparse.ArgumentParser, pair: str) -> tuple[str, Any]:
    name, equals, value = pair.partition("=")
    if not equals:
        parser.error(f"--set: expected FIELD=VALUE, got {pair!r}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


if __name__ == "__main__":
    main()
