"""All methods on the same facts, budget and attacks: how robustly each forgets, and at what price.

    python -m bench.quality [--small] [--ablate] [--methods cir npo ...] [--seeds 0 1 2] [--budgets 0.001 0.003]
                            [--relearn T.jsonl --probe V.jsonl] [--neighbours N.jsonl] [--retain R.txt]
                            [--disruption D.txt] [--model M] [--out bench/results] [--report]

Both splits are forgotten, T and V. Every attacker then trains on T, and recall of V tells what comes back. Of each
baseline the best rate is found on the first seed: that which forgets most inside the budget, the last epoch's change
scaled back along its line where it oversteps. As baselines train on the retain text, the loss on text of its kind
falls whatever they harm: they are held to the budget in KL as well, in units of the original loss. A row is written
as soon as it is measured, and one that is in --out already is not measured again. The report is quality.html, with
quality.png, beside the rows; --report only draws it.
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import itertools
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import cir
from bench.baselines import BASELINES
from bench.records import ROOT, write_rows
from cir import CIRConfig, Fact, Subspaces, load_facts, relearn
from cir.attack import few_shot, quantized
from cir.checkpoints import demo_model, load_model
from cir.demo import DATA
from cir.evaluation import kl_divergence, mean_recall, recall, reference_of, spread
from cir.facts import check_apart
from cir.relearning import RELEARNINGS
from cir.report import Measure, hash_facts
from cir.unlearning import Meter, builtin_text, fact_batches, share_inside, text_batches

CIR = CIRConfig()
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
MAX_EPOCHS = 6
TRIES = 4
KL_TOKENS = 4096
"""Of the disruption text, where the change of what is said is measured: training on such text lowers its loss, and so
hides harm from the budget, but not this.
"""


@dataclass(frozen=True)
class Task:
    """What is to be forgotten and measured, and on which text. ``thorough``: try every rate of a baseline."""

    relearn: list[Fact]
    probe: list[Fact]
    neighbours: list[Fact]
    retain: str
    disruption: str
    tokens: int
    attacks: tuple[str, ...]
    thorough: bool

    @property
    def epochs(self) -> int:
        return MAX_EPOCHS if self.thorough else 2

    @property
    def facts(self) -> list[Fact]:
        return [*self.probe, *self.relearn]


@dataclass
class Outcome:
    """``measure``: of the state reached, which has ``weights``. ``trajectory``: (rise, recall) epoch by epoch."""

    measure: Measure
    trajectory: list[tuple[float, float]]
    seconds: float
    weights: list[Tensor]


class Bench:
    """One model, forgetting by one method after the other from the same weights."""

    def __init__(self, source: str, task: Task) -> None:
        self.task = task
        self.model, self.tokenizer = load_model(source)
        self.weights = [parameter.detach().to("cpu", copy=True) for parameter in self.model.parameters()]
        # Losses of the original, against which every method is measured.
        _, rows = text_batches(self.tokenizer, task.retain, task.disruption, CIR, self.model.device)
        self.meter = Meter(self.model, self.tokenizer, task.facts, rows, task.tokens)
        self.reference = reference_of(self.model, spread(rows, min(task.tokens, KL_TOKENS)))
        self.before = self.meter.before

    def kl(self) -> float:
        return float(kl_divergence(self.model, self.reference).mean())

    def harm(self) -> Measure:
        """What is measured, with the KL in units of the original loss as the rise, where that is larger."""
        now = self.meter.measure()
        return replace(now, rise=max(now.rise, self.kl() / self.before.loss))

    def rise(self, outcome: Outcome) -> dict[str, float]:
        """Of the loss alone."""
        measure = outcome.measure
        return {"rise": measure.loss / self.before.loss - 1, "rise_stderr": measure.rise_stderr}

    @contextmanager
    def restored(self) -> Iterator[None]:
        try:
            yield
        finally:
            put(self.model.parameters(), self.weights)

    def forget_with(self, config: CIRConfig, contrast: bool = False) -> Outcome:
        """By :func:`cir.unlearn`, against bases of the neighbours where ``contrast``."""
        started, subspaces = time.perf_counter(), None
        with self.restored():
            if contrast:
                texts = self.task.retain, self.task.neighbours
                subspaces = Subspaces.fit(self.model, self.tokenizer, *texts, config=config, progress=False)
            report = cir.unlearn(
                self.model,
                self.tokenizer,
                self.task.facts,
                retain=self.task.retain,
                disruption=self.task.disruption,
                config=config,
                subspaces=subspaces,
                progress=False,
            )
            state = copies(self.model.parameters())
        steps = [(epoch.measure.rise, epoch.measure.mean_recall or 0) for epoch in report.epochs]
        return Outcome(report.after, steps, time.perf_counter() - started, state)

    def forget_with_baseline(
        self, name: str, rate: float, budgets: Sequence[float], seed: int
    ) -> dict[float, Outcome]:
        """The last state inside each of ``budgets`` on the way of a baseline at ``rate``."""
        # Whole sentences, and about as many retain tokens a step, as the papers have it.
        settings = replace(CIR, seed=seed, to_answers=False, word_dropout=0.0, retain_batch_size=4)
        batches = fact_batches(self.tokenizer, self.task.facts, settings, self.model.device)
        retain, _ = text_batches(self.tokenizer, self.task.retain, None, settings, self.model.device)
        epochs, left, steps, found = self.task.epochs, sorted(budgets), [], {}
        started = time.perf_counter()
        with (
            self.restored(),
            BASELINES[name](self.model, batches, retain, rate=rate, epochs=epochs, seed=seed) as baseline,
        ):
            now, reached = self.before, copies(self.model.parameters())
            for number in range(1, epochs + 1):
                before = reached, now
                baseline.epoch()
                now, reached = self.harm(), copies(self.model.parameters())
                steps.append((now.rise, now.mean_recall or 0))
                while left and (now.rise_bound > left[0] or number == epochs):
                    budget, best = left.pop(0), now
                    if now.rise_bound > budget:
                        best = self.back_to_budget(*before, now, budget)
                    state = copies(self.model.parameters())
                    found[budget] = Outcome(best, list(steps), time.perf_counter() - started, state)
                    put(self.model.parameters(), reached)
                if not left:
                    break
        return found

    def back_to_budget(self, inside: Sequence[Tensor], at: Measure, over: Measure, budget: float) -> Measure:
        """From the model as it is, where ``over`` was measured, towards weights where ``at`` was, until inside.

        As :func:`cir.unlearn` does, with more tries; ``inside`` itself where all fail.
        """
        outside, share, now = copies(self.model.parameters()), 1.0, over
        for _ in range(TRIES):
            share *= share_inside(at, now, budget)
            pairs = zip(inside, outside, strict=True)
            put(self.model.parameters(), [torch.lerp(a, b, share) for a, b in pairs])
            now = self.harm()
            if now.rise_bound <= budget:
                return now
        put(self.model.parameters(), inside)
        return at

    def examine(self, outcome: Outcome) -> dict[str, Any]:
        """Everything a row says of an outcome."""
        with self.restored():
            put(self.model.parameters(), outcome.weights)
            return self._examine(outcome)

    def _examine(self, outcome: Outcome) -> dict[str, Any]:
        task = self.task
        recalls = self.recall(task.probe)
        relearned = {
            name: [
                mean_recall(epoch)
                for epoch in relearn(
                    self.model, self.tokenizer, task.relearn, task.probe, **asdict(RELEARNINGS[name]), progress=False
                )
            ]
            for name in task.attacks
        }
        rounded = {}
        for bits in (8, 4):
            with quantized(self.model, bits):
                rounded[f"quantized_{bits}bit"] = mean_recall(self.recall(task.probe))
        shown = few_shot(task.probe, task.relearn)
        return {
            **self.rise(outcome),
            "kl": self.kl(),
            "recall": mean_recall(recalls),
            "recall_relearn_split": mean_recall(self.recall(task.relearn)),
            "neighbours": mean_recall(self.recall(task.neighbours)),
            "attacked": {name: max(history[1:]) for name, history in relearned.items()},
            "worst": max(max(history[1:]) for history in relearned.values()),
            **rounded,
            "few_shot": mean_recall(self.recall(shown)),
            "change": self.change(),
            "seconds": outcome.seconds,
            "trajectory": outcome.trajectory,
            "relearning": relearned,
            "by_fact": recalls,
        }

    def recall(self, facts: Sequence[Fact]) -> dict[str, float]:
        return recall(self.model, self.tokenizer, facts)

    def change(self) -> float:
        """Frobenius norm of all that has changed."""
        pairs = zip(self.model.parameters(), self.weights, strict=True)
        return sum(float((now.detach().cpu() - before).norm()) ** 2 for now, before in pairs) ** 0.5


@torch.no_grad()
def put(parameters: Any, values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def copies(parameters: Any) -> list[Tensor]:
    return [parameter.detach().to("cpu", copy=True) for parameter in parameters]


class Rows:
    """The rows of one task in a file, at least those ``attacks`` in each: those there are not measured again."""

    def __init__(self, path: Path, common: Mapping[str, Any], attacks: Sequence[str]) -> None:
        self.path, self.common = path, {**common, "attacks": list(attacks)}
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        rows = [json.loads(line) for line in lines]
        self.found = [
            _under(attacks, row) for row in rows if _has(row, common) and {*attacks} <= {*row.get("attacks", ())}
        ]

    def get(self, **key: Any) -> dict[str, Any] | None:
        return next((row for row in self.found if _has(row, key)), None)

    def add(self, measured: Mapping[str, Any], **key: Any) -> None:
        row = {**key, **self.common, **measured}
        write_rows(self.path, [row])
        self.found.append(row)
        show(row)


def _under(attacks: Sequence[str], row: dict[str, Any]) -> dict[str, Any]:
    """``row`` as if it had been under no other attacks."""
    if "attacked" not in row:
        return row
    attacked, relearning = ({name: row[key][name] for name in attacks} for key in ("attacked", "relearning"))
    return {**row, "attacked": attacked, "relearning": relearning, "worst": max(attacked.values())}


def _has(row: Mapping[str, Any], key: Mapping[str, Any]) -> bool:
    return all(row.get(name) == value for name, value in key.items())


def show(row: Mapping[str, Any]) -> None:
    name = row.get("variant") or row["method"]
    found = f"rise {row['rise']:+.3%} +- {row['rise_stderr']:.3%}"
    if row["kind"] == "search":
        print(f"{name}, rate {row['rate']}: {found}, recall of the facts {row['facts_recall']:.3f}", flush=True)
        return
    print(
        f"{name}, budget {row['budget']:.1%}, seed {row['seed']}: {found}, KL {row['kl']:.4f}, "
        f"recall {row['recall']:.3f}, worst attack {row['worst']:.3f}, 4 bits {row['quantized_4bit']:.3f}, "
        f"neighbours {row['neighbours']:.3f}, change {row['change']:.1f}, {row['seconds']:.0f} s",
        flush=True,
    )


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


def report(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write the page ``path`` and the plot beside it."""
    picture = plot(rows)
    path.with_suffix(".png").write_bytes(picture)
    runs = [row for row in rows if row["kind"] == "run"]
    parts = ["<h1>Robustness against disruption</h1>"]
    parts.append(f'<img alt="plots" src="data:image/png;base64,{base64.b64encode(picture).decode()}">')
    for budget in sorted({row["budget"] for row in runs}):
        own = [row for row in runs if row["budget"] == budget]
        parts += [f"<h2>Budget {budget:+.1%}</h2>" if budget else "<h2>Nothing done</h2>", _means(own, "method")]
    if ablations := [row for row in rows if row["kind"] == "ablation"]:
        parts += ["<h2>Ablation</h2>", _means(ablations, "variant")]
    parts += ["<h2>Recall of each probed fact</h2>", _by_fact(runs)]
    style = (
        "body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem}img{max-width:100%}"
        "table{border-collapse:collapse}td,th{padding:.2rem .6rem;border-bottom:1px solid #ddd;text-align:right}"
        "td:first-child,th:first-child{text-align:left}"
    )
    path.write_text(
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Quality</title><style>{style}</style>'
        f"<body>{''.join(parts)}</body></html>\n",
        encoding="utf-8",
    )


COLUMNS = {
    "rise": "{:+.3%}",
    "kl": "{:.4f}",
    "recall": "{:.3f}",
    "worst": "{:.3f}",
    "quantized_4bit": "{:.3f}",
    "few_shot": "{:.3f}",
    "neighbours": "{:.3f}",
    "change": "{:.1f}",
    "seconds": "{:.0f}",
}


def _means(rows: Sequence[Mapping[str, Any]], by: str) -> str:
    """A table: a line for each value of ``by``, means over seeds with standard deviations of the recalls."""
    lines = [
        ["", "seeds", "text loss", "KL", "recall", "worst attack", "4 bits", "few-shot", "neighbours", "change", "s"]
    ]
    for name in dict.fromkeys(row[by] for row in rows):
        own = [row for row in rows if row[by] == name]
        line = [str(name), str(len(own))]
        for column, form in COLUMNS.items():
            values = torch.tensor([row.get(column, math.nan) for row in own], dtype=torch.float64)
            deviation = f" ± {values.std():.3f}" if len(own) > 1 and column in ("recall", "worst") else ""
            line.append(form.format(float(values.mean())) + deviation)
        lines.append(line)
    return _table(lines)


def _by_fact(runs: Sequence[Mapping[str, Any]]) -> str:
    first = {(row["method"], row["budget"]): row for row in reversed(runs)}
    names = list(next(iter(first.values()))["by_fact"])
    head = ["", *(f"{method} {budget:+.1%}" if budget else method for method, budget in first)]
    return _table([head, *([name, *(f"{row['by_fact'][name]:.3f}" for row in first.values())] for name in names)])


def _table(lines: Sequence[Sequence[str]]) -> str:
    cells = [
        "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in line) + "</tr>"
        for tag, line in zip(["th", *["td"] * (len(lines) - 1)], lines, strict=True)
    ]
    return f"<table>{''.join(cells)}</table>"


def plot(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Worst attack against disruption, the ways there, and the ways back, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.6), layout="constrained")
    against, unlearning, relearning = figure.subplots(1, 3)
    runs = [row for row in rows if row["kind"] == "run"]
    methods = list(dict.fromkeys(row["method"] for row in runs))
    for i, method in enumerate(methods):
        color = f"C{i}"
        own = [row for row in runs if row["method"] == method]
        against.plot(
            [100 * row["rise"] for row in own], [row["worst"] for row in own], "o", color=color, label=method
        )
        for row in own[:1]:
            if row["trajectory"]:
                rises, recalls = zip(*row["trajectory"], strict=True)
                unlearning.plot([100 * rise for rise in rises], recalls, "o-", color=color, ms=3)
            relearning.plot(next(iter(row["relearning"].values())), "o-", color=color, ms=3)
    against.set(xlabel="rise of the text loss (%)", ylabel="recall after the worst relearning", ylim=(0, None))
    unlearning.set(xlabel="rise of the text loss (%)", ylabel="recall of all facts, epoch by epoch", ylim=(0, None))
    unlearning.set_xscale("symlog", linthresh=0.1)
    relearning.set(
        xlabel="epochs of relearning (the first attack)", ylabel="recall of the probed facts", ylim=(0, None)
    )
    against.legend(fontsize=8)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    return out.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=demo_model())
    parser.add_argument("--relearn", default=str(DATA / "demo_related.jsonl"))
    parser.add_argument("--probe", default=str(DATA / "demo_forget.jsonl"))
    parser.add_argument("--neighbours", default=str(DATA / "demo_neighbours.jsonl"))
    parser.add_argument("--retain", help="text; default: the built-in one, of which a third measures disruption")
    parser.add_argument("--disruption", help="text; needs --retain")
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, *BASELINES], default=[*METHODS, *BASELINES])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--budgets", type=float, nargs="+", help="default: 0.001 0.003; 0.01 if --small")
    parser.add_argument("--tokens", type=int, default=32768, help="of the disruption text")
    parser.add_argument("--attacks", nargs="+", choices=list(RELEARNINGS), default=list(RELEARNINGS))
    parser.add_argument("--ablate", action="store_true", help="variants of cir instead, at the last budget")
    parser.add_argument(
        "--small", action="store_true", help="one seed, one attack, every other rate of a baseline, two epochs"
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
    task = Task(
        *(load_facts(path) for path in (arguments.relearn, arguments.probe, arguments.neighbours)),
        *texts,
        tokens=arguments.tokens,
        attacks=tuple(arguments.attacks[:1] if arguments.small or arguments.ablate else arguments.attacks),
        thorough=not arguments.small,
    )
    check_apart(task.relearn, task.probe)
    common = {
        "model": Path(arguments.model).stem,
        "facts": hash_facts(task.facts)[:12],
        "tokens": arguments.tokens,
    }
    rows = Rows(arguments.out / "quality.jsonl", common, task.attacks)
    if not arguments.report:
        bench = Bench(arguments.model, task)
        if arguments.ablate:
            ablate(bench, rows, budgets[-1], arguments.seeds)
        else:
            untouched(bench, rows)
            compare(bench, rows, arguments.methods, budgets, arguments.seeds)
    report(rows.found, arguments.out / "quality.html")


if __name__ == "__main__":
    main()
