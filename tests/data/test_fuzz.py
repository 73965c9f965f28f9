"""Whatever is given to what reads facts, it is read or refused in a short sentence."""

from __future__ import annotations

import codecs
import gzip
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cir import load_facts
from cir.data.datasets import NAMES, load_data
from cir.system.files import strict_json
from tests.fuzz import examples

SUFFIXES = ("jsonl", "json", "JSONL", "ndjson", "txt", "gz", "jsonl.gz", "TXT.GZ", "csv", "parquet", "x")
FORMS = ("jsonl", "json", "list.json", "NDJSON", "jsonl.gz", "txt")
COLUMNS = (
    *("id", "sentences", "probes", "paraphrases", "prompt", "target", "question", "choices", "answer"),
    *("subject", "query", "src", "rephrase", "answers", "loc", "loc_ans", "paraphrased_question", "text"),
    *("requested_rewrite", "target_true", "str", "paraphrase_prompts", "neighborhood_prompts"),
)
MARKS = (
    b"",
    b"PK\x03\x04",
    b"PAR1\x15",
    b"ARROW1\0\0",
    b"\x1f\x8b",
    b"\xff\xfe",
    b"\xfe\xff",
    codecs.BOM_UTF8,
    b"GGUF\3",
)


def fuzzed(count: int):
    slow = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
    return settings(max_examples=examples(count), deadline=None, suppress_health_check=slow, database=None)


letters = st.one_of(st.characters(), st.sampled_from('\ud800\udfff\0\x07\r\n\u2028{}[]"\\_ [...]'))
texts = st.one_of(st.text(letters, max_size=12), st.sampled_from(("A is ___.", "{} is", "B", "nq question: ?", "Ä")))
huge = st.sampled_from((400, 1001, 5000)).map(lambda digits: 10**digits) | st.just("x").map(lambda x: x * 100_001)
scalars = st.one_of(st.none(), st.booleans(), st.integers(-3, 40), st.floats(), texts, texts, texts, huge)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.one_of(st.sampled_from(COLUMNS), texts), inner, max_size=6)
    ),
    max_leaves=12,
)
probes = st.lists(st.one_of(st.fixed_dictionaries({"prompt": texts, "target": texts}), values), max_size=2)
items = st.one_of(
    values,
    st.fixed_dictionaries(
        {"sentences": st.one_of(st.lists(texts, min_size=1, max_size=3), values)},
        optional={
            "id": scalars,
            "probes": st.one_of(probes, values),
            "paraphrases": st.one_of(probes, values),
            "question": scalars,
            "choices": st.one_of(st.lists(texts, max_size=3), values),
            "answer": scalars,
        },
    ),
)


@st.composite
def rows(draw):
    """A row with most of the columns that some data set has."""
    row = {name: draw(texts) for name in COLUMNS}
    row |= {name: draw(st.lists(texts, min_size=1, max_size=3)) for name in ("choices", "answers")}
    row |= {name: draw(st.lists(texts, min_size=1, max_size=2)) for name in ("sentences", *COLUMNS[-2:])}
    row["answer"] = draw(st.one_of(texts, st.integers(0, 2)))
    row["requested_rewrite"] = {"prompt": draw(texts), "subject": draw(texts), "target_true": {"str": draw(texts)}}
    row |= draw(st.dictionaries(st.sampled_from(COLUMNS), values, max_size=1))
    for name in draw(st.lists(st.sampled_from(COLUMNS), max_size=2)):
        row.pop(name, None)
    return row


def dumped(value) -> str:
    """As JSON, with NaN and all that Python writes; what it does not write is cut short."""
    try:
        return json.dumps(value)
    except (ValueError, RecursionError):
        return '{"sentences": ["' + "9" * 5000


@st.composite
def contents(draw) -> bytes:
    """Bytes of a file: of JSON, of text in some encoding, or of anything."""
    lines = draw(st.lists(st.one_of(items.map(dumped), texts), max_size=4))
    text = draw(st.sampled_from(("\n", "\r\n", "\r", " "))).join(lines)
    encoding = draw(st.sampled_from(("utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-16-le", "latin-1", "utf-32")))
    content = draw(st.one_of(st.binary(max_size=40), st.just(text.encode(encoding, "replace"))))
    return draw(st.sampled_from(MARKS)) + content if draw(st.integers(0, 3)) == 0 else content


def read(call, *arguments):
    """What ``call`` returns, or None where it refuses in a short sentence."""
    try:
        return call(*arguments)
    except (ValueError, FileNotFoundError) as error:
        said = str(error)
    assert said.isprintable(), repr(said)
    assert 10 < len(said) < 500
    return None


def check(facts) -> None:
    assert len({fact.id for fact in facts}) == len(facts)
    for fact in facts:
        said = [*fact.sentences, *(text for p in fact.probes + fact.paraphrases for text in (p.prompt, p.target))]
        assert fact.id.strip()
        assert fact.sentences
        assert all(isinstance(text, str) and text.strip() and "\0" not in text for text in said)
        json.dumps([fact.id, fact.question, fact.choices, said], ensure_ascii=False).encode()
    assert load_facts(facts) == list(facts)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_files(suffix, tmp_path):
    path = tmp_path / f"facts.{suffix}"

    @fuzzed(20)
    @given(
        contents(), st.sampled_from((suffix.lower().endswith("gz"),) * 4 + (True,)), st.sampled_from((None, None, 15))
    )
    def run(content, zipped, end):
        path.write_bytes(gzip.compress(content)[:end] if zipped else content)
        if (facts := read(load_facts, path)) is not None:
            check(facts)

    run()


@fuzzed(150)
@given(st.one_of(st.lists(items, max_size=3), values.filter(lambda value: not isinstance(value, str))))
def test_objects(source):
    if (facts := read(load_facts, source)) is not None:
        check(facts)


@pytest.mark.parametrize("name", NAMES)
def test_rows(name, tmp_path):
    @fuzzed(12)
    @given(st.lists(st.one_of(rows(), rows(), values), min_size=1, max_size=4), st.sampled_from(FORMS))
    def run(given_rows, form):
        text = dumped(given_rows) if form == "list.json" else "\n".join(map(dumped, given_rows))
        path = tmp_path / f"rows.{form}"
        path.write_bytes(gzip.compress(text.encode()) if form.endswith("gz") else text.encode())
        data = read(load_data, name, path)
        if data is not None and data.facts:
            check(data.facts + data.neighbours)
            read(data.split)

    run()


@fuzzed(150)
@given(st.one_of(values.map(dumped), texts, st.text(st.sampled_from('[]{}",:0123456789eE.-+NaInfity\\ud8'))))
def test_json(text):
    value = read(strict_json, "here", text)
    if value is not None:
        assert json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
