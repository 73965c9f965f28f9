"""How often harm on text that was not given stays below what was measured and a margin: what the budget keeps free.

    python -m bench.margin [--facts A.jsonl ...] [--contrast C.jsonl] [--retain R.txt] [--text D.txt ...] [--splits N]

SmolLM2-135M forgets the facts. Then the text, which may be several, is split at random, block by block, into a half
that is measured as the budget is, near the facts by half, and a half that is not given. Of that, all is measured, and
what is nearest the facts alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import cir
from bench.records import ROOT, write_rows
from cir import CIRConfig, Fact, load_facts
from cir.data.sampling import Sample, sample
from cir.data.shipped import DATA, builtin_text
from cir.data.tokens import windows
from cir.forgetting.report import hash_facts
from cir.measures import WINDOW, loss_rise, token_losses
from cir.model.checkpoints import demo_model, load_model

BLOCK = 8
"""Windows that stay together: those of one article are alike."""
MARGINS = (0.0, 1.0, 2.0)
"""Standard errors added to the rise measured."""


def split(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Places of windows, of ``count``, that are measured and that are not given."""
    blocks = torch.arange(count).split(BLOCK)
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed)).tolist()
    halves = order[: len(order) // 2], order[len(order) // 2 :]
    given, held = (torch.cat([blocks[i] for i in sorted(half)]) for half in halves)
    return given, held


def bounded(
    rows: Tensor, before: Tensor, after: Tensor, near: Sequence[Sequence[int]], tokens: int, seed: int
) -> dict[str, Any]:
    """Of one split: the rise measured, its standard error, and the rise of the text that was not given."""
    given, held = split(len(rows), seed)

    def taken(of: Tensor) -> tuple[Sample, Tensor]:
        """A sample of some windows, and which of all it is of."""
        found = sample(rows[of], tokens, near)
        return found, of[(rows[of][None] == found.rows[:, None]).all(2).int().argmax(1)]

    measured, where = taken(given)
    rise, stderr = loss_rise(after[where], before[where], measured)
    _, nearest = taken(held)
    nearest = nearest[: len(nearest) // 2]
    return {
        "seed": seed,
        "rise": rise,
        "stderr": stderr,
        "held_out": float((after[held] - before[held]).mean() / before[held].mean()),
        "held_out_near": float((after[nearest] - before[nearest]).mean() / before[nearest].mean()),
        "worst": float((after[where] - before[where]).mean(1).max()),
        "held_out_worst": float((after[held] - before[held]).mean(1).max()),
    }


def run(
    facts: Sequence[Fact],
    contrast: Sequence[Fact] | None,
    retain: str | None,
    texts: Sequence[str],
    splits: int,
    config: CIRConfig,
) -> list[dict[str, Any]]:
    """A row for each number of tokens that is measured."""
    model, tokenizer = load_model(demo_model(), device="cpu")
    rows = torch.cat([windows(tokenizer, text, WINDOW) for text in texts])
    before = token_losses(model, rows)
    report = cir.unlearn(model, tokenizer, facts, contrast=contrast, retain=retain, config=config, on_signal="raise")
    after = token_losses(model, rows)
    near = tokenizer([sentence for fact in facts for sentence in fact.sentences])["input_ids"]
    found = []
    for tokens in (4096, 8192, 32768):
        if tokens > rows.numel() // 2:
            continue
        all_splits = [bounded(rows, before, after, near, tokens, seed) for seed in range(splits)]
        holds = {
            str(margin): sum(s["held_out"] <= s["rise"] + margin * s["stderr"] for s in all_splits) / splits
            for margin in MARGINS
        }
        found.append(
            {
                "facts": hash_facts(facts)[:12],
                "windows": len(rows),
                "tokens": tokens,
                "budget": config.budget,
                "recall": report.after.mean_recall,
                "holds": holds,
                "splits": all_splits,
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    demo = [str(DATA / f"demo_{name}.jsonl") for name in ("forget", "related")]
    parser.add_argument("--facts", nargs="+", default=demo)
    parser.add_argument("--contrast", help="default: the built-in facts")
    parser.add_argument("--retain", help="text; default: the built-in one")
    parser.add_argument("--text", nargs="+", help="that is split; default: the built-in one")
    parser.add_argument("--splits", type=int, default=10)
    parser.add_argument("--budget", type=float, default=0.003)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    arguments = parser.parse_args()
    texts = [Path(path).read_text(encoding="utf-8") for path in arguments.text or []] or [builtin_text()]
    rows = run(
        [fact for path in arguments.facts for fact in load_facts(path)],
        None if arguments.contrast is None else load_facts(arguments.contrast),
        None if arguments.retain is None else Path(arguments.retain).read_text(encoding="utf-8"),
        texts,
        arguments.splits,
        CIRConfig(budget=arguments.budget, disruption_tokens=8192),
    )
    for row in rows:
        means = {key: sum(s[key] for s in row["splits"]) / len(row["splits"]) for key in row["splits"][0]}
        print(
            f"{row['tokens']} tokens: rise {means['rise']:+.3%} +- {means['stderr']:.3%}, not given "
            f"{means['held_out']:+.3%}, near the facts {means['held_out_near']:+.3%}, worst window "
            f"{means['worst']:.3f} and {means['held_out_worst']:.3f} nats; the bound holds in "
            + ", ".join(f"{share:.0%} with {margin} standard errors" for margin, share in row["holds"].items())
        )
    write_rows(arguments.out / "margin.jsonl", rows)


if __name__ == "__main__":
    main()
