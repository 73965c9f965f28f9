"""Tables of the docs, made from the rows of bench/results, so that no figure in them is typed.

    python -m bench.tables [--check]

Writes each between its ``<!-- table: NAME -->`` and ``<!-- end -->``. ``--check`` writes nothing, and exits with 1
where a table is not what its rows say.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from bench.quality.measuring import hardest
from bench.records import ROOT
from bench.world.runs import ATTACKS
from cir.measures import estimate

DOCS = (ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in ("benchmarks", "trust")))
RESULTS = ROOT / "bench" / "results"
PLACE = re.compile(r"(<!-- table: (\w+) -->\n).*?(?=<!-- end -->)", re.DOTALL)
TEN, TWENTY_NINE, ALL = "1e952f445a45", "ca2aa8f2471f", "6574aa983c6e"
"""Hashes of what is forgotten: V; V and 19 of T; V and T."""
STRONG_COMMIT, NOW = "4e2d9a5", {TEN: "5ee6ffc", TWENTY_NINE: "c73691a"}
"""Commits of the rows under strong attacks, and of those of the defaults as they are."""
OURS: list[tuple[str, dict[str, Any]]] = [
    ("**V**", {"facts": TEN, "commit": NOW[TEN]}),
    ("**V and the other 19**", {"facts": TWENTY_NINE, "commit": NOW[TWENTY_NINE]}),
    ("V, no counterfactuals", {"facts": TEN, "commit": "5eb085c"}),
    ("V, all directions, doses of one nat", {"facts": TEN, "commit": "56e6d4e", "seed": 0}),
    ("the same, seed 1", {"facts": TEN, "commit": "56e6d4e", "seed": 1}),
    ("V, relearning in 5 shorter steps", {"facts": TEN, "commit": "ec14fef"}),
    ("V and the other 19, no window above 0.05", {"facts": TWENTY_NINE, "commit": "56e6d4e"}),
    ("V and the other 19, no counterfactuals", {"facts": TWENTY_NINE, "commit": "5eb085c"}),
    ("the same, all directions, doses of one nat", {"facts": TWENTY_NINE, "commit": "5d9ec1d"}),
    ("all 49, no window above 0.05", {"facts": ALL, "commit": "56e6d4e"}),
]
BASELINES = [
    ("RepSelect", {"method": "repselect"}),
    ("RMU", {"method": "rmu", "commit": "c6b9ffa"}),
    ("Circuit Breakers", {"method": "circuit_breakers"}),
    ("NPO", {"method": "npo"}),
    ("SimNPO", {"method": "simnpo"}),
]
EIGHT_B: list[tuple[str, dict[str, Any]]] = [
    ("`cir.unlearn`, 112 facts, 12 steps", {"task": "unlearn", "commit": "7602b9f"}),
    ("", {"task": "unlearn", "commit": "3b15fdf"}),
    ("`Editor.forget`, one fact, 12 steps", {"task": "edit", "commit": "7602b9f"}),
    ("", {"task": "edit", "commit": "3b15fdf"}),
    ("the paper's way, two epochs", {"task": "W1", "form": "ours", "commit": "52696f0"}),
    ("", {"task": "W1", "form": "ours", "commit": "3b15fdf"}),
    ("the same, eager PyTorch", {"task": "W1", "form": "eager", "commit": "52696f0"}),
    ("", {"task": "W1", "form": "eager", "commit": "244feaf"}),
    ("", {"task": "W1", "form": "eager", "commit": "3b15fdf"}),
    ("the paper's way, the upper weights on the host", {"task": "W1", "form": "saving", "commit": "244feaf"}),
]
EVERY = 3
"""Steps between two looks of a strong attack."""
OVER = {"mlps": "MLPs", "all": "all parameters"}
WORLD_VERSION = 3
WORLD = {
    "untouched": "untouched",
    "cir": "`cir.unlearn`, as it is",
    "editor": "`Editor`, one after the other",
    "paper": "the paper's preset",
    "repselect": "RepSelect",
    "graddiff": "GradDiff",
    "npo": "NPO",
    "simnpo": "SimNPO",
    "rmu": "RMU",
    "circuit_breakers": "Circuit Breakers",
}


def found(name: str, **wanted: Any) -> dict[str, Any]:
    """The last of :func:`rows_of`."""
    return rows_of(name, **wanted)[-1]


def rows_of(name: str, **wanted: Any) -> list[dict[str, Any]]:
    """The rows of ``bench/results/NAME.jsonl`` that have what is ``wanted``.

    Raises:
        LookupError: if there is none.
    """
    lines = (RESULTS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if all(row.get(key) == value for key, value in wanted.items())]
    if not rows:
        raise LookupError(f"{name}.jsonl: expected a row of {wanted}, got none")
    return rows


def ours() -> list[list[str]]:
    head = ["", "commit", "text (worst window, nats)", "KL (nats)", "V", "fast attack", "LoRA", "SGD"]
    head += ["4 bits, few-shot", "contrast", "other 19 capitals", "unseen, same countries"]
    pairs = [("untouched", found("quality", method="untouched", facts=TEN, commit=NOW[TEN]))]
    pairs += [(label, found("quality", method="cir", **wanted)) for label, wanted in OURS]
    return [head, *(_quality(label, row) for label, row in pairs)]


def _quality(label: str, row: dict[str, Any]) -> list[str]:
    attacked, forgotten = row["attacked"], row["method"] == "cir" and row["facts"] != TEN
    rise = f"{row['rise']:+.2%} ± {100 * row['rise_stderr']:.2f} ({row['worst_window']:.3f})"
    changed = row["method"] == "cir"
    return [
        f"{label}, budget {row['budget']:+.2%}" if changed and row["budget"] != 0.001 else label,
        row["commit"],
        rise if changed else "",
        f"{row['kl']:.4f}" if changed else "",
        _share(row["recall"]),
        _share(attacked.get("adam, fast")),
        _share(attacked.get("lora")),
        _share(attacked.get("sgd")),
        f"{_share(row['quantized_4bit'])}, {_share(row['few_shot'])}",
        "" if row["facts"] == ALL else _share(row.get("contrast")),
        "forgotten" if forgotten else _share(row["neighbours"]),
        _share(row.get("same_subject")),
    ]


def strong() -> list[list[str]]:
    """The hundred steps of each rate: the most that comes back, and how many steps bring back half of what the
    untouched model recalls.
    """
    head = ["Adam at", "over", "untouched, at most", "V forgotten", "left of that", "steps to half of it"]
    rows = [found("quality", method=method, facts=TEN, commit=STRONG_COMMIT) for method in ("untouched", "cir")]
    half = rows[0]["recall"] / 2
    lines = []
    for name in (name for name in rows[1]["attacked"] if name.startswith("strong")):
        _, rate, over = name.split(", ")
        most, left = (row["attacked"][name] for row in rows)
        looks = rows[1]["relearning"][name][1:]
        reached = next((min(EVERY * number, 100) for number, now in enumerate(looks, 1) if now >= half), None)
        steps = "never" if reached is None else str(reached)
        lines.append([rate, OVER[over], _share(most), _share(left), f"{left / most:.0%}", steps])
    return [head, *lines]


def controls() -> list[list[str]]:
    """What brings V back that tells nothing of the related facts, or tells them in other words."""
    rows = [found("quality", method=method, facts=TEN, commit=NOW[TEN]) for method in ("untouched", "cir")]
    lines = [["taught", "untouched", "V forgotten"]]
    lines += [["nothing", *(_share(row["recall"]) for row in rows)]]
    for name in ("adam, fast", *(name for name in rows[1]["attacked"] if name.startswith("control"))):
        label = "the related facts" if name == "adam, fast" else name.removeprefix("control, ")
        lines.append([label, *(_share(row["attacked"][name]) for row in rows)])
    return lines


def many() -> list[list[str]]:
    """The latest row of each number of facts."""
    head = ["facts", "how", "commit", "text", "recall", "attacked", "told", "same subjects", "other facts"]
    lines = [[*head, "seconds a fact", "directions left, of activations and gradients"]]
    latest = {(row["way"], row["count"]): row for row in rows_of("many", version=WORLD_VERSION)}
    for (way, count), row in sorted(latest.items()):
        recalls = (_share(row[name]) for name in ("recall", "attacked", "told", "same_subject", "same_relation"))
        left = row.get("directions_left")
        shares = "" if left is None else f"{left['activation']:.0%}, {left['gradient']:.0%}"
        figures = f"{row['rise']:+.2%}", *recalls, f"{row['seconds_a_fact']:.2f}"
        lines.append([str(count), way, row["commit"], *figures, shares])
    return lines


def baselines() -> list[list[str]]:
    """The best of each at its rates: the row written last."""
    head = ["", "commit", "text loss", "KL (nats)", "recall of V", "fast attack", "4 bits", "few-shot", "neighbours"]
    common = {"facts": ALL, "tokens": 16384, "seed": 0}
    pairs = [("untouched", found("quality", method="untouched", **common))]
    pairs += [(label, found("quality", budget=0.001, **common, **wanted)) for label, wanted in BASELINES]
    lines = [head]
    for label, row in pairs:
        changed = row["method"] != "untouched"
        figures = ("recall", "attacked", "quantized_4bit", "few_shot", "neighbours")
        lines.append(
            [
                f"{label}, rate {row['rate']:g}" if changed else label,
                row["commit"],
                f"{row['rise']:+.2%} ± {100 * row['rise_stderr']:.2f}" if changed else "",
                f"{row['kl']:.4f}" if changed else "",
                *(_share(row[key]["adam, fast"] if key == "attacked" else row[key]) for key in figures),
            ]
        )
    return lines


def cpu() -> list[list[str]]:
    head = ["form", "commit", "CPU", "seconds (median of 3)", "speed-up", "peak memory beyond the model"]
    lines = [[*head, "times the floor"]]
    for form in ("eager", "ours"):
        row = found("cpu", bench="cpu.step", form=form)
        name = row["cpu"].split("(R)")[0].split(" ")[0]
        ratio = f"{row['median_s'] / row['floor_s']:.1f} ({row['floor_s']:.2f} s)"
        seconds, speed = f"{row['median_s']:.2f}", f"{row['speedup']:.2f} x"
        lines.append([form, row["commit"], name, seconds, speed, _mib(row["peak_bytes"]), ratio])
    return lines


def small() -> list[list[str]]:
    lines = [["two epochs over 32 facts", "seconds", "speed-up", "peak memory beyond the model"]]
    for form, label in (("eager",) * 2, ("trimmed",) * 2, ("ascent", "gradient ascent"), ("ours",) * 2):
        row = found("step", model="small", task="W1", form=form, epochs=2)
        lines.append([label, f"{row['seconds']:.1f}", f"{row['speedup']:.2f} x", _mib(row["peak_bytes"])])
    return lines


def eight_b() -> list[list[str]]:
    head = ["whole call", "commit", "GPU", "seconds (the first time)", "a fact", "used beyond the weights"]
    lines = [[*head, "held by the allocator"]]
    for label, wanted in EIGHT_B:
        row = found("step", model="8b", **wanted)
        first = f" ({row['first_seconds']:.1f})" if row["first_seconds"] else ""
        seconds = f"{row['seconds']:.{2 if row['facts'] == 1 else 1}f}{first}"
        beyond, held = (f"{row[key] / 2**30:.1f} GiB" for key in ("peak_bytes", "reserved_bytes"))
        card = row["gpu"].split()[1]
        lines.append([label, row["commit"], card, seconds, f"{row['seconds_a_fact']:.3f}", beyond, held])
    return lines


def world() -> list[list[str]]:
    """Means over seeds, each with its standard error in percentage points where there are several."""
    columns = ("recall", "worst", "gold_attacked", "neighbours", "same_subject", "unrelated")
    head = [
        "",
        "size",
        "seeds",
        "text",
        "worst window (nats)",
        "recall of V",
        "worst attack",
        "gold, attacked",
        "relation",
        "subject",
        "rest",
    ]
    lines = []
    larger = [(size, name) for size in ("8m", "30m") for name in ("untouched", "cir")]
    for size, name in [*(("2m", name) for name in WORLD), *larger]:
        own = _seeds(size, name)
        seeds = ", ".join(map(str, sorted(row["seed"] for row in own)))
        rise = "" if name == "untouched" else f"{sum(row['rise'] for row in own) / len(own):+.2%}"
        window = "" if name == "untouched" else f"{max(row['worst_window'] for row in own):.2f}"
        means = (_mean([row.get(column) for row in own]) for column in columns)
        lines.append([WORLD[name], size, seeds, rise, window, *means])
    return [head, *lines]


def shown() -> list[list[str]]:
    """The README's: what is forgotten, what an attacker gets of it, and what stays."""
    head = ["", "recall", "after the worst attack", "nothing forgotten, attacked", "of the same relation stay"]
    lines = [[*head, "about the same subjects", "text"]]
    untouched = found("quality", method="untouched", facts=TEN, commit=NOW[TEN])
    attacked = untouched["attacked"][hardest(untouched["attacked"])]
    for label, facts in (("SmolLM2, ten capitals", TEN), ("29 capitals", TWENTY_NINE)):
        row = found("quality", method="cir", facts=facts, commit=NOW[facts])
        kept = "" if facts == TWENTY_NINE else _part(row["neighbours"], untouched["neighbours"])
        subject = _part(row["same_subject"], untouched["same_subject"])
        figures = _share(row["recall"]), _share(row["worst"]), _share(attacked)
        lines.append([label, *figures, kept, subject, f"{row['rise']:+.2%}"])
    for size, label in (("2m", "worlds of 2 million parameters"), ("8m", "of 8 million"), ("30m", "of 30 million")):
        before, own = (_seeds(size, name) for name in ("untouched", "cir"))
        lines.append([f"{len(own)} {label}", *_world_figures(before, own)])
    baselines = {name: _seeds("2m", name) for name in WORLD if name not in ("untouched", "cir", "editor")}
    sparing = {name: own for name, own in baselines.items() if _average(own, "neighbours") > 0.9}
    best = min(sparing, key=lambda name: _average(sparing[name], "worst"))
    before = _seeds("2m", "untouched")
    lines.append(
        [f"there the best baseline that spares the relation, {WORLD[best]}", *_world_figures(before, sparing[best])]
    )
    return lines


def _world_figures(before: Sequence[dict[str, Any]], own: Sequence[dict[str, Any]]) -> list[str]:
    before = [row for row in before if row["seed"] in {row["seed"] for row in own}]
    shares = [_share(_average(own, "recall")), _share(_average(own, "worst")), _share(_average(before, "worst"))]
    kept = [_part(_average(own, name), _average(before, name)) for name in ("neighbours", "same_subject")]
    return [*shares, *kept, f"{_average(own, 'rise'):+.2%}"]


def _seeds(size: str, method: str) -> list[dict[str, Any]]:
    given = {"version": WORLD_VERSION, "changes": {}, "attacks": list(ATTACKS)}
    return _latest(rows_of("world", size=size, method=method, **given))


def _average(rows: Sequence[dict[str, Any]], column: str) -> float:
    return sum(row[column] for row in rows) / len(rows)


def _part(now: float, before: float) -> str:
    return f"{now / before:.0%}"


def _latest(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last row of each seed."""
    return list({row["seed"]: row for row in rows}.values())


def _mean(values: Sequence[float | None]) -> str:
    mean = estimate(value for value in values if value is not None)
    if mean is None:
        return ""
    stderr = f" ± {100 * mean.stderr:.1f}" if mean.count > 1 else ""
    return f"{100 * mean.value:.1f}{stderr} %"


TABLES: dict[str, Callable[[], list[list[str]]]] = {
    function.__name__: function
    for function in (ours, strong, controls, baselines, cpu, small, eight_b, world, many, shown)
}


def filled(texts: Sequence[str]) -> list[str]:
    """``texts`` with their tables as the rows have them.

    Raises:
        LookupError: if they name a table that is not here, or lack one that is, or a row is missing.
    """
    names = [match.group(2) for text in texts for match in PLACE.finditer(text)]
    if sorted(names) != sorted(TABLES):
        raise LookupError(f"expected the tables {', '.join(sorted(TABLES))}, got {', '.join(sorted(names))}")
    return [PLACE.sub(lambda match: match.group(1) + _markdown(TABLES[match.group(2)]()), text) for text in texts]


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    head, *rows = lines
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, ["---"] * len(head), *rows))


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def _mib(value: float) -> str:
    return f"{value / 2**20:.0f} MiB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where a table differs")
    texts = [path.read_text(encoding="utf-8") for path in DOCS]
    wanted = filled(texts)
    if parser.parse_args().check:
        sys.exit(texts != wanted)
    for path, text in zip(DOCS, wanted, strict=True):
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
