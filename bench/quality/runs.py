"""The methods and variants that are compared, and the rows that each needs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from bench.baselines import BASELINES
from bench.quality.measuring import CIR, Bench, Outcome
from bench.quality.rows import Rows, plain
from cir import CIRConfig
from cir.config import BreakingConfig
from cir.forgetting.report import hash_facts

METHODS: dict[str, CIRConfig | BreakingConfig] = {
    "cir": CIR,
    "paper": CIRConfig.paper(),
    "repselect": CIRConfig.repselect(),
}
ABLATIONS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "without contrast facts": {"contrast": False},
    "contrast facts count as text does": {"contrast_weight": 1.0},
    "no gradients of text": {"text_weight": 0.0},
    "no relearning": {"relearning_steps": 0},
    "lower floor of relearning": {"relearning_floor": -6.0},
    "floor of -6": {"floor": -6.0},
    "floor of -8": {"floor": -8.0},
    "dose of 1": {"dose": 1.0},
    "ridges x 10": {"ridge_activation": 3e-2, "ridge_gradient": 1e-1},
    "ridges / 10": {"ridge_activation": 3e-4, "ridge_gradient": 1e-3},
    "all directions": {"rank": 1.0},
    "a fifth of the layers": {"layers": 0.2},
    "half of the layers": {"layers": 0.5},
}
"""Of each variant, what is other than in cir; ``contrast`` is no field, but whether contrast facts are told."""


def untouched(bench: Bench, rows: Rows) -> None:
    key = {"kind": "run", "method": "untouched", "budget": 0.0, "seed": 0}
    if rows.get(**key) is None:
        rows.add(bench.examine(Outcome(bench.before, [], 0.0, bench.weights)), **key)


def run(bench: Bench, rows: Rows, config: CIRConfig | BreakingConfig, contrast: bool = True, **key: Any) -> None:
    """The row of ``key``, of a run by :func:`cir.unlearn`; the paper's way cannot be told what must stay."""
    told = bench.task.contrast if contrast and isinstance(config, CIRConfig) else []
    config = replace(config, disruption_tokens=bench.task.tokens)
    if isinstance(config, BreakingConfig):
        config = replace(config, max_epochs=bench.task.epochs)
    key |= {"budget": config.budget, "seed": config.seed, "config": plain(config)}
    key["contrast"] = hash_facts(told)[:12] if told else None
    if rows.get(**key) is None:
        rows.add(bench.examine(bench.forget_with(config, told)), **key)


def run_baseline(bench: Bench, rows: Rows, name: str, budgets: Sequence[float], seeds: Sequence[int]) -> None:
    """Its rows at each budget and seed, at the rate that forgets most inside that budget on the first seed."""
    rates = BASELINES[name].rates if bench.task.thorough else BASELINES[name].rates[1::2]
    best: dict[float, tuple[float, float]] = {}  # recall and rate, by budget
    reached: dict[float, Outcome | None] = {}  # of the best, where it was reached just now
    for rate in rates:
        key = {"kind": "search", "method": name, "seed": seeds[0], "rate": rate}
        left = [budget for budget in budgets if rows.get(budget=budget, **key) is None]
        found = bench.forget_with_baseline(name, rate, left, seeds[0]) if left else {}
        for budget, outcome in found.items():
            found_at = {"facts_recall": outcome.measure.mean_recall, "seconds": outcome.seconds}
            rows.add({**found_at, **bench.rise(outcome)}, budget=budget, **key)
        for budget in budgets:
            tried = rows.get(budget=budget, **key)["facts_recall"], rate
            if budget not in best or tried < best[budget]:
                best[budget], reached[budget] = tried, found.get(budget)
    for seed, (budget, (_, rate)) in itertools.product(seeds, best.items()):
        key = {"kind": "run", "method": name, "budget": budget, "seed": seed}
        if rows.get(**key) is None:
            outcome = reached[budget] if seed == seeds[0] else None
            outcome = outcome or bench.forget_with_baseline(name, rate, [budget], seed)[budget]
            rows.add({"rate": rate, **bench.examine(outcome)}, **key)


def compare(bench: Bench, rows: Rows, methods: Sequence[str], budgets: Sequence[float], seeds: Sequence[int]) -> None:
    for name in methods:
        if name in BASELINES:
            run_baseline(bench, rows, name, budgets, seeds)
            continue
        for budget, seed in itertools.product(budgets, seeds):
            run(bench, rows, replace(METHODS[name], budget=budget, seed=seed), kind="run", method=name)


def ablate(bench: Bench, rows: Rows, budget: float, seeds: Sequence[int]) -> None:
    for (variant, changes), seed in itertools.product(ABLATIONS.items(), seeds):
        fields = {"contrast": True, **changes}
        contrast = fields.pop("contrast")
        config = replace(CIR, **fields, budget=budget, seed=seed)
        run(bench, rows, config, contrast, kind="ablation", method="cir", variant=variant)
