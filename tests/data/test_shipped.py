"""What ships with the package."""

from __future__ import annotations

import pytest

from cir.data.facts import check_contrast, load_facts
from cir.data.shipped import DATA, builtin_contrast


def test_built_in_contrast_tells_nothing_of_the_demo():
    contrast = builtin_contrast([])
    assert len(contrast) == len({fact.id for fact in contrast}) == 48
    assert all(fact.sentences[0] == f"{p.prompt}{p.target}." for fact in contrast for p in fact.probes)
    shown = [fact for name in ("forget", "related", "neighbours") for fact in load_facts(DATA / f"demo_{name}.jsonl")]
    check_contrast(shown, contrast)
    assert builtin_contrast([fact for fact in shown if fact.id.startswith("capital")]) == contrast


@pytest.mark.parametrize(
    ("sentence", "dropped"),
    [
        ("German is Germany's official language.", ["language of Germany"]),
        ("In Greece the language that is spoken is Greek.", ["language of Greece"]),
        ("Hamlet was written by Shakespeare.", ["author of Hamlet"]),
        ("Down is the opposite of up.", ["opposite of up"]),
        ("Rome is the capital city of Italy.", []),
        ("Germanic tribes lived in the forests of Germany.", []),
    ],
)
def test_what_is_to_be_forgotten_is_no_contrast(sentence, dropped):
    left = builtin_contrast(load_facts([sentence]))
    assert [fact.id for fact in builtin_contrast([]) if fact not in left] == dropped
