"""What was measured already, and what is added to it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.quality.measuring import hardest
from bench.records import read_rows, write_rows


def plain(config: Any) -> dict[str, Any]:
    """The fields of a configuration as a row that was read has them."""
    return json.loads(json.dumps(asdict(config)))


class Rows:
    """The rows of one task in a file, at least those ``attacks`` in each: those there are not measured again."""

    def __init__(self, path: Path, common: Mapping[str, Any], attacks: Sequence[str]) -> None:
        self.path, self.common = path, {**common, "attacks": list(attacks)}
        rows = read_rows(path)
        own = [row for row in rows if _has(row, common)]
        self.others = len(rows) - len(own)
        self.found = [_under(attacks, row) for row in own if _holds(row, attacks)]

    def get(self, **key: Any) -> dict[str, Any] | None:
        return next((row for row in self.found if _has(row, key)), None)

    def add(self, measured: Mapping[str, Any], **key: Any) -> None:
        row = {**key, **self.common, **measured}
        write_rows(self.path, [row])
        self.found.append(row)
        show(row)


def _holds(row: Mapping[str, Any], attacks: Sequence[str]) -> bool:
    """Whether what ``row`` says under ``attacks`` can be told: beside gold it is said of all of its own as one."""
    held = {*row.get("attacks", ())}
    return held == {*attacks} if "gold" in row else held >= {*attacks}


def _under(attacks: Sequence[str], row: dict[str, Any]) -> dict[str, Any]:
    """``row`` as if it had been under no other attacks."""
    if "attacked" not in row:
        return row
    attacked, relearning = ({name: row[key][name] for name in attacks} for key in ("attacked", "relearning"))
    return {**row, "attacked": attacked, "relearning": relearning, "worst": attacked[hardest(attacked)]}


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
