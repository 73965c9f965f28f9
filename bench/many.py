"""From one fact to a thousand, in one run and one after the other: what goes, what stays, and what it costs.

    python -m bench.many [--size 2m] [--subjects 100] [--counts 1 10 100 400 1000] [--one-by-one 100]

Facts are drawn from all relations of a world of :mod:`bench.world`. Every other one is what an attacker is taught,
the rest are probed. ``cir.unlearn`` and the editor have their defaults, and are told a hundred facts that must stay;
others are measured. ``many.png`` draws the rows of ``many.jsonl``; what is there already is not measured again.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cir
from bench.quality.rows import plain
from bench.records import ROOT, read_rows, write_rows
from bench.world.grammar import World
from bench.world.runs import HELD_OUT, RELEARNINGS, TEXT
from bench.world.training import SIZES, VERSION, taught_model
from cir import CIRConfig, EditError, Editor, Fact, Subspaces
from cir.data.tokens import windows
from cir.forgetting.budget import Meter
from cir.measures import WINDOW, mean_recall, recall
from cir.model.checkpoints import load_model
from cir.proof.relearning import relearn

TOLD = 100
"""Facts of which is said that they must stay, at most half of those that do."""
BUDGET = 0.01
ATTACK = "adam, fast"
FIGURES = ("recall", "attacked", "told", "same_subject", "same_relation")


@dataclass(frozen=True)
class Draw:
    """So many facts of a world to be forgotten, and those that must stay: told, and others of either side."""

    forget: list[Fact]
    told: list[Fact]
    same_subject: list[Fact]
    same_relation: list[Fact]


def drawn(world: World, count: int) -> Draw:
    """The first of one shuffle, so that more facts are those of fewer and others.

    Raises:
        ValueError: if less than a tenth of the world would stay.
    """
    every = [fact for own in world.facts.values() for fact in own]
    if not 1 <= count <= 0.9 * len(every):
        raise ValueError(f"counts: expected 1 to {int(0.9 * len(every))} of {len(every)} facts, got {count}")
    order = random.Random(world.seed).sample(every, len(every))
    kept = order[count:][::-1]
    told, unseen = kept[: min(TOLD, len(kept) // 2)], kept[min(TOLD, len(kept) // 2) :]
    subjects = {_subject(fact) for fact in order[:count]}
    return Draw(
        order[:count],
        told,
        [fact for fact in unseen if _subject(fact) in subjects],
        [fact for fact in unseen if _subject(fact) not in subjects],
    )


def _subject(fact: Fact) -> str:
    return fact.id.partition(": ")[0]


def at_once(model: Any, tokenizer: Any, draw: Draw, text: str, measured: str) -> dict[str, Any]:
    """By one :func:`cir.unlearn`."""
    report = cir.unlearn(
        model,
        tokenizer,
        draw.forget,
        contrast=draw.told,
        retain=text,
        disruption=measured,
        config=CIRConfig(budget=BUDGET),
        on_signal="raise",
        progress=False,
    )
    return {"stopped": report.stopped, "unforgotten": len(report.unforgotten), **report.chosen}


def one_by_one(model: Any, tokenizer: Any, draw: Draw, text: str, measured: str) -> dict[str, Any]:
    """By an :class:`cir.Editor`, in the order drawn."""
    subspaces = Subspaces.fit(model, tokenizer, text, draw.told, progress=False)
    refused = 0
    with Editor(model, tokenizer, subspaces, text=text) as editor:
        for fact in draw.forget:
            try:
                editor.forget(fact)
            except (EditError, ValueError):  # not within its bounds, or gone with an earlier one
                refused += 1
    return {"refused": refused}


WAYS: dict[str, Callable[..., dict[str, Any]]] = {"at once": at_once, "one by one": one_by_one}


def measured(world: World, source: Path, count: int, way: str) -> dict[str, Any]:
    """What a row says of so many facts."""
    model, tokenizer = load_model(str(source))
    draw, (text, _) = drawn(world, count), world.text(TEXT, seed=1001)
    held_out, _ = world.text(HELD_OUT + 512, seed=1002)
    taught, probed = draw.forget[1::2], draw.forget[::2]

    def recalled(facts: Sequence[Fact]) -> float | None:
        return mean_recall(recall(model, tokenizer, facts)) if facts else None

    def attacked() -> float | None:
        if not taught:
            return None
        looks = relearn(model, tokenizer, taught, probed, **asdict(RELEARNINGS[ATTACK]), progress=False)
        return max(mean_recall(look) or 0.0 for look in looks[1:])

    sides = {"recall": draw.forget, "told": draw.told}
    sides |= {"same_subject": draw.same_subject, "same_relation": draw.same_relation}
    before = {name: recalled(facts) for name, facts in sides.items()}
    meter = Meter(model, tokenizer, draw.forget, windows(tokenizer, held_out, WINDOW), HELD_OUT)
    started = time.perf_counter()
    found = WAYS[way](model, tokenizer, draw, text, held_out)
    seconds, now = time.perf_counter() - started, meter.measure()
    return {
        **found,
        **{name: recalled(facts) for name, facts in sides.items()},
        "before": before,
        "attacked": attacked(),
        "rise": now.rise,
        "worst_window": now.worst,
        "seconds": seconds,
        "seconds_a_fact": seconds / count,
    }


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Recall of each part, harm to text, seconds and directions left, by the number of facts."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 3.8), layout="constrained")
    recalls, seconds, left = figure.subplots(1, 3)
    names = {
        "recall": "forgotten",
        "attacked": "attacked",
        "same_subject": "same subjects",
        "same_relation": "others",
    }
    for style, way in zip(("o-", "s:"), WAYS, strict=True):
        own = sorted((row for row in rows if row["way"] == way), key=lambda row: row["count"])
        for i, (name, label) in enumerate(names.items()):
            points = [(row["count"], 100 * row[name]) for row in own if row[name] is not None]
            recalls.plot(*zip(*points, strict=True), style, color=f"C{i}", label=f"{label}, {way}")
        counts = [row["count"] for row in own]
        seconds.loglog(counts, [row["seconds_a_fact"] for row in own], style, label=way)
    own = sorted((row for row in rows if "directions_left" in row), key=lambda row: row["count"])
    for kind in ("activation", "gradient"):
        shares = [100 * row["directions_left"][kind] for row in own]
        left.semilogx([row["count"] for row in own], shares, "o-", label=f"of {kind}s")
    recalls.set(xscale="log", xlabel="facts forgotten", ylabel="recall (%)", ylim=(0, 100))
    seconds.set(xlabel="facts forgotten", ylabel="seconds a fact")
    left.set(xlabel="facts forgotten", ylabel="directions left (%)", ylim=(0, 100))
    for axes in (recalls, seconds, left):
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="2m")
    parser.add_argument("--subjects", type=int, default=100, help="of each kind (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 10, 100, 400, 1000])
    parser.add_argument("--one-by-one", type=int, default=100, help="facts at most (default: %(default)s)")
    parser.add_argument("--models", type=Path, default=ROOT / "worlds", help="where models are kept")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    arguments = parser.parse_args()
    world = World(arguments.subjects, arguments.seed)
    for count in arguments.counts:
        drawn(world, count)  # before a model is taught
    source = taught_model(world, SIZES[arguments.size], arguments.models, arguments.size)
    common = {"bench": "many", "version": VERSION, "size": arguments.size, "subjects": arguments.subjects}
    common |= {"seed": arguments.seed, "config": plain(CIRConfig(budget=BUDGET))}
    path, rows = arguments.out / "many.jsonl", []
    pairs = [(count, way) for way in WAYS for count in arguments.counts]
    for count, way in pairs:
        if way == "one by one" and count > arguments.one_by_one:
            continue
        key = {**common, "count": count, "way": way}
        row = next((row for row in read_rows(path) if key.items() <= row.items()), None)
        if row is None:
            row = {**key, **measured(world, source, count, way)}
            write_rows(path, [row])
        rows.append(row)
        figures = ", ".join(f"{name} {row[name]:.3f}" for name in FIGURES if row[name] is not None)
        print(f"{count} {way}: {figures}, text {row['rise']:+.2%}, {row['seconds']:.0f} s", flush=True)
    plot(rows, arguments.out / "many.png")


if __name__ == "__main__":
    main()
