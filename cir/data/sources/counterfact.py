"""CounterFact: facts of one word or name."""

from __future__ import annotations

from cir.data.facts import Fact
from cir.data.sources.source import Row, Source, alike, completed


def _counterfact(row: Row) -> Fact:
    rewrite = row.inner("requested_rewrite")
    prompt = rewrite.text("prompt").replace("{}", rewrite.text("subject"))
    answer = rewrite.inner("target_true").text("str")
    return completed(row.id, [prompt], answer, row.texts("paraphrase_prompts"))


def _counterfact_neighbour(row: Row) -> Fact:
    """Other subjects with the same true answer."""
    answer = row.inner("requested_rewrite").inner("target_true").text("str")
    return completed(row.id, row.texts("neighborhood_prompts"), answer)


def _same(row: Row) -> tuple[str, ...]:
    rewrite = row.inner("requested_rewrite")
    return alike(rewrite.text("subject"), rewrite.inner("target_true").text("str"))


COUNTERFACT = Source(
    "azhx/counterfact",
    {"facts": ((None, "train"),)},
    "facts of one word or name, with other subjects of the same answer",
    "requested_rewrite {prompt with {}, subject, target_true {str}}, paraphrase_prompts, neighborhood_prompts; of "
    "the benchmark also target_new {str}",
    "Meng et al. 2022, arXiv 2202.05262",
    _counterfact,
    _same,
    _counterfact_neighbour,
    benchmark={"facts": ((None, "train"),)},
)
