from __future__ import annotations

import gzip
import json

import pytest
import torch

from cir import Fact, Probe, load_facts
from cir.data.facts import check_contrast, probed
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
        (["{not json"], "line 1: expected one JSON object a line"),
        ([{"sentences": ["ok"]}, {"sentences": []}], r"line 2: expected 'sentences'.*got \[\]"),
        ([{"sentences": "one string"}], "line 1: expected 'sentences', a list"),
        ([{"sentences": ["ok", "  "]}], "line 1: expected sentences that are not empty, got '  '"),
        ([{"sentences": ["ok"], "probes": [{"prompt": "p"}]}], "line 1: expected a probe with 'prompt' and 'target'"),
        ([{"sentences": ["ok"], "probes": [{"prompt": "p", "target": ""}]}], "line 1: expected a probe"),
        ([{"sentences": ["ok"], "choices": ["x"], "answer": 3}], "line 1: expected 'answer' to index one of 1"),
        ([{"id": "a", "sentences": ["ok"]}, {"id": "a", "sentences": ["ok"]}], "line 2: expected an id of its own"),
        (["17"], "line 1: expected an object or a sentence, got int"),
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
    with pytest.raises(ValueError, match="fact 'long': expected sentences of 3 to 16 tokens, got 21"):
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
    path.write_bytes(b"first\ncaf\xe9\n")
    with pytest.raises(ValueError, match=r"facts.txt, after line \d: expected text in UTF-8, got 'utf-8' codec"):
        load_facts(path)
    zipped = tmp_path / "facts.jsonl.gz"
    zipped.write_bytes(b"no gzip")
    with pytest.raises(ValueError, match=r"facts.jsonl.gz, after line 0: expected text in UTF-8, got Not a gzipped"):
        load_facts(zipped)


@pytest.mark.parametrize("choices", [{"text": ["a", "b"], "label": ["A", "B"]}, "ab", [1, 2]])
def test_choices_are_a_list_of_strings(choices):
    item = {"question": "q", "choices": choices, "answer": 0, "sentences": ["s"]}
    with pytest.raises(ValueError, match="fact 1: expected 'choices', a list of strings, got"):
        load_facts([item])
