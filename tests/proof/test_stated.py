from __future__ import annotations

import contextlib
import copy
import json
from dataclasses import asdict
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cir.proof.stated import FORMAT, check_content
from cir.proof.verdict import Thresholds, judge
from tests.fuzz import examples

OUTCOME = {"value": 0.5, "stderr": 0.1, "count": 3}
SIDE = {"measures": {"recall": OUTCOME}, "attacks": {}, "recall": {"a": 0.5}, "kept": {"loss": {"0": 2.5}}}
RIGHT: dict[str, Any] = {
    "format": FORMAT,
    "date": "2026-01-31T12:00:00Z",
    "signer": "2" * 64,
    "method": {"name": "CIR"},
    "sources": {"facts": "facts.jsonl"},
    "settings": {"text_tokens": 512, "generate": 3, "seed": 0, "relearning": False},
    "data_sha256": {"facts": "0" * 64},
    "weights_sha256": {"before": "0" * 64, "after": "1" * 64},
    "files_sha256": {},
    "set_aside": ["b"],
    "attacker": {"taught": 4, "asked": ["a"]},
    "before": SIDE,
    "after": SIDE,
    "thresholds": asdict(Thresholds()),
    "versions": {"torch": "2"},
}
RIGHT["verdict"] = judge(RIGHT).stated()
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=9,
)


def places(value: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Where there is something in nested dictionaries."""
    inner = (
        [place for key, item in value.items() for place in places(item, (*path, key))]
        if isinstance(value, dict)
        else []
    )
    return [path, *inner]


def replaced(path: tuple[str, ...], item: Any) -> Any:
    content = copy.deepcopy(RIGHT)
    if not path:
        return item
    inside = content
    for key in path[:-1]:
        inside = inside[key]
    inside[path[-1]] = item
    return content


def test_what_is_written_is_taken():
    check_content(json.loads(json.dumps(RIGHT)))


@given(st.sampled_from(places(RIGHT)), JSON)
@settings(max_examples=examples(200), deadline=None)
def test_anything_anywhere_is_taken_or_refused_in_short_words(path, item):
    with contextlib.suppress(ValueError):
        check_content(replaced(path, item))


@pytest.mark.parametrize("item", [None, [], {}, "x" * 9999, float("nan"), -1, True])
def test_no_place_takes_what_has_no_place_there(item):
    for path in places(RIGHT):
        if path[:1] in (("method",), ("sources",), ("versions",)) and (len(path) > 1 or item == {}):
            continue  # as they are stated
        empty = {"recall", "measures", "attacks", "data_sha256", "files_sha256", "kept", "loss"}
        fits = (empty & set(path[-1:]) and item == {}) or (path == ("signer",) and item is None)
        if (
            fits
            or (path in (("set_aside",), ("attacker", "asked")) and item == [])
            or (path[-1:] == ("value",) and item == -1)
        ):
            continue
        if (path[-1:] == ("relearning",)) and item is True:
            continue
        with pytest.raises(ValueError, match="certificate") as error:
            check_content(replaced(path, item))
        assert len(str(error.value)) < 400


@pytest.mark.parametrize("earlier", ["cir-certificate-1", "cir-certificate-2"])
def test_an_earlier_format_is_refused_in_one_line(earlier):
    with pytest.raises(ValueError, match=f"expected format cir-certificate-3, got '{earlier}'; make it anew"):
        check_content(replaced(("format",), earlier))


def test_a_verdict_that_its_figures_do_not_bear_is_refused():
    better = {**RIGHT["verdict"], "heading": "Forgotten, and the rest kept"}
    with pytest.raises(ValueError, match="certificate, verdict: expected that of its figures, 'Not forgotten"):
        check_content(replaced(("verdict",), better))
    with pytest.raises(ValueError, match=r"certificate, thresholds, kept_share: expected at most 1, got 1\.5"):
        check_content(replaced(("thresholds", "kept_share"), 1.5))
