"""Files of text, and strict JSON."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
import zipfile

import pytest
import torch
from safetensors.torch import save

from cir import load_facts
from cir.cli.inputs import plain_text
from cir.data.datasets import load_data
from cir.system.files import brief, lines_of, looks_like_json, shown, strict_json, whole_text

LINE = '{"question": "Is it caf\u00e9?", "answer": "yes", "sentences": ["It is a caf\u00e9."]}\n'


def zipped(name: str) -> bytes:
    file = io.BytesIO()
    if name == "zip":
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("facts.jsonl", LINE)
    else:
        with tarfile.open(fileobj=file, mode="w") as archive:
            archive.addfile(tarfile.TarInfo("facts.jsonl"), io.BytesIO())
    return file.getvalue()


OTHERS = [
    (LINE.encode("utf-16"), "UTF-16; save it as UTF-8"),
    (LINE.encode("utf-16-le"), "UTF-16 or binary data; save it as UTF-8"),
    (LINE.encode("utf-32"), "UTF-32; save it as UTF-8"),
    (gzip.compress(LINE.encode()), "gzip; have its name end in .gz"),
    (zipped("zip"), "zip; unpack it first"),
    (zipped("tar"), "tar; unpack it first"),
    (b"PAR1\x15\x04\x15\x20", "parquet; write its rows out as JSON, an object a line"),
    (b"ARROW1\0\0\xff\xff", "arrow; write its rows out"),
    (b"\xff\xff\xff\xff\x10\0\0\0", "arrow; write its rows out"),
    (save({"w": torch.zeros(2)}), "safetensors, the weights of a model; give text"),
    (b"GGUF\3\0\0\0", "GGUF, the weights of a model; give text"),
    (b"%PDF-1.7\n", "PDF; give text"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer; fetch what it stands for"),
]
READERS = {
    "load_facts": load_facts,
    "a data set": lambda path: load_data("tofu", path),
    "plain_text": lambda path: plain_text(path, "retain"),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(("content", "got"), OTHERS, ids=[got.split(";")[0] for _, got in OTHERS])
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.jsonl.gz"])
def test_what_is_no_text_is_refused_by_what_it_is(reader, content, got, name, tmp_path):
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    with pytest.raises(ValueError, match=rf"{name}: expected text in UTF-8, got {got}"):
        READERS[reader](path)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(("name", "end"), [("a.jsonl", "\n"), ("a.txt", "\r\n"), ("a.jsonl.gz", "\n")])
def test_the_line_of_another_encoding_is_named(reader, name, end, tmp_path):
    for content, got in ((LINE.encode("latin-1"), "the byte 0xe9"), (b"nothing \0", "NUL")):
        lines = b"".join(
            line + end.encode() for line in (LINE.encode().strip(), LINE.encode().strip(), content.strip())
        )
        (tmp_path / name).write_bytes(gzip.compress(lines) if name.endswith(".gz") else lines)
        with pytest.raises(ValueError, match=rf"{name}, line [13]: expected .*, got ({got}.* after|JSON)"):
            READERS[reader](tmp_path / name)


def test_files_that_are_none_are_named(tmp_path):
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "file").write_text("x\n")
    for path, got in (
        (tmp_path / "folder.jsonl", r"folder.jsonl: expected a file, got a folder"),
        (tmp_path / "file" / "x", "expected a file, got Not a directory"),
        (tmp_path / ("x" * 300), "expected a file, got File name too long"),
        (tmp_path / "a\0b", "expected a file, got a name that no file has"),
        (tmp_path / "a\ud800", "expected a file, got a name that no file has"),
    ):
        with pytest.raises(ValueError, match=got):
            load_facts(path)
    (tmp_path / "a.gz").write_bytes(b"plain\n")
    with pytest.raises(
        ValueError, match=r"a.gz: expected gzip, as its name ends in .gz, got what does not begin as it"
    ):
        load_facts(tmp_path / "a.gz")
    content = gzip.compress(b"".join(f"sentence {i}\n".encode() for i in range(9)))
    for broken in (content[:-9], content[:-8] + b"\0" * 8, content + b"more"):
        (tmp_path / "a.gz").write_bytes(broken)
        with pytest.raises(ValueError, match=r"a.gz, after line \d: expected gzip, got "):
            list(lines_of(tmp_path / "a.gz"))


def test_lines_end_as_anywhere_and_lose_the_mark(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n\xe2\x80\xa8four")
    assert list(lines_of(path)) == ["one\n", "two\n", "three\n", "\u2028four"]
    path.write_bytes(b"PAR1 is a receptor.\n")
    assert list(lines_of(path)) == ["PAR1 is a receptor.\n"]


class Endless(io.RawIOBase):
    """One line that does not end, of which no more may be read than is needed."""

    def __init__(self) -> None:
        self.given = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        buffer[:] = b"x" * len(buffer)
        self.given += len(buffer)
        assert self.given < 2**22
        return len(buffer)


def test_an_enormous_line_is_not_read_whole(monkeypatch, tmp_path):
    endless = Endless()
    monkeypatch.setattr("cir.system.files._opened", lambda path: io.BufferedReader(endless))
    with pytest.raises(ValueError, match=r"a.jsonl, line 1: expected at most 1,048,576 characters a line, got more"):
        load_facts(tmp_path / "a.jsonl")
    assert endless.given > 2**20


def test_lines_and_texts_are_bounded(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("12345\n12345\n1234")
    assert list(lines_of(path, 5)) == ["12345\n", "12345\n", "1234"]
    assert whole_text(path, 16) == "12345\n12345\n1234"
    with pytest.raises(ValueError, match=r"a.txt, line 1: expected at most 4 characters a line, got more: '12345'"):
        list(lines_of(path, 4))
    with pytest.raises(ValueError, match=r"a.txt: expected at most 15 characters, got more; give a part of it"):
        whole_text(path, 15)


@pytest.mark.parametrize(
    ("text", "got"),
    [
        ("NaN", "NaN, which is no number"),
        ('{"NaN": [1, -Infinity]}', "-Infinity, which is no number"),
        ('{"a": Infinity}', "Infinity, which is no number"),
        ("[1e999]", "the number 1e999, which is too large"),
        ("[-" + "1" * 5000 + "]", "an integer of 5,001 digits, more than 1,000"),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "an object with 'c' twice"),
        ('["\\ud800"]', r"half of a surrogate pair in '\ud800'"),
        ('{"\\udfff": 1}', r"half of a surrogate pair in '\udfff'"),
        ('["\ud800"]', r"half of a surrogate pair in '\ud800'"),
        ("[" * 100_000, "more than 100 brackets within brackets"),
        ("[" * 101 + "]" * 101, "more than 100 brackets within brackets"),
        ('{"a":' * 101 + "1" + "}" * 101, "more than 100 brackets within brackets"),
        ("", "'': Expecting value"),
        ("{'a': 1}", "\"{'a': 1}\": Expecting property name"),
        ("1 2", "'1 2': Extra data"),
        ('"\t"', r"Invalid control character"),
    ],
)
def test_json_is_strict(text, got):
    with pytest.raises(ValueError, match=r"^here: expected JSON, got ") as error:
        strict_json("here", text)
    assert got in str(error.value)
    assert len(str(error.value)) < 250
    assert str(error.value).isprintable()


def test_json_that_is_right_is_read():
    text = json.dumps({"a": [1.5, -3, 10**900, True, None], "b": "caf\u00e9 \U0001f600\0", "NaN": "Infinity"})
    assert strict_json("here", text) == json.loads(text)
    assert strict_json("here", "[" * 100 + "]" * 100)
    assert strict_json("here", "[" + ",".join(["[{}]"] * 500) + "]")


def test_the_line_is_named_in_json_of_several():
    for text, got in (
        ('[\n{"a": "NaN"},\n{"a": NaN}\n]', "NaN, which is no number of JSON in line 3"),
        ('[\n"\\"\\ud83d\\ude00",\n"\\ude00"\n]', "half of a surrogate pair in '.ude00' in line 3"),
        ("[1,\n2\n3]", r"line 3 column 1"),
    ):
        with pytest.raises(ValueError, match=got):
            strict_json("here", text)


def test_json_is_seen_at_the_first_line():
    deep = '{"a":' * 5000 + "1" + "}" * 5000
    for line in ('{"a": 1}', ' {"a": NaN}\n', '[{"a": 1}, 2]', "[", "{\n", deep, '{"a": ' + "1" * 5000 + "}"):
        assert looks_like_json(line)
    for line in ("{not} a sentence", "[1]", "[sic] he said", "a {", "", '"a"', "[[1]]"):
        assert not looks_like_json(line)


def test_what_is_quoted_is_short_and_printable():
    endless: list = []
    endless.append(endless)
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    for value in ("x" * 10**6, "\0\n\ud800", deep, endless, 10**5000, {"a": [b"\0"] * 1000}, None):
        assert len(shown(value)) <= 80
        assert shown(value).isprintable()
    assert brief("a\nb\x1b[0m") == "a b?[0m"
    assert brief("x" * 100) == "x" * 77 + "..."
