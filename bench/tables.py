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

from bench.records import ROOT
from cir.measures import estimate

DOCS = tuple(ROOT / "docs" / f"{name}.md" for name in ("benchmarks", "trust"))
RESULTS = ROOT / "bench" / "results"
PLACE = re.compile(r"(<!-- table: (\w+) -->\n).*?(?=<!-- end -->)", re.DOTALL)
TEN, TWENTY_NINE, ALL = "1e952f445a45", "ca2aa8f2471f", "6574aa983c6e"
"""Hashes of what is forgotten: V; V and 19 of T; V and T."""
OURS: list[tuple[str, dict[str, Any]]] = [
    ("**V**", {"facts": TEN, "commit": "5eb085c"}),
    ("V, all directions, doses of one nat", {"facts": TEN, "commit": "56e6d4e", "seed": 0}),
    ("the same, seed 1", {"facts": TEN, "commit": "56e6d4e", "seed": 1}),
    ("V, relearning in 5 shorter steps", {"facts": TEN, "commit": "ec14fef"}),
    ("V and the other 19, no window above 0.05", {"facts": TWENTY_NINE, "commit": "56e6d4e"}),
    ("**V and the other 19**", {"facts": TWENTY_NINE, "commit": "5eb085c"}),
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
    head = ["", "commit", "text (worst window, nats)", "KL (nats)", "V", "fast attack", "LoRA", "4 bits, few-shot"]
    head += ["contrast", "other 19 capitals", "unseen, same countries"]
    # The attack on a model that nothing was done to is the same whatever is to be forgotten.
    attacked = found("quality", method="untouched", facts=ALL)["attacked"]
    pairs = [("untouched", {**found("quality", method="untouched", facts=TEN), "attacked": attacked})]
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
        f"{_share(row['quantized_4bit'])}, {_share(row['few_shot'])}",
        "" if row["facts"] == ALL else _share(row.get("contrast")),
        "forgotten" if forgotten else _share(row["neighbours"]),
        _share(row.get("same_subject")),
    ]


def strong() -> list[list[str]]:
    head = ["Adam over all parameters, a hundred steps, the best of a look every three", "untouched", "V forgotten"]
    rows = [found("quality", method=method, facts=TEN, commit="4e2d9a5") for method in ("untouched", "cir")]
    names = [name for name in rows[1]["attacked"] if name.startswith("strong")]
    lines = [[f"rate {name.split(', ')[1]}", *(_share(row["attacked"].get(name)) for row in rows)] for name in names]
    return [head, ["before", *(_share(row["recall"]) for row in rows)], *lines]


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
        own = _latest(rows_of("world", size=size, version=WORLD_VERSION, changes={}, method=name))
        seeds = ", ".join(map(str, sorted(row["seed"] for row in own)))
        rise = "" if name == "untouched" else f"{sum(row['rise'] for row in own) / len(own):+.2%}"
        window = "" if name == "untouched" else f"{max(row['worst_window'] for row in own):.2f}"
        means = (_mean([row.get(column) for row in own]) for column in columns)
        lines.append([WORLD[name], size, seeds, rise, window, *means])
    return [head, *lines]


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
    function.__name__: function for function in (ours, strong, baselines, cpu, small, eight_b, world)
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
