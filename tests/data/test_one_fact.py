"""The rows of a data set that tell one fact are one, and each is as bounded as the facts of a file."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest

from cir.data.datasets import NAMES, SOURCES, load_data

ASKED = ("Who has Subject{}?", " who  has SUBJECT{}?", "WHO has Subject{}?\n")
"""One question in several hands."""


def retold(name: str, subject: int, answer: int, way: int) -> dict:
    """A row of a data set that tells one fact, in one of three ways."""
    about, said = f"Subject{subject}", (f"Answer{answer}", f" answer{answer}", f"Answer{answer}")[way]
    question = ASKED[way].format(subject)
    if name == "rwku":
        query = ("{} is with ___ now.", "What is with {}?", "At {} there is ___ too.")[way].format(about)
        return {"subject": about if way else f" {about.upper()}", "query": query, "answer": said}
    if name == "counterfact":
        prompt = ("{} is with", "With {} there is", "The friend of {} is")[way]
        rewrite = {"prompt": prompt, "subject": about, "target_true": {"str": said}}
        others = {
            "paraphrase_prompts": [f"Way {way}: {about} has"],
            "neighborhood_prompts": [f"Way {way} beside {about} is"],
        }
        return {"requested_rewrite": rewrite, **others}
    if name == "zsre":
        asked = ("Who is with {}?", "With {} there is who?", "What does {} have?")[way].format(about)
        near = {"loc": f"nq question: what is beside {about} {way}", "loc_ans": "a wall"}
        return {"subject": about, "src": asked, "rephrase": f"Way {way}: {about}?", "answers": [said, "x"], **near}
    if name.startswith(("tofu", "muse")):
        return {"question": question, "answer": said, "paraphrased_question": f"Way {way}: {about}?"}
    choices = [f"Wrong{way}", said, "None"]
    return {"question": question, "choices": choices[way:] + choices[:way], "answer": (1 - way) % 3}


def copy_of(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pairs(facts) -> set[tuple[str, str]]:
    """Who has what, by all that ``facts`` say and ask."""
    said = [text for fact in facts for text in fact.sentences]
    said += [f"{probe.prompt}{probe.target}" for fact in facts for probe in fact.probes + fact.paraphrases]
    found = [re.findall(r"subject\d+|answer\d+", text.lower()) for text in said]
    assert all(len(set(pair)) == 2 for pair in found)
    return {tuple(sorted(set(pair))) for pair in found}


@pytest.mark.parametrize("name", [name for name in NAMES if SOURCES[name].fact])
def test_rows_of_one_subject_and_answer_are_one_fact(name, tmp_path):
    told = [(i, j, way) for i in range(8) for j in (i, 50) for way in range(3)]
    random.Random(0).shuffle(told)
    path = copy_of(tmp_path / "rows.jsonl", [retold(name, *fact) for fact in told])
    data = load_data(name, path)
    assert len(data.facts) == len(pairs(data.facts)) == 16
    assert all(len(pairs([fact])) == 1 for fact in data.facts)
    for seed in range(10):
        relearn, probe = data.split(0.5, seed)
        assert len(relearn) == len(probe) == 8
        assert not pairs(relearn) & pairs(probe)
    if SOURCES[name].neighbour:
        for limit in (None, 5):
            data = load_data(name, path, limit=limit)
            assert [f.id.replace("-neighbour", "") for f in data.neighbours] == [f.id for f in data.facts]
            assert all(len(fact.probes) == 3 for fact in data.neighbours)


def test_one_fact_has_all_the_ways_to_ask_for_it(tmp_path):
    first, second = (
        {"subject": "Ann", "src": src, "rephrase": again, "answers": ["Tea"], "loc": "is it", "loc_ans": "yes"}
        for src, again in (("What drinks Ann?", "Ann drinks what?"), ("Ann drinks what?", "Her drink, Ann's?"))
    )
    (fact,) = load_data("zsre", copy_of(tmp_path / "a.jsonl", [first, second])).facts
    assert (fact.id, fact.sentences) == ("zsre-1", ("What drinks Ann? Tea", "Ann drinks what? Tea"))
    assert [probe.prompt for probe in fact.probes] == ["Q: What drinks Ann?\nA:", "Q: Ann drinks what?\nA:"]
    assert [probe.prompt for probe in fact.paraphrases] == ["Q: Her drink, Ann's?\nA:"]  # the other is a probe
    # Without subjects only the question tells which rows are one fact.
    rows = [{**row, "subject": None} for row in (first, second, {**first, "src": " what drinks ANN?"})]
    facts = load_data("zsre", copy_of(tmp_path / "a.jsonl", rows)).facts
    assert [fact.id for fact in facts] == ["zsre-1", "zsre-2"]
    # Of multiple choice the first row's choices are asked.
    rows = [
        {"question": "Q?", "choices": choices, "answer": choices.index("y")} for choices in (["x", "y"], ["y", "z"])
    ]
    (fact,) = load_data("mmlu", copy_of(tmp_path / "a.jsonl", rows)).facts
    assert (fact.choices, fact.answer, fact.sentences) == (("x", "y"), 1, ("Q? y",))


def test_rows_are_bounded_as_facts_are(tmp_path, monkeypatch):
    row = {"question": "Is it?", "answer": "yes"}
    for change, message in (
        ({"answer": "x" * 100_000}, "line 2: expected at most 100,000 characters, got 100,007"),
        ({"answer": "a\0b"}, "line 2: expected text, got NUL after 'Is it\\? a'"),
        ({"question": float("nan")}, "line 2: expected JSON, got NaN"),
        ({"question": "\ud800"}, "line 2: expected JSON, got half of a surrogate pair"),
        ({"other": "x" * 2**20}, "line 2: expected at most 1,048,576 characters a line"),
    ):
        with pytest.raises(ValueError, match=rf"a\.jsonl, {message}"):
            load_data("tofu", copy_of(tmp_path / "a.jsonl", [row, {**row, **change}]))
    long = {"subject": "x" * 1000, "query": "Who?", "answer": "y"}
    with pytest.raises(ValueError, match=r"line 1, 'id': expected at most 1,000 characters, got 1,008: 'rwku-xxx"):
        load_data("rwku", copy_of(tmp_path / "a.jsonl", [long]))
    monkeypatch.setattr("cir.data.datasets.MOST_FACTS", 2)
    rows = [{**row, "question": f"Is it {i % 3}?"} for i in range(4)]
    with pytest.raises(ValueError, match=r"line 3: expected at most 2 facts, got more"):
        load_data("tofu", copy_of(tmp_path / "a.jsonl", rows))
    assert load_data("wikitext", copy_of(tmp_path / "a.jsonl", [{"text": "x" * 2**21}] * 3)).retain
