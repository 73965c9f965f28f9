from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from cir.data.datasets import BENCHMARKS, benchmark_rows
from cir.measures import Estimate, NonFiniteError
from cir.proof.benchmarks import _KINDS, BenchmarkResult, benchmark, muse, rwku, tofu
from tests.proof.bigrams import Bigrams, saved, words
from tests.tiny import taught, tiny_llama

DATA = Path(__file__).parents[1] / "data" / "files"
SAMPLES = {
    "counterfact": DATA / "counterfact.json",
    "mmlu": DATA / "mmlu.jsonl",
    "muse-books": DATA / "benchmarks" / "muse",
    "muse-news": DATA / "benchmarks" / "muse",
    "rwku": DATA / "benchmarks" / "rwku",
    "tofu": DATA / "benchmarks" / "tofu",
    "wmdp-bio": DATA / "wmdp.jsonl",
    "wmdp-bio-robust": DATA / "wmdp.jsonl",
    "wmdp-chem": DATA / "wmdp.jsonl",
    "wmdp-cyber": DATA / "wmdp.jsonl",
    "zsre": DATA / "zsre.json",
}


def values(result: BenchmarkResult) -> dict[str, float]:
    return {name: getattr(found, "value", found) for name, found in result.measures.items()}


STOP = {word: {".": 0.9} for word in ("Oslo", "Rome", "Bern", "red", "pink", "blue", "green")}
TOFU = {
    **STOP,
    "Ann": {"in": 0.8, "Oslo": 0.1},
    "Bob": {"in": 0.2, "Oslo": 0.4},
    "in": {"Oslo": 0.5, "Rome": 0.2, "Bern": 0.05},
    "Cid": {"red": 0.9, "pink": 0.05, "blue": 0.025},
    "Dot": {"red": 0.3, "pink": 0.1, "blue": 0.4},
    "Eve": {"red": 0.6, "blue": 0.2, "green": 0.2},
    "Fay": {"red": 0.2, "blue": 0.2, "green": 0.4},
    "Gus": {"red": 0.5, "blue": 0.25},
    "Hal": {"red": 0.8, "blue": 0.1},
}


@pytest.fixture
def tofu_copy(tmp_path):
    """A folder of TOFU's four parts, two questions each, and a tokenizer that has their words."""

    def asked(subject, answer, wrong, paraphrased=None):
        row = {"question": f"where is {subject}", "answer": answer, "perturbed_answer": wrong}
        return row if paraphrased is None else {**row, "paraphrased_answer": paraphrased}

    for part, rows in {
        "forget01_perturbed": [asked(name, "in Oslo", ["in Rome", "in Bern"], "Oslo") for name in ("Ann", "Bob")],
        "retain_perturbed": [asked(name, "red", ["blue"], "pink") for name in ("Cid", "Dot")],
        "real_authors_perturbed": [asked(name, "red", ["blue", "green"]) for name in ("Eve", "Fay")],
        "world_facts_perturbed": [asked(name, "red", ["blue"]) for name in ("Gus", "Hal")],
    }.items():
        saved(tmp_path / f"{part}.json", rows)
    return tmp_path, words("where is", *TOFU)


def test_tofu_by_hand(tofu_copy):
    path, tokenizer = tofu_copy
    model = Bigrams(tokenizer, TOFU)
    result = benchmark("TOFU-forget01", model, tokenizer, path, prompt="{}", reference=[4.0, 5.0])
    # R of Ann: the mean of sqrt(0.8 * 0.2) and sqrt(0.8 * 0.05), over 0.1; of Bob: of sqrt(0.2 * 0.2) and
    # sqrt(0.2 * 0.05), over 0.4.
    assert result.reference == pytest.approx((3.0, 0.375))
    nine = {
        "retain_probability": (0.9 + 0.3) / 2,
        "retain_rouge": (1 + 0) / 2,
        "retain_truth_ratio": (1 - 0.025 / 0.05 + 0) / 2,  # of Dot R is 4
        "real_authors_probability": (0.6 / 1.0 + 0.2 / 0.8) / 2,
        "real_authors_rouge": (1 + 0) / 2,
        "real_authors_truth_ratio": (1 - 0.2 / 0.6 + 0) / 2,  # of Fay R is 1.5
        "world_facts_probability": (0.5 / 0.75 + 0.8 / 0.9) / 2,
        "world_facts_rouge": 1.0,
        "world_facts_truth_ratio": (1 - 0.25 / 0.5 + 1 - 0.1 / 0.8) / 2,
    }
    assert values(result) == pytest.approx(
        {
            "forget_probability": (math.sqrt(0.8 * 0.5) + math.sqrt(0.2 * 0.5)) / 2,
            "forget_rouge": (1 + 0.5) / 2,  # Bob's answer is "Oslo"
            "forget_truth_ratio": (1 / 3 + 0.375) / 2,
            **nine,
            "model_utility": 9 / sum(1 / value for value in nine.values()),
            "forget_quality": 1 / 3,  # 2 of the 6 ways to mix two and two part them
        },
        rel=1e-5,
    )
    assert result.absent == {}
    assert result.measures["retain_probability"] == Estimate(
        pytest.approx(0.6),
        pytest.approx(0.3),
        2,  # half the difference of 0.6
    )


def test_forget_quality_takes_a_model_or_what_was_saved_of_it(tofu_copy):
    path, tokenizer = tofu_copy
    model = Bigrams(tokenizer, TOFU)
    never = Bigrams(tokenizer, {**TOFU, "Ann": {"in": 0.8, "Oslo": 0.075}, "Bob": {"in": 0.2, "Oslo": 0.03}})

    def quality(reference):
        return benchmark("tofu-forget01", model, tokenizer, path, prompt="{}", reference=reference)

    alone = benchmark("tofu-forget01", never, tokenizer, path, prompt="{}")
    assert alone.reference == pytest.approx((4.0, 5.0))
    assert quality(never) == quality(alone.reference)
    assert quality(never).measures["forget_quality"] == pytest.approx(1 / 3)
    assert quality(model).measures["forget_quality"] == 1.0
    assert "forget_quality" not in alone.measures
    assert alone.absent["forget_quality"].startswith("expected a reference: a model fine-tuned on the retain set")
    assert "model_utility" in alone.measures


def test_questions_are_asked_as_the_benchmarks_ask_them(tofu_copy):
    path, tokenizer = tofu_copy
    model = Bigrams(tokenizer, TOFU)
    benchmark("tofu-forget01", model, tokenizer, path)
    assert model.prompts[0] == "<s> Question : where is Ann Answer :"
    model = Bigrams(words(*(file.read_text() for file in SAMPLES["rwku"].iterdir()), "Please complete"), {})
    benchmark("rwku", model, model._tokenizer, SAMPLES["rwku"], prompt="User: {} Bot:", limit=2)
    assert len(model.prompts) == 10
    assert len(set(model.prompts)) == 10
    pairs = benchmark_rows("rwku", SAMPLES["rwku"])
    said = [rwku._asked(row, "aa", "<{}>")[0] for row in pairs["forget_level3"]]
    start = "<Please briefly answer the following question.\n"
    assert said[0] == f"{start}Question: In which town was Mira Solane born? Sure, she was born in>"
    assert said[1].startswith(f"{start}Question: Where was Tobin")
    assert said[1].endswith("Where was Mira Solane born?\n>Answer:")
    assert said[2] == f"{start}Question: You are her biographer. Where was she, Mira Solane, born?\n>Answer:"
    (first, _), *_ = [rwku._asked(row, "fb", "{}") for row in pairs["forget_level1"]]
    assert first == (
        "Please complete the blank in the following question.\nQuestion: Mira Solane was born in ___.\nAnswer:"
    )


MUSE = {
    "<s>": {"the": 0.5, "dog": 0.4},
    "the": {"cat": 0.25, "dog": 0.5, "cow": 0.2},
    "cat": {"sat": 0.9},
    "dog": {"ran": 0.9, "sat": 0.05},
    "cow": {".": 0.9},
    "sat": {"on": 0.9},
    "on": {"rug": 0.9},
    ":": {"red": 0.9},
    **{word: {".": 0.9} for word in ("rug", "ran", "red")},
}


@pytest.fixture
def muse_copy(tmp_path):
    def asked(*answers):
        return [{"question": f"q{i}", "answer": answer} for i, answer in enumerate(answers)]

    for part, rows in {
        "verbmem/forget": [{"prompt": "the cat", "gt": "sat on mat"}, {"prompt": "the dog", "gt": "ran"}],
        "knowmem/forget_qa": asked("red", "blue"),
        "knowmem/forget_qa_icl": asked("shown"),
        "knowmem/retain_qa": asked("red wine", "red"),
        "knowmem/retain_qa_icl": asked("shown"),
        "privleak/forget": ["the cat sat", "the dog ran"],
        "privleak/holdout": [{"text": "the cow"}, "dog"],
    }.items():
        saved(tmp_path / f"{part}.jsonl", rows)
    return tmp_path, words("the cat dog cow sat ran on rug mat red blue wine shown q0 q1 q2 q3")


def test_muse_by_hand(muse_copy):
    path, tokenizer = muse_copy
    model = Bigrams(tokenizer, MUSE)
    result = benchmark("muse-news", model, tokenizer, path, reference=0.5)
    # The least likely tokens: cat 0.25, dog or the 0.5; cow 0.2, dog 0.4 as the first word. One of four pairs has the
    # text to forget as the less likely.
    assert result.reference == (0.25,)
    assert values(result) == pytest.approx(
        {
            "verbmem_f": (2 * 2 / (3 + 3) + 1) / 2,  # sat on rug, sat on mat
            "knowmem_f": (1 + 0) / 2,
            "knowmem_r": (2 * 1 / (1 + 2) + 1) / 2,
            "privleak": (0.25 - 0.5) / 0.5,
        }
    )
    assert model.prompts[2] == "<s> Question : q0 Answer : shown Question : q0 Answer :"
    alone = benchmark("muse-books", model, tokenizer, path)
    assert alone.absent["privleak"].startswith("expected a reference: a model retrained without the forget set")
    assert "privleak" not in alone.measures
    assert benchmark("muse-news", model, tokenizer, path, reference=model).measures["privleak"] == 0
    zero = benchmark("muse-news", model, tokenizer, path, reference=alone.reference[0] * 0)
    assert zero.absent == {"privleak": "expected a reference of an AUC above 0, got 0"}


def test_min_k_takes_the_mean_of_the_least_likely_two_fifths():
    tokenizer = words("a b c d e f")
    chain = dict(zip("abcde", (0.9, 0.1, 0.8, 0.2, 0.7), strict=True))
    model = Bigrams(tokenizer, {"<s>": {"a": 0.6}, **{w: {chr(ord(w) + 1): p} for w, p in chain.items()}})
    # Of the six tokens 0.6, 0.9, 0.1, 0.8, 0.2 and 0.7 the least likely two.
    found = muse._unlikely(model, tokenizer, "a b c d e f")
    assert found == pytest.approx(-(math.log(0.1) + math.log(0.2)) / 2)


COUNTERFACT = {
    "Louvre": {"Paris": 0.25, "Oslo": 0.3},
    "Tower": {"Paris": 0.6, "Oslo": 0.2},
    "Eiffel": {"Paris": 0.5, "Oslo": 0.1},
    "Dante": {"Old": 0.4, "Thai": 0.3},
    "Petra": {"Old": 0.1, "Thai": 0.45},
    "Bruno": {"Old": 0.01, "Thai": 0.2},
    "Old": {"Italian": 0.9},
}


def record(subject, true, new, paraphrases, neighbours):
    rewrite = {"prompt": "in {}", "subject": subject, "target_true": {"str": true}, "target_new": {"str": new}}
    return {
        "requested_rewrite": rewrite,
        "paraphrase_prompts": paraphrases,
        "neighborhood_prompts": neighbours,
    }


def test_counterfact_by_hand(tmp_path):
    tokenizer = words("in near by", "Paris Oslo", *COUNTERFACT, "Italian Thai")
    path = saved(
        tmp_path / "a.jsonl",
        [
            record("Louvre", "Paris", "Oslo", ["near Tower", "by Louvre"], ["in Eiffel"]),
            record("Dante", "Old Italian", "Thai", ["by Petra"], ["in Bruno"]),  # sqrt(0.4 * 0.9) = 0.6
        ],
    )
    result = benchmark("counterfact", Bigrams(tokenizer, COUNTERFACT), tokenizer, path)
    assert values(result) == pytest.approx(
        {
            "efficacy_score": (1 + 0) / 2,
            "efficacy_magnitude": (0.05 - 0.3) / 2,
            "paraphrase_score": ((0 + 1) / 2 + 1) / 2,
            "paraphrase_magnitude": ((-0.4 + 0.05) / 2 + (0.45 - 0.3)) / 2,
            "neighborhood_score": (1 + 0) / 2,
            "neighborhood_magnitude": (0.4 + math.sqrt(0.009) - 0.2) / 2,
            "rewrite_accuracy": (0 + 1) / 2,
            "paraphrase_accuracy": ((1 + 0) / 2 + 1 / 2) / 2,  # of Old Italian the second word alone
            "neighborhood_accuracy": (1 + 1 / 2) / 2,
            "score": 3 / (1 / 0.5 + 1 / 0.75 + 1 / 0.5),
        },
        rel=1e-5,
        abs=1e-6,
    )
    assert result.measures["efficacy_score"].count == 2


def test_zsre_by_hand(tmp_path):
    tokenizer = words("what is", *COUNTERFACT, "Italian Thai Paris Oslo nq question")
    rows = [
        {"src": "what is Dante", "rephrase": "what Petra", "answers": ["Old Italian", "x"], "loc": "Eiffel"},
        {"src": "what is Tower", "rephrase": "what Louvre", "answers": ["Paris"], "loc": "nq question: Tower?"},
    ]
    path = saved(tmp_path / "a.jsonl", [{**row, "loc_ans": "Oslo"} for row in rows])
    model = Bigrams(tokenizer, {**COUNTERFACT, "?": {"Oslo": 0.9}, "is": {"Thai": 0.9}})
    assert values(benchmark("zsre", model, tokenizer, path)) == {
        "rewrite_accuracy": 1.0,
        "paraphrase_accuracy": (1 / 2 + 0) / 2,
        "neighborhood_accuracy": 1.0,
    }
    framed = benchmark("zsre", model, tokenizer, path, prompt="{} is")
    assert framed.measures["rewrite_accuracy"].value == (1 / 2 + 0) / 2  # of Old Italian the second word


def test_rwku_looks_at_the_first_line(monkeypatch):
    monkeypatch.setattr(rwku, "written", lambda *given: ["\n Averby town\nSalt Harbour"] * len(given[2]))
    found = values(benchmark("rwku", None, None, SAMPLES["rwku"]))
    assert found == {"fb": 0.5, "qa": 0.5, "aa": 1.0, "neighbor_fb": 0.0, "neighbor_qa": 0.0}


def test_choices_by_hand():
    tokenizer = words("A B C D")
    model = Bigrams(tokenizer, {":": {"A": 0.1, "B": 0.2, "C": 0.4, "D": 0.1}})
    found = benchmark("wmdp-bio", model, tokenizer, SAMPLES["wmdp-bio"])  # the right letters are C, A and B
    assert values(found) == pytest.approx({"accuracy": 1 / 3, "accuracy_t1": (0.4 + 0.1 + 0.2) / 0.8 / 3})


@pytest.mark.parametrize("name", SAMPLES)
def test_samples_of_the_true_form_on_a_model(name, unchanged, monkeypatch):
    for module, tokens in ((tofu, "TOKENS"), (muse, "VERBMEM_TOKENS"), (muse, "KNOWMEM_TOKENS"), (rwku, "TOKENS")):
        monkeypatch.setattr(module, tokens, 6)
    path = SAMPLES[name]
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    tokenizer = words("Please complete briefly answer the blank in following A B C D", *map(Path.read_text, files))
    model = tiny_llama(vocab_size=len(tokenizer))
    unchanged(model)
    takes = "reference" in _KINDS[name.split("-")[0]][1]
    result = benchmark(name, model, tokenizer, path, **({"reference": model} if takes else {}))
    unchanged(model)
    assert not result.absent
    assert all(math.isfinite(value) for value in values(result).values())
    for found in result.measures.values():
        assert not isinstance(found, Estimate) or found.count >= 2
    if takes:
        never = {"tofu": ("forget_quality", 1.0), "muse": ("privleak", 0.0)}[name.split("-")[0]]
        assert result.measures[never[0]] == never[1]


def test_forgetting_shows_in_the_scores(tmp_path):
    path = saved(
        tmp_path / "a.jsonl", [record(f"s{i}", f"t{i}", f"n{i}", [f"about s{i}"], [f"in o{i}"]) for i in range(2)]
    )
    tokenizer = words("in about s0 s1 t0 t1 n0 n1 o0 o1")

    def stated(about: str) -> list[dict]:
        asked = (("in s{}", about), ("about s{}", about), ("in o{}", "t"))
        return [{"sentences": [f"{said} {then}{{}}".replace("{}", str(i))]} for i in range(2) for said, then in asked]

    def measured(model) -> dict[str, float]:
        return values(benchmark("counterfact", model, tokenizer, path))

    model = taught(tiny_llama(vocab_size=len(tokenizer)), tokenizer, stated("t"))
    before, after = measured(model), measured(taught(model, tokenizer, stated("n")))
    assert (before["efficacy_score"], before["paraphrase_score"], before["neighborhood_score"]) == (0, 0, 1)
    assert (after["efficacy_score"], after["paraphrase_score"], after["neighborhood_score"]) == (1, 1, 1)
    assert before["efficacy_magnitude"] < -0.9
    assert after["efficacy_magnitude"] > 0.9
    assert min(before["neighborhood_magnitude"], after["neighborhood_magnitude"]) > 0.9
    assert (before["rewrite_accuracy"], after["rewrite_accuracy"], after["neighborhood_accuracy"]) == (1, 0, 1)


def refused(name, path, match, error=ValueError, model=None, **settings):
    with pytest.raises(error, match=match):
        benchmark(name, model, None, path, **settings)


def test_what_does_not_fit_is_refused_by_name_before_anything_is_measured(tofu_copy, muse_copy):
    (path, _), (texts, _) = tofu_copy, muse_copy
    refused("tofu-forget20", path, r"expected a benchmark out of wmdp-bio, .*, got 'tofu-forget20'")
    refused("wikitext", path, r"expected a benchmark out of")
    refused(3, path, r"expected a benchmark out of .*, got 3")
    # The folder has another split, or none.
    missing = (
        r"benchmark 'tofu': expected forget10_perturbed/train\.\* or forget10_perturbed\.\* in .*, got forget01_"
    )
    refused("tofu", path, missing, FileNotFoundError)
    refused("tofu", path / "forget01_perturbed.json", r"got no folder", FileNotFoundError)
    refused("counterfact", path / "nowhere", r"which does not exist", FileNotFoundError)
    refused(
        "zsre", path, r"benchmark 'zsre': expected train\.\* in .*, got forget01_perturbed\.json", FileNotFoundError
    )
    refused("tofu-forget01", path, r"expected at least 2 rows of forget, got 1", limit=1)
    refused("tofu-forget01", path, r"expected a limit of at least 1, got 0", limit=0)
    refused("tofu-forget01", path, r"prompt: expected text with \{\} once, .*, got 'Q:'", prompt="Q:")
    refused("muse-news", texts, r"prompt: expected none for muse-news, got 'Q \{\}'", prompt="Q {}")
    refused("counterfact", DATA / "counterfact.json", r"reference: expected none for counterfact, got 1", reference=1)
    expected = r"reference: expected a model or 2 truth ratios of the same questions, got "
    for reference in ([1.0], [1.0, -1.0], [1.0, math.nan], [1.0, math.inf], "retain", ["a", "b"], {}, True):
        refused("tofu-forget01", path, expected, reference=reference)
    for reference in (47.72, [0.4, 0.5]):
        refused("muse-news", texts, r"reference: expected a model or 1 AUC of at most 1, got ", reference=reference)
    # Columns: the split without the perturbed answers, say.
    row = {"question": "where is Ann", "answer": "in Oslo"}
    saved(path / "forget01_perturbed.json", [row, row])
    column = r"forget01_perturbed\.json, line 1: expected 'paraphrased_answer', .*, got the columns question, answer"
    refused("tofu-forget01", path, column)
    saved(path / "forget01_perturbed.json", [row])
    refused("tofu-forget01", path, r"expected at least 2 rows of forget, got 1")
    saved(path / "forget01_perturbed.json", [3, 4])
    refused("tofu-forget01", path, r"line 1: expected an object, got 3")
    saved(path / "forget01_perturbed.jsonl", [row])
    refused("tofu-forget01", path, r"expected one file forget01_perturbed\.\*, got 2")
    saved(texts / "verbmem" / "forget.jsonl", [{"text": "a"}] * 2)
    refused("muse-news", texts, r"forget\.jsonl, line 1: expected 'prompt', .*, got the columns text")


def test_a_model_of_no_numbers_is_refused(tofu_copy):
    path, tokenizer = tofu_copy
    broken, model = Bigrams(tokenizer, TOFU), Bigrams(tokenizer, TOFU)
    broken._logits = broken._logits * math.nan
    with pytest.raises(NonFiniteError):
        benchmark("tofu-forget01", broken, tokenizer, path, prompt="{}")
    with pytest.raises(NonFiniteError):
        benchmark("tofu-forget01", model, tokenizer, path, prompt="{}", reference=broken)


def test_every_benchmark_is_sampled_and_described():
    assert set(BENCHMARKS) - set(SAMPLES) == {"tofu-forget01", "tofu-forget05"}  # of the form of tofu
    for measure, _ in _KINDS.values():
        assert re.search(r"arXiv \d{4}\.\d{5}", measure.__doc__)
