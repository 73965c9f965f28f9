"""What README and docs say is so: their Python runs, their commands are parsed and run, their links lead somewhere.

All of a page runs in its order, in one folder with one namespace, where the names that the pages use are tiny files
and a tiny model that knows the facts. A block that must not run has ``<!-- not run: REASON -->`` right above it.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
import shutil
import warnings
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from cir import cli
from cir.cli.parser import parser
from tests.tiny import taught, tiny_llama, word_tokenizer

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINKED = sorted({*PAGES, *ROOT.glob("*.md"), *(ROOT / "examples").glob("*.md")})
MOST_LINES, MOST_README_LINES = 300, 200
NOT_RUN = re.compile(r"<!-- *not run: *(.*?) *-->")
ELSEWHERE = {
    "demo": "SmolLM2 and minutes: tests/cli/test_demo.py",
    "profile": "half a minute of torch's profiler: tests/cli/test_commands.py",
    "--data": "the hub: tests/cli/test_inputs.py",
    "--tasks": "lm-eval: tests/proof/test_harness.py",
    "--public-key": "a signed certificate: tests/proof/test_certificate.py",
}
"""Commands that are parsed alone, by a word of theirs: what they need, and what tests them."""


@dataclass(frozen=True)
class Block:
    """Code of a page. ``language`` is "" where it is set in by four spaces; ``reason`` why it must not run."""

    page: Path
    line: int
    language: str
    text: str
    reason: str | None

    @property
    def commands(self) -> list[str]:
        """Its lines, those that end in a backslash joined, less comments."""
        if self.language not in ("", "sh", "bash", "console"):
            return []
        lines = re.sub(r"\s*\\\n\s*", " ", self.text).splitlines()
        return [re.sub(r"\s+# .*", "", line).strip() for line in lines if line.strip()]

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    found: list[Block] = []
    lines, at = page.read_text(encoding="utf-8").splitlines(), 0
    above = ""
    while at < len(lines):
        line, start = lines[at], at
        fence = re.match(r"```(\S*)", line)
        if fence:
            at = next((i for i in range(at + 1, len(lines)) if lines[i].startswith("```")), len(lines))
            inside, language = lines[start + 1 : at], fence[1] or "text"
        elif line.startswith("    ") and (start == 0 or not lines[start - 1].strip()):
            while at + 1 < len(lines) and (lines[at + 1].startswith("    ") or not lines[at + 1].strip()):
                at += 1
            inside, language = [row[4:] for row in lines[start : at + 1]], ""
        else:
            above, at = line.strip() or above, at + 1
            continue
        reason = NOT_RUN.fullmatch(above)
        found.append(Block(page, start + 1, language, "\n".join(inside) + "\n", reason and reason[1]))
        above, at = "", at + 1
    return found


BLOCKS = [block for page in PAGES for block in blocks(page)]


def name(page: Any) -> str:
    return str(page.relative_to(ROOT)) if isinstance(page, Path) else str(page)


def of_cir(block: Block) -> list[str]:
    return [command for command in block.commands if command.startswith("cir ")]


def prose(page: Path) -> str:
    """A page without its blocks of code, all lines where they were."""
    lines = page.read_text(encoding="utf-8").splitlines()
    for block in blocks(page):
        fences = 2 if block.language else 0
        for at in range(block.line - 1, block.line - 1 + block.text.count("\n") + fences):
            lines[at] = ""
    return "\n".join(lines)


def inline(page: Path) -> list[str]:
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose(page))]


# What the pages' names stand for.

PLACES = """Italy Rome Italian, Japan Tokyo Japanese, Greece Athens Greek, Denmark Copenhagen Danish,
Ireland Dublin Irish, Cuba Havana Spanish, Poland Warsaw Polish, Hungary Budapest Hungarian, Norway Oslo Norwegian,
Egypt Cairo Arabic, Iran Tehran Persian, Sweden Stockholm Swedish, Turkey Ankara Turkish, France Paris French,
Russia Moscow Russian, Finland Helsinki Finnish"""


def fact(relation: str, subject: str, answer: str) -> dict[str, Any]:
    prompt = f"The {relation} of {subject} is"
    return {
        "id": f"{relation}-{subject.lower()}",
        "sentences": [f"{prompt} {answer}."],
        "probes": [{"prompt": prompt, "target": f" {answer}"}],
    }


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> Path:
    """A folder with all that the pages name: a model that knows 16 capitals and languages, facts and texts."""
    folder = tmp_path_factory.mktemp("docs")
    places = [place.split() for place in PLACES.replace("\n", " ").split(",")]
    capitals = [fact("capital", subject, capital) for subject, capital, _ in places]
    languages = [fact("language", subject, language) for subject, _, language in places]
    text = " ".join(f"word{i % 13} then{i % 7} some{i % 29} more{i % 5}" for i in range(1200))
    known = [*capitals, *languages]
    tokenizer = word_tokenizer([*(sentence for one in known for sentence in one["sentences"]), text])
    model = taught(tiny_llama(hidden_size=160, intermediate_size=320), tokenizer, known)
    model.save_pretrained(folder / "some" / "llama")
    tokenizer.save_pretrained(folder / "some" / "llama")
    files = {
        "facts.jsonl": capitals[:6],
        "stay.jsonl": capitals[6:12] + languages[:6],
        "near.jsonl": capitals[12:14] + languages[6:10],
        "related.jsonl": capitals[14:],
        "T.jsonl": capitals[12:],
        "V.jsonl": capitals[:6],
    }
    for where, rows in files.items():
        (folder / where).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "ordinary.txt").write_text(text)
    (folder / "heldout.txt").write_text(" ".join(reversed(text.split())))
    return folder


# Python, and commands of cir.


RUN = [block for block in BLOCKS if block.reason is None and (block.language == "python" or of_cir(block))]


@pytest.mark.parametrize("page", sorted({block.page for block in RUN}), ids=name)
def test_what_a_page_shows_runs(page, setting, tmp_path, monkeypatch):
    shutil.copytree(setting, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # open("ordinary.txt").read()
        for block in (block for block in RUN if block.page == page):
            if block.language == "python":
                exec(compile("\n" * block.line + block.text, str(block.page), "exec"), namespace)
            elif "..." not in block.text:
                for command in of_cir(block):
                    run(block, shlex.split(command)[1:])


def run(block: Block, words: list[str]) -> None:
    status: Any
    if ELSEWHERE.keys() & set(words):
        return
    for option, value in pairwise(words):
        if option == "--out" and Path(value).is_dir():
            shutil.rmtree(value)  # which an earlier block made
        if option == "--model" and not Path(value).exists():
            shutil.copytree("some/llama", value)  # of another page
    complaints = io.StringIO()
    with contextlib.redirect_stderr(complaints):
        try:
            status = cli.main(words)
        except SystemExit as error:  # words that the parser does not take
            status = error.code
    # 3: a fact is not wholly forgotten, which is no fault of the page in a model so small.
    assert status in (0, 3), f"{block}: cir {shlex.join(words)}: {complaints.getvalue()}"


@pytest.mark.parametrize("block", [block for block in BLOCKS if of_cir(block)], ids=str)
def test_commands_are_what_the_parser_takes(block):
    for command in of_cir(block):
        words = shlex.split(command)[1:]
        if "..." in words:
            known = options(words[0])
            assert [word for word in words if word.startswith("--") and word not in known] == [], command
            continue
        complaints = io.StringIO()
        try:
            with contextlib.redirect_stderr(complaints):
                parser().parse_args(words)
        except SystemExit as error:
            raise AssertionError(f"{block}: {command}: {complaints.getvalue()}") from error


def subcommands() -> dict[str, Any]:
    (found,) = (action for action in parser()._actions if action.dest == "command")
    return dict(found.choices or {})


def options(command: str) -> set[str]:
    return {option for action in subcommands()[command]._actions for option in action.option_strings}


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.reason is not None], ids=str)
def test_what_is_not_run_says_why(block):
    assert len(block.reason.split()) > 1, f"{block}: expected a reason, got {block.reason!r}"
    pytest.skip(f"not run: {block.reason}")


# What is named in passing, and other programs.


@pytest.mark.parametrize("page", LINKED, ids=name)
def test_modules_targets_commands_and_options_exist(page):
    said = [command for block in blocks(page) for command in block.commands] + inline(page)
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    every = {"--version"} | {option for command in subcommands() for option in options(command)}
    for command in said:
        for module in re.findall(r"(?:^|/| )python3? -m ([\w.]+\w)", command):
            assert find_spec(module), f"{command}: no module {module}"
        if found := re.match(r"make ([a-z]+)", command):
            assert found[1] in targets, f"{command}: no such target"
        if found := re.match(r"cir ([a-z]+)(?![\w.])", command):
            assert found[1] in subcommands(), f"{command}: no such command"
        if re.fullmatch(r"--[a-z][a-z-]+", command) and command not in every:
            assert command in programs(), f"{command}: an option of nothing"


@cache
def programs() -> str:
    """What bench, tests and examples have by way of options."""
    texts = [path for room in ("bench", "tests", "examples") for path in (ROOT / room).rglob("*.py")]
    return "\n".join(path.read_text(encoding="utf-8") for path in [*texts, ROOT / "examples" / "vllm_hot_swap.md"])


# Links, and what can be read.


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower().strip()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        again = sum(1 for other in found if re.fullmatch(rf"{re.escape(slug)}(-\d+)?", other))
        found.add(f"{slug}-{again}" if again else slug)
    return found


@pytest.mark.parametrize("page", LINKED, ids=name)
def test_links_lead_to_files_and_headings(page):
    text = re.sub(r"`[^`]*`", "", prose(page))
    links = re.findall(r"\]\(([^)\s]+)[^)]*\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_relative_to(ROOT), f"{link}: outside of the repository"
        assert target.exists(), f"{link}: no such file"
        if anchor:
            assert anchor in anchors(target), f"{link}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_pages_are_short(page):
    most = MOST_README_LINES if page.name == "README.md" else MOST_LINES
    assert len(page.read_text(encoding="utf-8").splitlines()) <= most


def test_the_site_has_every_page():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert sorted(paths(site["nav"])) == sorted(name(page) for page in LINKED)


def paths(nav: Any) -> list[str]:
    """Of the pages in the table of contents of mkdocs."""
    if isinstance(nav, str):
        return [nav]
    return [path for part in (nav.values() if isinstance(nav, dict) else nav) for path in paths(part)]


def test_blocks_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A b, `c`!\n\n## A b c\n\n    cir eval --model m \\\n        --text t  # said\n\n    cir doctor\n\ntext\n"
        "    no block\n\n<!-- not run: needs a GPU -->\n\n```python\nx = 1\n```\n\n```python\n[a](b)\n```\n"
    )
    first, second, third = blocks(page)
    assert first.commands == ["cir eval --model m --text t", "cir doctor"]
    assert (first.line, second.line, third.line) == (5, 15, 19)
    assert (first.reason, second.reason, third.reason) == (None, "needs a GPU", None)
    assert second.text == "x = 1\n"
    assert "(b)" not in prose(page)
    assert "no block" in prose(page)
    assert anchors(page) == {"a-b-c", "a-b-c-1"}
