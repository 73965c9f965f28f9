"""Every method on one world, each at its best rate inside the budget, beside the model that never knew."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.baselines import BASELINES
from bench.quality.measuring import Bench, Outcome, Task, controls, copies
from bench.quality.rows import Rows, plain
from bench.world.grammar import World
from bench.world.training import SIZES, VERSION, prepared
from cir import CIRConfig, EditConfig, EditError, Editor, Subspaces
from cir.config import BreakingConfig
from cir.proof.relearning import Relearning, strong

RELEARNINGS = {
    "adam": Relearning(lr=1e-4, epochs=6),
    "adam, fast": Relearning(lr=1e-3, epochs=6),
    "sgd": Relearning("sgd", lr=0.3, epochs=6),
    "lora": Relearning(lr=3e-3, lora_rank=8, epochs=6),
}
"""Fractions of the rates at which worlds are taught, as :data:`cir.proof.relearning.RELEARNINGS` are of others'."""
ATTACKS = ("adam", "adam, fast", "lora")
"""What is tried if nothing else is said: SGD brings back less than the strongest of these."""
FAMILIES = {
    "strong": strong((1e-4, 3e-4, 1e-3, 3e-3)),
    "controls": controls(RELEARNINGS["adam, fast"]),
}
"""More, by name: up to the rate at which worlds are taught; and what teaches nothing of the related facts."""
TEXT, HELD_OUT = 20_000, 16_384
"""Tokens of the retain text, and of the text on which harm is measured."""


@dataclass(frozen=True)
class Method:
    """A configuration, and the rates tried, of the editor the doses: the best inside the budget counts. Of cir
    there is one, its default floor.
    """

    rates: tuple[float, ...]
    config: CIRConfig | BreakingConfig | EditConfig | None = None


_RANKS = {"rank_activation": 12, "rank_gradient": 18}
METHODS: dict[str, Method] = {
    "cir": Method((CIRConfig.floor,), CIRConfig()),
    "paper": Method((0.3, 1.0, 3.0), replace(CIRConfig.paper(), retain_rate=0.003, retain_batch_size=4, **_RANKS)),
    "repselect": Method((0.1, 0.3, 1.0), replace(CIRConfig.repselect(), **_RANKS)),
    "editor": Method((0.5, 1.0), EditConfig()),
    **{
        name: Method((1e-3, 3e-3, 1e-2) if name in ("rmu", "circuit_breakers") else (1e-4, 3e-4, 1e-3))
        for name in BASELINES
    },
}


def task_of(world: World, gold: Path, attacks: Sequence[str] = ATTACKS) -> Task:
    """To forget, keep and measure in ``world``, whose model without what is to be forgotten is at ``gold``.

    Every other fact of the same relations, and of the same subjects, is what cir and the editor are told must stay;
    the rest of those, unseen, are measured.
    """
    split = world.split
    retain, _ = world.text(TEXT, seed=1001)
    disruption, _ = world.text(HELD_OUT + 512, seed=1002)
    return Task(
        relearn=split.related,
        probe=split.forget,
        neighbours=split.same_relation[1::2],
        same_subject=split.same_subject[1::2],
        unrelated=split.unrelated,
        contrast=[*split.same_relation[::2], *split.same_subject[::2]],
        retain=retain,
        disruption=disruption,
        tokens=HELD_OUT,
        attacks=tuple(attacks),
        thorough=True,
        gold=str(gold),
        relearnings=RELEARNINGS | FAMILIES["strong"] | FAMILIES["controls"],
        wrong={fact.id: world.wrong_answers(fact) for fact in split.forget},
    )


def forget(bench: Bench, name: str, method: Method, rate: float, budget: float, seed: int) -> Outcome:
    """The best state inside ``budget`` that the method reaches at ``rate``."""
    if isinstance(method.config, CIRConfig):
        config = replace(method.config, floor=rate, budget=budget, seed=seed)
        return bench.forget_with(config, bench.task.contrast)
    if isinstance(method.config, BreakingConfig):
        config = replace(method.config, rate=rate, budget=budget, seed=seed, max_epochs=bench.task.epochs)
        return bench.forget_with(config)
    if isinstance(method.config, EditConfig):
        return edit(bench, replace(method.config, dose=rate), budget, seed)
    return bench.forget_with_baseline(name, rate, [budget], seed)[budget]


def edit(bench: Bench, config: EditConfig, budget: float, seed: int) -> Outcome:
    """One fact after the other by an :class:`cir.Editor`, as many as the budget takes."""
    started, task = time.perf_counter(), bench.task
    steps: list[tuple[float, float]] = []
    with bench.restored():
        fit = CIRConfig(seed=seed)
        subspaces = Subspaces.fit(
            bench.model, bench.tokenizer, task.retain, task.contrast, config=fit, progress=False
        )
        now = bench.before
        with Editor(bench.model, bench.tokenizer, subspaces, text=task.retain, config=config) as editor:
            for fact in task.facts:
                try:
                    editor.forget(fact)
                except (EditError, ValueError):  # not within its bounds, or gone with an earlier one
                    continue
                after = bench.meter.measure()
                steps.append((after.rise, after.mean_recall or 0))
                if after.rise_bound > budget:
                    editor.undo()
                    break
                now = after
        state = copies(bench.model.parameters())
    return Outcome(now, steps, time.perf_counter() - started, state)


def best(bench: Bench, name: str, method: Method, budget: float, seed: int) -> tuple[float, Outcome]:
    """The rate, and its outcome, at which least is recalled of what was to be forgotten."""
    tried = {rate: forget(bench, name, method, rate, budget, seed) for rate in method.rates}
    return min(tried.items(), key=lambda item: item[1].measure.mean_recall or 0)


def changed(method: Method, fields: Mapping[str, Any], rates: Sequence[float] | None = None) -> Method:
    """``method`` with fields of its configuration changed, those that it has, and other ``rates``."""
    own = {name: value for name, value in fields.items() if hasattr(method.config, name)}
    config = replace(method.config, **own) if method.config is not None else None
    return Method(tuple(rates or method.rates), config)


def compare(
    size: str,
    seed: int,
    methods: Mapping[str, Method],
    *,
    budgets: Sequence[float],
    attacks: Sequence[str],
    subjects: int,
    models: Path,
    path: Path,
    changes: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """The rows of ``methods`` in the world of ``seed``, and of the model untouched; those in ``path`` already are not
    measured again.

    Raises:
        ValueError: as :class:`World` and :func:`prepared`.
    """
    world = World(subjects, seed)
    taught, gold = prepared(world, SIZES[size], models, size)
    common = {"bench": "world", "version": VERSION, "size": size, "subjects": subjects}
    rows = Rows(path, common, attacks)
    if rows.others:
        print(f"{path}: {rows.others} rows of another version, size or world are left aside")
    bench = Bench(str(taught), task_of(world, gold, attacks))
    found = []
    for name, method in {"untouched": None, **methods}.items():
        for budget in budgets if method else [0.0]:
            config = None if method is None else method.config
            key = {"kind": "run", "method": name, "budget": budget, "seed": seed}
            key |= {"changes": dict(changes) if config else {}, "config": plain(config) if config else None}
            if rows.get(**key) is None:
                rate, outcome = best(bench, name, method, budget, seed) if method else (0.0, unchanged(bench))
                rows.add({"rate": rate, **bench.examine(outcome)}, **key)
            found.append(rows.get(**key) or {})
    return found


def unchanged(bench: Bench) -> Outcome:
    return Outcome(bench.before, [], 0.0, bench.weights)
