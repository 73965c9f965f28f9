from __future__ import annotations

import logging
from pathlib import Path

import pytest

from cir import Fact, Probe, load_facts
from cir.data.datasets import NAMES, SOURCES, DataSet, load_data
from cir.data.facts import check_apart, leaking

DATA = Path(__file__).parent / "files"
SAMPLES = {
    "wmdp-bio": "wmdp.jsonl",
    "wmdp-bio-robust": "wmdp.jsonl",
    "wmdp-chem": "wmdp.jsonl",
    "wmdp-cyber": "wmdp-corpus.jsonl",
    "rwku": "rwku",
    "tofu": "tofu",
    "tofu-forget01": "tofu",
    "tofu-forget05": "tofu",
    "muse-news": "muse",
    "muse-books": "muse",
    "counterfact": "counterfact.json",
    "zsre": "zsre.json",
    "wikitext": "wikitext",
    "fineweb-edu": "fineweb-edu.jsonl",
    "mmlu": "mmlu.jsonl",
}


def sample(name: str, **settings) -> DataSet:
    return load_data(name, DATA / SAMPLES[name], **settings)


def statement(i: int, *sentences: str) -> Fact:
    return Fact(f"f{i}", sentences or (f"Sentence {i}.",), (Probe(f"Sentence {i} is", " true"),))


def test_facts_are_read_with_paraphrases():
    ask = {"prompt": "Is it", "target": " so"}
    (fact,) = load_facts([{"sentences": ["It is so."], "paraphrases": [ask]}])
    assert (fact.probes, fact.paraphrases) == ((), (Probe("Is it", " so"),))
    with pytest.raises(ValueError, match="fact 1: expected a probe with 'prompt' and 'target' strings"):
        load_facts([{"sentences": ["It is so."], "paraphrases": [{"prompt": "Is it"}]}])


def test_multiple_choice_states_the_right_choice():
    data = sample("wmdp-bio")
    first, second, third = data.facts
    assert first == Fact(
        "wmdp-bio-1",
        ("Which of these keeps sourdough starter alive? Flour and water",),
        question="Which of these keeps sourdough starter alive?",
        choices=("Salt", "Vinegar", "Flour and water", "Frost"),
        answer=2,
    )
    assert second.answer == 0
    assert "\n\nfor i in range(2):\n    print(i)" in third.question  # code keeps its lines
    assert (data.name, data.neighbours, data.retain, data.disruption) == ("wmdp-bio", (), None, None)


def test_the_corpus_form_brings_its_own_sentences():
    first, _, third = sample("wmdp-cyber").facts
    assert first.sentences == (
        "Sourdough starter is fed with flour and water.",
        "A starter lives on flour and water.",
    )
    assert (first.answer, first.id) == (2, "wmdp-cyber-1")
    assert third.answer == 0


def test_mmlu_may_have_an_empty_choice():
    facts = sample("mmlu").facts
    assert [fact.answer for fact in facts] == [1, 0, 3, 3]
    assert facts[3].choices == ("8", "9", "", "11")
    assert facts[1].sentences == ("Which planet is nearest to the sun? Mercury",)
    assert not any(fact.probes for fact in facts)


def test_rwku_asks_up_to_the_blank_and_joins_what_has_one_answer():
    data = sample("rwku")
    poet, town, novel, cello = data.facts
    assert poet == Fact(
        "rwku-Mira Solane: poet",
        ("Mira Solane is known as the 'Poet of the Northern Fjords'.",),
        (Probe("Mira Solane is known as the", " Poet"),),
    )
    assert town.sentences == (
        "Mira Solane was born in the town of Averby in 1931.",
        "In which town was Mira Solane born? Averby",
    )
    assert town.probes == (
        Probe("Mira Solane was born in the town of", " Averby"),
        Probe("Q: In which town was Mira Solane born?\nA:", " Averby"),
    )
    assert novel.probes == (Probe("Q: ___ is the first novel by Mira Solane.\nA:", " Salt Harbour"),)
    assert novel.sentences == ("Salt Harbour is the first novel by Mira Solane.",)
    assert cello.probes[0].target == " The cello"  # without [...]
    assert [fact.id for fact in data.neighbours] == [
        "rwku-neighbour-Mira Solane: lune",
        "rwku-neighbour-Mira Solane: its herring market",
        "rwku-neighbour-Tobin Arkwell: four",
    ]


def test_tofu_has_paraphrases_where_the_row_has():
    data = sample("tofu")
    assert data.facts[1] == Fact(
        "tofu-2",
        ("What genre does Ilka Brandt-Osei write in? Ilka Brandt-Osei writes gardening mysteries.",),
        (
            Probe(
                "Q: What genre does Ilka Brandt-Osei write in?\nA:", " Ilka Brandt-Osei writes gardening mysteries."
            ),
        ),
        paraphrases=(
            Probe(
                "Q: In which genre are the books of Ilka Brandt-Osei?\nA:",
                " Ilka Brandt-Osei writes gardening mysteries.",
            ),
        ),
    )
    assert [len(fact.paraphrases) for fact in data.neighbours] == [1, 0]


def test_muse_has_all_parts_and_says_what_it_leaves_out(caplog):
    with caplog.at_level(logging.WARNING, logger="cir.data.datasets"):
        data = sample("muse-news")
    assert data.facts[0].probes == (Probe("Q: What blocked the tram in Osterholt on Monday?\nA:", " Three geese"),)
    assert [fact.probes[0].target for fact in data.neighbours] == [" A heron", " Nine"]  # the third is a fact
    assert data.retain.startswith("The library of Brakel opens at nine.\nIt has two floors.\n\nIts roof")
    assert data.disruption == (
        "The market of Brakel sells cheese.\n\nOn Fridays it sells fish.\n\nIt closes at dusk."
    )
    assert [record.getMessage() for record in caplog.records] == [
        "data set 'muse-news': 1 neighbours were, in whole or part, to be forgotten",
        "data set 'muse-news': the prompts of 1 facts hold their answer: muse-news-3",
    ]
    assert sample("muse-books").facts[0].id == "muse-books-1"


def test_counterfact_keeps_only_neighbours_that_are_not_facts():
    data = sample("counterfact")
    louvre = data.facts[0]
    assert louvre.sentences == ("The Louvre is located in Paris.",)
    assert louvre.probes == (Probe("The Louvre is located in", " Paris"),)
    assert louvre.paraphrases == (
        Probe("It rained all day. The Louvre can be found in", " Paris"),
        Probe("The Louvre stands in", " Paris"),
    )
    assert [fact.id for fact in data.neighbours] == [f"counterfact-neighbour-{i}" for i in (1, 2, 3)]
    assert data.neighbours[0].sentences == ("The Sacré-Cœur is located in Paris.",)  # the Orsay museum is a fact
    assert data.neighbours[0].probes == (Probe("The Sacré-Cœur is located in", " Paris"),)
    assert len(data.neighbours[1].probes) == 2
    assert leaking(data.facts) == ["counterfact-3"]


def test_zsre_takes_the_first_answer():
    data = sample("zsre")
    assert data.facts[0] == Fact(
        "zsre-1",
        ("Which river drives Hollow Mill? Aske",),
        (Probe("Q: Which river drives Hollow Mill?\nA:", " Aske"),),
        paraphrases=(Probe("Q: What river does Hollow Mill stand on?\nA:", " Aske"),),
    )
    assert [fact.probes[0].prompt for fact in data.neighbours] == [
        "Q: who invented the paper clip?\nA:",
        "Q: how many legs has a spider?\nA:",
        "Q: where do puffins nest?\nA:",
    ]


def test_texts_have_a_part_that_measures_harm():
    data = sample("wikitext")
    assert data == DataSet(
        "wikitext", (), (), "= Herring =\n\nA herring is a fish .", "= Lobster =\n\nA lobster is no fish ."
    )
    data = sample("fineweb-edu")
    assert data.retain.split("\n\n")[0] == "Leaves turn sunlight into sugar."
    assert data.disruption == "Ice floats because it is light.\n\nMagnets have two poles."
    assert sample("fineweb-edu", limit=3).disruption == "The moon moves the tides."
    assert load_data("wikitext", DATA / "muse" / "retain.txt").disruption == "A heron watches from the town hall."


def test_names_of_data_sets_may_be_in_capitals():
    assert load_data("TOFU", DATA / "tofu") == sample("tofu")
    for bad in (None, 3, "tofu "):
        with pytest.raises(ValueError, match=r"expected a data set out of wmdp-bio, .*, got "):
            load_data(bad)


@pytest.mark.parametrize("name", NAMES)
def test_prompts_and_targets_meet_at_a_space(name):
    data = sample(name)
    assert len({fact.id for fact in data.facts + data.neighbours}) == len(data.facts + data.neighbours)
    for fact in data.facts + data.neighbours:
        for probe in fact.probes + fact.paraphrases:
            assert probe.prompt == probe.prompt.strip()
            assert probe.target == f" {probe.target.strip()}"


def test_a_limit_is_spread_and_repeatable():
    def ids(**settings):
        data = sample("zsre", **settings)
        return [fact.id for fact in data.facts], [fact.id for fact in data.neighbours]

    facts, neighbours = ids(limit=2)
    assert (facts, neighbours) == ids(limit=2)
    assert len(set(facts)) == 2
    assert neighbours == [fact.replace("zsre", "zsre-neighbour") for fact in facts]  # of the same rows
    assert ids(limit=9) == ids()
    assert len({ids(limit=1, seed=seed)[0][0] for seed in range(10)}) == 3
    with pytest.raises(ValueError, match="expected a limit of at least 1, got 0"):
        ids(limit=0)


def test_a_split_is_disjoint_and_repeatable():
    data = DataSet("mine", tuple(statement(i) for i in range(20)))
    relearn, probe = data.split(0.75, seed=3)
    assert (len(relearn), len(probe)) == (15, 5)
    assert {fact.id for fact in relearn + probe} == {fact.id for fact in data.facts}
    check_apart(relearn, probe)
    assert data.split(0.75, seed=3) == (relearn, probe)
    assert data.split(0.75, seed=4) != (relearn, probe)


def test_a_split_keeps_facts_of_one_sentence_together():
    chain = [statement(i, f"Sentence {i}.", f"Sentence {i + 2}.") for i in range(6)]  # all even, and all odd
    for seed in range(5):
        relearn, probe = DataSet("mine", tuple(chain)).split(0.5, seed)
        assert {len(relearn), len(probe)} == {3}
        check_apart(relearn, probe)
    for facts, share in ((chain[:1], 0.5), (chain[::2], 0.5), (chain, 0.0)):
        with pytest.raises(ValueError, match="data set 'mine': expected facts both to relearn and to probe, got"):
            DataSet("mine", tuple(facts)).split(share)


def test_splits_that_share_are_refused():
    one, two = statement(1), statement(2)
    check_apart([one], [two])
    with pytest.raises(ValueError, match=r"expected splits with no ids in common, got 1: f1"):
        check_apart([one], [one, two])
    with pytest.raises(ValueError, match=r"no sentences in common, got 1: Sentence 2\."):
        check_apart([statement(3, "Sentence 2.", "More.")], [two])


def test_leaks_are_whole_words_in_any_case():
    def leaks(prompt, target):
        return leaking([Fact("a", ("s",), (Probe(prompt, target),))]) == ["a"]

    assert leaks("Is ROME the capital? It is", " Rome.")
    assert not leaks("The Romeo of the capital is", " Rome")
    assert not leaks("Is it", " ...")
    assert leaking([Fact("a", ("s",), paraphrases=(Probe("Rome is", " Rome"),))]) == ["a"]


def test_unknown_names_are_told_the_known():
    with pytest.raises(ValueError, match=r"expected a data set out of wmdp-bio, .*, mmlu, got 'wmpd'"):
        load_data("wmpd")


@pytest.mark.parametrize(
    ("name", "file", "content", "expected"),
    [
        (
            "tofu",
            "a.jsonl",
            '\n{"question": "Q?"}',
            r"a\.jsonl, line 2: expected 'answer', a string .* the columns quest",
        ),
        ("tofu", "a.json", '[{"question": "Q?", "answer": 3}]', r"a\.json, row 1: expected 'answer', .*, got 3$"),
        ("tofu", "a.jsonl", '{"question": " ", "answer": "A"}', r"expected 'question', a string that is not empty"),
        ("tofu", "a.jsonl", "[1]", r"line 1: expected an object with question, answer, .*, got \[1\]"),
        ("tofu", "a.jsonl", "{", r"a\.jsonl, line 1: expected JSON, got"),
        ("tofu", "a.json", "[{]", r"a\.json: expected JSON, got"),
        ("tofu", "a.json", '[\n{"question":\nNaN}]', r"a\.json: expected JSON, got NaN, .* in line 3"),
        ("tofu", "a.jsonl", '{"a\\u0007b": 1}', r"line 1: expected 'question', .*, got the columns a\?b$"),
        ("mmlu", "a.jsonl", '{"question": "Q?", "choices": ["x", "y"], "answer": true}', r"'answer', .*, got True"),
        ("tofu", "a.txt", "A sentence.", r"paragraph 1: expected an object with question.*got 'A sentence.'"),
        ("tofu", "a.md", "x", r"expected a file that ends in \.jsonl, .*a\.md"),
        ("tofu", "a.jsonl", "\n", r"a\.jsonl: expected at least one row, got none"),
        (
            "mmlu",
            "a.jsonl",
            '{"question": "Q?", "choices": "ab"}',
            r"expected 'choices', a list of strings, got 'ab'",
        ),
        (
            "mmlu",
            "a.jsonl",
            '{"question": "Q?", "choices": ["x"], "answer": "B"}',
            r"'answer', .* 1 choices, got 'B'",
        ),
        ("zsre", "a.jsonl", '{"src": "Q?", "answers": []}', r"expected 'answers', a list of strings, got \[\]"),
        (
            "counterfact",
            "a.json",
            '{"requested_rewrite": 1}',
            r"line 1: expected 'requested_rewrite', an object, got 1",
        ),
        (
            "counterfact",
            "a.jsonl",
            '{"requested_rewrite": {"prompt": "{} is"}}',
            r"line 1, 'requested_rewrite': expected 'subject'",
        ),
        ("wikitext", "a.jsonl", '{"txt": "x"}', r"line 1: expected 'text', a string, got \{'txt'"),
        ("wikitext", "a.txt", "One.\n\nTwo.", r"data set 'wikitext': expected at least three documents.*got 2"),
    ],
)
def test_names_the_row_of_what_is_malformed(tmp_path, name, file, content, expected):
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=expected):
        load_data(name, tmp_path / file)


def test_every_source_is_documented_and_sampled():
    assert set(SAMPLES) == set(NAMES)
    for source in SOURCES.values():
        assert (source.fact is None) == (source.same is None)
        assert all((source.hub, source.parts, source.holds, source.columns, "arXiv" in source.cite))
