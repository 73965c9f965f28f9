"""How the seconds of an epoch grow with facts, tokens, layers and k, one at a time, on a random model.

    python -m bench.growth [--model 8b|small] [--out bench/results]

An epoch here is the paper's: its forget steps and the solve of the next bases, with no retain step or budget check;
the model and the sentences are those of ``bench.step``. Each point is the faster of two epochs, after one that fits;
a long one is measured once. ``growth.png`` draws them with lines of slope one.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.records import ROOT, write_rows
from bench.step import WORKLOADS, Run, Workload, seconds
from cir.forgetting.batches import fact_batches
from cir.forgetting.breaking import Breaker
from cir.forgetting.update import restore, snapshot
from cir.model.capture import capture

AXES = {
    "facts": (1, 10, 100, 1000),
    "tokens a sentence": (8, 32, 128, 512),
    "layers run": (3, 6, 12, 24),
    "k": (4, 16, 64, 256),
}

LONG = 20.0
"""Seconds of an epoch beside which what disturbs it no longer counts."""


def workloads(base: Workload) -> Iterator[tuple[str, int, Workload]]:
    """Axis, value, and the workload that is ``base`` but for it."""
    config = replace(base.config, retain_rate=0.0, max_length=1024)
    base = replace(base, config=config)
    for axis, values in AXES.items():
        for value in values:
            if axis == "facts":
                changed = replace(base, facts=value)
            elif axis == "tokens a sentence":
                changed = replace(base, words=(value, value))
            elif axis == "layers run":
                changed = replace(base, config=replace(config, loss_layers=(value // 2, value)))
            else:
                changed = replace(base, config=replace(config, rank_activation=value, rank_gradient=value))
            yield axis, value, changed


def measured(workload: Workload, model: Any = None) -> dict[str, Any]:
    run = Run(workload, 1, model)
    batches = fact_batches(run.tokenizer, run.facts, run.config, run.device)
    weights = snapshot(run.targets)
    with capture(run.model, run.stack, run.layers[-1]) as tape:
        breaker = Breaker(tape, run.targets, run.layers, batches, [], run.config)
        breaker.fit()
        spent, _ = seconds(lambda: breaker.epoch(run.config.rate), run.device)
        if spent < LONG:
            spent = min(spent, seconds(lambda: breaker.epoch(run.config.rate), run.device)[0])
    restore(run.targets, weights)
    tokens = sum(int(batch.attention_mask.sum()) for batch in batches)
    size = sum(
        p.numel() for layer in run.stack.layers[: run.layers[-1] + 1] for p in layer.parameters() if p.ndim == 2
    )
    updated = sum(target.linear.weight.numel() for target in run.targets)
    # Forward, input gradients and update.
    return {"seconds": spent, "tokens": tokens, "flop": 2 * tokens * (2 * size + updated)}


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 3.8), layout="constrained")
    for axes, axis in zip(figure.subplots(1, len(AXES)), AXES, strict=True):
        own = [(row["value"], row["seconds"]) for row in rows if row["axis"] == axis]
        values, spent = zip(*own, strict=True)
        axes.loglog(values, spent, "o-")
        axes.loglog(values, [spent[-1] * value / values[-1] for value in values], ":", color="gray")
        axes.set(xlabel=axis, ylabel="seconds an epoch")
        axes.set_xticks(values, [str(value) for value in values])
        axes.set_xticks([], minor=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(WORKLOADS), default="8b" if torch.cuda.is_available() else "small")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    arguments = parser.parse_args()
    base = WORKLOADS[arguments.model]
    model, rows = Run(base, 1).model, []
    for axis, value, workload in workloads(base):
        row = {"bench": "growth", "model": arguments.model, "axis": axis, "value": value, **measured(workload, model)}
        rows.append(row)
        write_rows(arguments.out / "growth.jsonl", [row])
        rate = row["flop"] / row["seconds"] / 1e9
        print(f"{axis:<20}{value:>6}{row['seconds']:>9.2f} s{rate:>9.0f} GFLOP/s of the floor's", flush=True)
    plot(rows, arguments.out / "growth.png")


if __name__ == "__main__":
    main()
