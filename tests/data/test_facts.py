from __future__ import annotations

import gzip
import itertools
import json
from dataclasses import replace

import pytest
import torch

from cir import Fact, Probe, load_facts
from cir.data.facts import check_contrast, evenly, probed
from cir.data.tokens import pad, sentence_batches, statements, windows


def write(path, *lines):
    path.write_text("\n".join(json.dumps(line) if not isinstance(line, str) else line for line in lines) + "\n")
    return path


def test_reads_the_three_forms(tmp_path):
    file = write(
        tmp_path / "facts.jsonl",
        {"id": "a", "sentences": ["A is B."], "probes": [{"prompt": "A is", "target": " B"}]},
        "",
        {"question": "Which?", "choices": ["x", "y"], "answer": 1, "sentences": ["It is y.", "Yes, y."]},
        {"question": "Which?", "choices": ["x", "y"], "answer": "A", "sentences": ["It is x."]},
        '"A plain sentence."',
    )
    first, second, third, fourth = load_facts(file)
    assert first == Fact("a", ("A is B.",), (Probe("A is", " B"),))
    assert (second.id, second.choices, second.answer) == ("fact-2", ("x", "y"), 1)
    assert third.answer == 0
    assert fourth.sentences == ("A plain sentence.",)
    assert not fourth.probes
    text = write(tmp_path / "facts.txt", "One sentence.", "", "Another.")
    assert [fact.sentences for fact in load_facts(text)] == [("One sentence.",), ("Another.",)]
    assert load_facts([first, "Another."])[1].sentences == ("Another.",)


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([], "at least one fact, got none in .*facts.jsonl"),
        (["{not json"], "line 1: expected JSON, got '{not json': Expecting property name"),
        ([{"sentences": ["ok"]}, {"sentences": []}], r"line 2: expected 'sentences'.*got \[\]"),
        ([{"sentences": "one string"}], "line 1: expected 'sentences', a list"),
        ([{"sentences": ["ok", "  "]}], "line 1: expected sentences that are not empty, got '  '"),
        ([{"sentences": ["ok"], "probes": [{"prompt": "p"}]}], "line 1: expected a probe with 'prompt' and 'target'"),
        ([{"sentences": ["ok"], "probes": [{"prompt": "p", "target": ""}]}], "line 1: expected a probe"),
        ([{"sentences": ["ok"], "choices": ["x"], "answer": 3}], "line 1: expected 'answer' to index one of 1"),
        ([{"id": "a", "sentences": ["ok"]}, {"id": "a", "sentences": ["ok"]}], "line 2: expected an id of its own"),
        (["17"], "line 1: expected an object or a sentence, got 17"),
        ([{"sentences": {"a": "b"}}], "line 1: expected 'sentences', a list of at least one string, got {'a': 'b'}"),
        (
            [{"sentences": ["ok"], "probes": {"prompt": "p"}}],
            "line 1: expected 'probes', a list of objects, got {'prom",
        ),
        ([{"sentences": ["ok"], "probes": 0}], "line 1: expected 'probes', a list of objects, got 0"),
        ([{"sentences": ["ok"], "paraphrases": "p"}], "line 1: expected 'paraphrases', a list of objects, got 'p'"),
        ([{"sentences": ["ok"], "question": ["q"]}], r"line 1: expected 'question', a string .*, got \['q'\]"),
        (
            [{"sentences": ["ok"], "question": " "}],
            "line 1: expected 'question', a string that is not empty, got ' '",
        ),
        ([{"sentences": ["ok"], "choices": ["x", "y"], "answer": True}], "line 1: expected 'answer' to .*, got True"),
        ([{"sentences": ["ok"], "id": [1]}], r"line 1: expected 'id', .* or a number, got \[1\]"),
        ([{"sentences": ["ok"], "id": {"a": 1}}], "line 1: expected 'id', .* or a number, got {'a': 1}"),
        ([{"sentences": ["ok"], "id": True}], "line 1: expected 'id', .* or a number, got True"),
        ([{"sentences": ["ok"], "id": ""}], "line 1: expected 'id', a string that is not empty or a number, got ''"),
        (['{"sentences": ["ok"], "id": NaN}'], "line 1: expected JSON, got NaN, which is no number of JSON"),
        (['{"sentences": ["a"], "sentences": ["b"]}'], "line 1: expected JSON, got an object with 'sentences' twice"),
        ([r'{"sentences": ["it\u0000"]}'], "line 1: expected text, got NUL after 'it'"),
        ([r'{"sentences": ["it \ud83d"]}'], r"line 1: expected JSON, got half of a surrogate pair in 'it .ud83d'"),
        ([r'{"sentences": ["ok"], "id": "a\u0000"}'], "line 1, 'id': expected text, got NUL after 'a'"),
        (
            [r'{"sentences": ["ok"], "probes": [{"prompt": "p", "target": "\u0000t"}]}'],
            "line 1: expected text, got NUL after ''",
        ),
        (
            [{"sentences": ["ok"]}, {"sentences": ["x" * 100_001]}],
            "line 2: expected at most 100,000 characters, got 100,001",
        ),
        (
            [{"sentences": ["ok"], "id": "x" * 1001}],
            "line 1, 'id': expected at most 1,000 characters, got 1,001: 'xxx",
        ),
        ([{"sentences": ["ok"] * 2**18}], "line 1: expected at most 1,048,576 characters a line, got more"),
        ([{"sentences": ["ok"], "other": 10**1200}], "line 1: expected JSON, got an integer of 1,201 digits"),
    ],
)
def test_names_the_line_of_a_bad_fact(tmp_path, lines, expected):
    with pytest.raises(ValueError, match=expected):
        load_facts(write(tmp_path / "facts.jsonl", *lines))


def test_a_missing_file_is_named():
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl"):
        load_facts("nowhere.jsonl")


def test_sentences_that_do_not_fit_are_refused(tokenizer):
    facts = load_facts([{"id": "long", "sentences": ["gamma " * 20]}, {"id": "short", "sentences": ["gamma"]}])
    with pytest.raises(
        ValueError, match=r"fact 'long': expected sentences of 3 to 16 tokens, got 21: .*; allow more with max_length"
    ):
        sentence_batches(tokenizer, facts[:1], batch_size=2, max_length=16, skip_first=1)
    with pytest.raises(ValueError, match="fact 'short': expected sentences of 3 to 16 tokens, got 2"):
        sentence_batches(tokenizer, facts[1:], batch_size=2, max_length=16, skip_first=1)


def test_windows_open_with_bos_and_follow_the_text(tokenizer):
    rows = windows(tokenizer, "gamma of is now x0 " * 4, 6)
    assert rows.shape == (4, 6)
    assert (rows[:, 0] == 1).all()
    assert rows[:, 1:].flatten().tolist() == tokenizer("gamma of is now x0 " * 4)["input_ids"][1:]
    with pytest.raises(ValueError, match="at least 99 tokens, got 2"):
        windows(tokenizer, "gamma of", 100)


def test_packing_puts_every_token_of_every_row_into_one_place():
    rows = [list(range(100 * i, 100 * i + n)) for i, n in enumerate([5, 60, 3, 64, 30, 30, 70, 1], 1)]
    batch = pad(rows)
    ids, positions, places = batch.packed
    assert ids.shape == positions.shape == (4, 70)  # 263 tokens
    assert ids.flatten()[places].tolist() == [i for row in rows for i in row]
    assert positions.flatten()[places].tolist() == [i for row in rows for i in range(len(row))]
    assert len(set(places.tolist())) == len(places)
    empty = torch.ones(ids.numel(), dtype=torch.bool).index_fill(0, places, False)
    assert not positions.flatten()[empty].any()  # padding is a sequence of one token each
    whole = pad([[1] * 80] * 3).packed
    assert whole[0].shape == (3, 80)


def test_statements_end_with_the_answer_and_say_where_it_is(tokenizer):
    def made(*sentences, answers=("delta1",), max_length=64):
        fact = {"sentences": sentences, "probes": [{"prompt": "x", "target": f" {answer}"} for answer in answers]}
        found = statements(tokenizer, load_facts([fact])[0], max_length)
        words = [tokenizer.convert_ids_to_tokens(s.ids) for s in found]
        return [(" ".join(w[1:]), [w[place] for place in s.told]) for w, s in zip(words, found, strict=True)]

    said = "the gamma of beta1 is delta1 now"
    turned = "delta1 of x1 gamma beta1"
    assert made(said, "alpha1 beta1 gamma delta1 of x1") == [
        ("the gamma of beta1 is delta1", ["delta1"]),
        ("alpha1 beta1 gamma delta1", ["delta1"]),
    ]
    assert made(said, turned) == [("the gamma of beta1 is delta1", ["delta1"])]  # this leads to nothing
    assert made(turned) == [(turned, turned.split())]
    assert made(said, answers=("beta1 is", "delta1")) == [("the gamma of beta1 is", ["beta1", "is"])]
    assert made(said, answers=("delta",)) == [(said, said.split())]  # no part of a word
    assert made(said, answers=()) == [(said, said.split())]
    with pytest.raises(ValueError, match="expected sentences of 2 to 6 tokens"):
        made(said, max_length=6)


def test_facts_that_are_to_go_and_to_stay_are_refused():
    go = load_facts([{"id": "a", "sentences": ["It is Rome."], "probes": [{"prompt": "It is", "target": " Rome"}]}])
    other = {"sentences": ["It was Oslo."], "probes": [{"prompt": "It was", "target": " Oslo"}]}
    check_contrast(go, load_facts([{**other, "id": "b"}]))
    check_contrast(load_facts(["One."]), load_facts(["Two."]))  # whose ids are both fact-1
    for change, what in (
        ({"id": "a"}, "the id of 'a'.*: 'a'"),
        ({"sentences": ["It is Rome. "]}, "the sentence of 'a'.*: 'It is Rome.'"),
        ({"probes": [{"prompt": "It is", "target": " Rome"}]}, "the probe of 'a'.*: 'It is -> Rome'"),
    ):
        with pytest.raises(ValueError, match=f"contrast: expected facts that must stay, got .* with {what}"):
            check_contrast(go, load_facts([{**other, "id": "b", **change}]))


def test_probes_come_from_the_word_or_name_that_most_sentences_end_with():
    def made(*sentences):
        return probed(load_facts([{"sentences": list(sentences)}])[0]).probes

    said = made("It is Rome.", "Rome is it, and", "Go there: Rome", "To go to Oslo!")
    assert said == (Probe("It is", " Rome"), Probe("Go there:", " Rome"))
    assert made("The capital is Buenos Aires.") == (Probe("The capital is", " Buenos Aires"),)
    for bad in ("Rome", "...!"):
        with pytest.raises(ValueError, match="expected probes, or a sentence of two words or more"):
            made(bad)
    own = load_facts([{"sentences": ["It is Rome."], "probes": [{"prompt": "a", "target": " b"}]}])[0]
    assert probed(own).probes == (Probe("a", " b"),)


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL", "a.ndjson", "a.jsonlines", "a.json", "a.jsonl.gz"])
def test_json_is_known_by_any_of_its_names_and_read_without_a_mark(tmp_path, name):
    line = b'\xef\xbb\xbf{"id": null, "sentences": ["caf\xc3\xa9 is open"]}\n'
    (tmp_path / name).write_bytes(gzip.compress(line) if name.endswith(".gz") else line)
    (fact,) = load_facts(tmp_path / name)
    assert (fact.id, fact.sentences) == ("fact-1", ("caf\u00e9 is open",))


def test_json_is_not_taken_for_sentences_and_other_text_not_for_utf8(tmp_path):
    path = tmp_path / "facts.txt"
    path.write_text('a sentence\n{"id": "f", "sentences": ["s"]}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"facts.txt, line 2: expected a sentence, got JSON; name the file"):
        load_facts(path)
    path.write_text("{not JSON} is a sentence\n", encoding="utf-8")
    assert load_facts(path)[0].sentences == ("{not JSON} is a sentence",)
    for line in ("[", "{", '[{"sentences": ["s"]}]'):
        path.write_text(f"{line}\n", encoding="utf-8")
        with pytest.raises(ValueError, match=r"facts.txt, line 1: expected a sentence, got JSON; name the file"):
            load_facts(path)
    path.write_bytes(b"first\ncaf\xe9\n")
    with pytest.raises(
        ValueError, match=r"facts.txt, line 2: expected text in UTF-8, got the byte 0xe9, .*'caf'; save"
    ):
        load_facts(path)
    table = write(tmp_path / "facts.csv", "question,answer", "Is it?,yes")
    with pytest.raises(ValueError, match=r"facts.csv: expected JSON .*, or a sentence a line, got a table"):
        load_facts(table)


def test_an_id_may_be_a_number_or_left_out():
    given = [{"id": given, "sentences": ["s"]} for given in (None, 7, -1.5, "a", "nan", 10**900, None)]
    assert [fact.id for fact in load_facts(given)] == ["fact-1", "7", "-1.5", "a", "nan", str(10**900), "fact-7"]
    for bad in (float("nan"), float("inf"), 10**5000, True, b"a", " ", object()):
        with pytest.raises(ValueError, match="fact 1: expected 'id', a string that is not empty or a number, got "):
            load_facts([{"id": bad, "sentences": ["s"]}])


def test_facts_in_memory_are_checked_as_others_are():
    ask = Probe("It is", " so")
    fact = Fact("a", ("It is so.",), (ask,), "Is it?", ("no", "yes"), 1, (ask,))
    assert load_facts([fact])[0] is fact
    assert load_facts(iter([fact, "s"]))[1].id == "fact-2"
    for change, message in (
        ({"id": ""}, "expected 'id', a string"),
        ({"sentences": ()}, "expected 'sentences', a list"),
        ({"sentences": (" ",)}, "expected sentences that are not empty, got ' '"),
        ({"sentences": ("\0",)}, "expected text, got NUL"),
        ({"sentences": ("a \ud800",)}, "expected text, got half of a surrogate pair after 'a '"),
        ({"probes": (Probe("It is", ""),)}, "expected a probe with 'prompt' and 'target' strings, got Probe"),
        ({"paraphrases": (Probe("It is", " x" * 50_001),)}, "expected at most 100,000 characters, got 100,002"),
        ({"answer": 2}, "expected 'answer' to index one of 2 choices, got 2"),
    ):
        with pytest.raises(ValueError, match=f"fact 2: {message}"):
            load_facts(["s", replace(fact, **change)])


@pytest.mark.parametrize("source", [None, 3, {"sentences": ["It is so."]}, b"It is so.", Fact("a", ("s",))])
def test_what_is_no_list_of_facts_is_refused(source):
    with pytest.raises(ValueError, match="expected a file or a list of facts, got "):
        load_facts(source)


def test_there_are_a_million_facts_at_most(monkeypatch):
    monkeypatch.setattr("cir.data.facts.MOST_FACTS", 3)
    assert len(load_facts(["a", "b", "c"])) == 3
    with pytest.raises(ValueError, match="fact 4: expected at most 3 facts, got more"):
        load_facts("abcde"[i % 5] for i in itertools.count())


def test_a_limit_spreads_facts_evenly():
    facts = load_facts([f"Sentence {i}." for i in range(10)])
    picked = [facts.index(fact) for fact in evenly(facts, 5)]
    assert [later - earlier for earlier, later in itertools.pairwise(picked)] == [2] * 4
    assert evenly(facts, 5) == evenly(facts, 5)
    assert {facts.index(evenly(facts, 1, seed)[0]) for seed in range(60)} == set(range(10))
    assert evenly(facts, None) == evenly(facts, 99) == facts
    for bad in (0, -1, True, 1.5, "3"):
        with pytest.raises(ValueError, match="expected a limit of at least 1, got "):
            evenly(facts, bad)


@pytest.mark.parametrize("choices", [{"text": ["a", "b"], "label": ["A", "B"]}, "ab", [1, 2]])
def test_choices_are_a_list_of_strings(choices):
    item = {"question": "q", "choices": choices, "answer": 0, "sentences": ["s"]}
    with pytest.raises(ValueError, match="fact 1: expected 'choices', a list of strings, got"):
        load_facts([item])
