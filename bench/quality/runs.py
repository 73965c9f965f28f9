"""The methods and variants that are compared, and the rows that each needs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from bench.baselines import BASELINES
from bench.quality.measuring import CIR, Bench, Outcome
from bench.quality.rows import Rows
from cir import CIRConfig

METHODS: dict[str, CIRConfig] = {"cir": CIR, "repselect": CIRConfig.repselect()}
ABLATIONS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "no collapse": {"rank_background": 0, "rank_activation": 0, "rank_gradient": 0},
    "activations only": {"rank_gradient": 0},
    "gradients only": {"rank_background": 0, "rank_activation": 0},
    "facts' bases only (the paper)": {"rank_background": 0},
    "retain text's bases only": {"rank_activation": 0, "rank_gradient": 0},
    "contrast facts' bases": {"contrast": True},
    "sequential": {"mode": "sequential", "rank_background": 0},
    "soft": {"mode": "soft"},
    "whole sentences": {"to_answers": False},
    "no word dropout": {"word_dropout": 0.0},
    "background of a third": {"rank_background": 1 / 3},
    "background of two thirds": {"rank_background": 2 / 3},
    "half of k": {"rank_activation": 6, "rank_gradient": 6},
    "twice k": {"rank_activation": 24, "rank_gradient": 24},
    "loss layers 3..9 of 32": {"loss_layers": (3 / 32, 9 / 32)},
    "loss layers 12..18 of 32": {"loss_layers": (12 / 32, 18 / 32)},
    "no retain step": {"retain_rate": 0.0},
    "outputs may grow": {"growth_weight": 0.0},
    "outputs must not grow at all": {"growth_weight": 1.0},
    "loss layers updated too": {"update_loss_layers": True},
}


def untouched(bench: Bench, rows: Rows) -> None:
    key = {"kind": "run", "method": "untouched", "budget": 0.0, "seed": 0}
    if rows.get(**key) is None:
        rows.add(bench.examine(Outcome(bench.before, [], 0.0, bench.weights)), **key)


def run(bench: Bench, rows: Rows, config: CIRConfig, contrast: bool = False, **key: Any) -> None:
    """The row of ``key``, of a run by :func:`cir.unlearn`."""
    key |= {"budget": config.budget, "seed": config.seed}
    if rows.get(**key) is None:
        config = replace(config, max_epochs=bench.task.epochs, disruption_tokens=bench.task.tokens)
        rows.add({"rate": config.rate, **bench.examine(bench.forget_with(config, contrast))}, **key)


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
        fields = {name: value for name, value in changes.items() if name != "contrast"}
        config = replace(CIR, **fields, budget=budget, seed=seed)
        run(bench, rows, config, "contrast" in changes, kind="ablation", method="cir", variant=variant)
