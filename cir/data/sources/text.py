"""Sets of text alone."""

from __future__ import annotations

from cir.data.sources.source import Source

WIKITEXT = Source(
    "Salesforce/wikitext",
    {
        "retain": (("wikitext-2-raw-v1", "validation"),),
        "disruption": (("wikitext-2-raw-v1", "test"),),
    },
    "articles of Wikipedia: text",
    "text",
    "Merity et al. 2016, arXiv 1609.07843",
)

FINEWEB_EDU = Source(
    "HuggingFaceFW/fineweb-edu",
    {"text": (("sample-10BT", "train"),)},
    "educational web pages: text",
    "text",
    "Penedo et al. 2024, arXiv 2406.17557",
    streamed=True,
)
