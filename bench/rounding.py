"""What rounding an update to bfloat16 weights drops, and what that costs: forgetting at equal disruption.

    python -m bench.rounding [--facts A.jsonl ...] [--retain R.txt --disruption D.txt] [--doses 1 0.3] [--seeds 0 1]

SmolLM2-135M with the weights that are updated rounded to bfloat16, then unlearned with each rounding of the updates,
and with none. They lie in float32, whose products are faster on a CPU; every update leaves them with values of
bfloat16. Nothing is relearned on the way, as that is taken back whatever it is rounded to.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import cir
from bench.records import ROOT, write_rows
from cir import CIRConfig, load_facts
from cir.data.shipped import DATA
from cir.forgetting.update import interpolate, restore, snapshot
from cir.model.checkpoints import demo_model, load_model
from cir.model.finding import find_stack
from cir_kernels import outer_update_
from cir_kernels.rounding import ROUNDINGS


class Rounded:
    """Stands in for :func:`cir_kernels.outer_update_` on float32 weights that hold bfloat16 values.

    Attributes:
        kept, wanted: sums over the updates of <done, wanted> and <wanted, wanted>.
    """

    def __init__(self, rounding: str | None) -> None:
        self.rounding = rounding
        self.kept = self.wanted = 0.0
        self.remainders: dict[int, Tensor] = {}

    def update_(self, weight: Tensor, g: Tensor, a: Tensor, scale: float, *, seed: int, **_: Any) -> None:
        before = weight.clone()
        outer_update_(weight, g, a, scale)
        if self.rounding is None:
            return
        wanted, narrow = weight - before, before.bfloat16()
        remainder = None
        if self.rounding == "compensated":
            remainder = self.remainders.setdefault(id(weight), torch.zeros_like(narrow, dtype=torch.int16))
        outer_update_(narrow, g, a, scale, rounding=self.rounding, seed=seed, remainder=remainder)
        weight.copy_(narrow)
        self.kept += float(((weight - before).double() * wanted).sum())
        self.wanted += float(wanted.double().square().sum())

    def interpolate(self, targets: Any, weights: Any, share: float) -> None:
        interpolate(targets, weights, share)
        if self.rounding is not None:
            restore(targets, [weight.bfloat16() for weight in snapshot(targets)])

    @contextmanager
    def used(self) -> Iterator[None]:
        with (
            patch("cir.forgetting.update.outer_update_", self.update_),
            patch("cir.forgetting.budget.interpolate", self.interpolate),
        ):
            yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--facts", nargs="+", default=[DATA / "demo_forget.jsonl", DATA / "demo_related.jsonl"])
    parser.add_argument("--retain", type=Path)
    parser.add_argument("--disruption", type=Path)
    parser.add_argument("--budget", type=float, default=0.003)
    parser.add_argument("--steps", type=int, default=CIRConfig.max_steps, help="at most")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--doses", type=float, nargs="+", default=[CIRConfig.dose], help="nats of a step")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    arguments = parser.parse_args()
    model, tokenizer = load_model(demo_model(), device="cpu")
    stack = find_stack(model)
    targets = stack.writers(CIRConfig().first_layer(len(stack.mlps)))
    facts = [fact for path in arguments.facts for fact in load_facts(path)]
    texts = {
        name: path.read_text(encoding="utf-8")
        for name, path in (("retain", arguments.retain), ("disruption", arguments.disruption))
        if path
    }
    originals = [weight.bfloat16() for weight in snapshot(targets)]
    print(f"{'rounding':<13}{'dose':>6}{'seed':>6}{'recall':>9}{'rise':>10}{'kept of the updates':>21}", flush=True)
    for dose, seed in itertools.product(arguments.doses, arguments.seeds):
        config = CIRConfig(
            dose=dose,
            relearning_steps=0,
            budget=arguments.budget,
            max_steps=arguments.steps,
            disruption_tokens=arguments.tokens,
            seed=seed,
        )
        for rounding in (None, *ROUNDINGS):
            restore(targets, originals)
            rounded = Rounded(rounding)
            with rounded.used():
                after = cir.unlearn(
                    model, tokenizer, facts, **texts, config=config, on_signal="raise", progress=False
                ).after
            row = {
                "bench": "rounding",
                "rounding": rounding or "float32",
                "dose": dose,
                "seed": seed,
                "steps": arguments.steps,
                "tokens": arguments.tokens,
                "budget": arguments.budget,
                "facts": len(facts),
                "recall": after.mean_recall,
                "rise": after.rise,
                "rise_stderr": after.rise_stderr,
                "kept": rounded.kept / rounded.wanted if rounding else 1.0,
            }
            write_rows(arguments.out / "rounding.jsonl", [row])
            print(
                f"{row['rounding']:<13}{dose:>6}{seed:>6}{row['recall']:>9.4f}{row['rise']:>+10.3%}{row['kept']:>21.2%}",
                flush=True,
            )


if __name__ == "__main__":
    main()
