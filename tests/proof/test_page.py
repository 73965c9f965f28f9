from __future__ import annotations

import html
import re
import shlex
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from cir.cli.parser import parser
from cir.proof.figures import interval_of, percent, value_of
from cir.proof.page import command, page
from cir.proof.stated import check_content
from cir.proof.verdict import judge
from tests.proof.stating import failed, forgotten, stating

VOID = {"meta"}
"""Tags without an end."""
CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)


class Page(HTMLParser):
    """A page as it is read: its text, tags with attributes, rows of tables, and what is not well formed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.text, self.wrong, self._open = "", list[str](), list[str]()
        self.feed(text)
        self.close()
        self.wrong += self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self._open or self._open.pop() != tag:
            self.wrong.append(f"/{tag}")

    def handle_data(self, data: str) -> None:
        data = data.replace("\N{NO-BREAK SPACE}", " ")
        self.text += data
        if self._open and self._open[-1] in ("td", "th"):
            self.rows[-1][-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.mark.parametrize("content", [failed(), forgotten(), stating(), stating(units=1)])
def test_a_page_is_well_formed_and_asks_nothing_of_the_net(content):
    check_content(content)
    said = page(content)
    read = Page(said)
    assert read.wrong == []
    assert [attributes["lang"] for attributes in read.all("html")] == ["en"]
    assert re.findall(r"https?://[^\"'\s)]*|//[a-z]+\.", said) == ["http://www.w3.org/2000/svg"] * len(
        read.all("svg")
    )
    assert not {tag for tag, _ in read.tags} & {"script", "link", "img", "iframe", "object", "image", "use", "a"}
    assert not re.search(r"@import|url\(|\son\w+=|javascript:", said)
    ids = [str(attributes["id"]) for _, attributes in read.tags if "id" in attributes]
    assert len(ids) == len({*ids})


def test_the_verdict_comes_first_and_is_the_title():
    said = page(failed())
    heading = "Partly forgotten; comes back under fine-tuning"
    assert f"<title>{heading}: " in said
    assert re.search(rf'<h1 class="bad">{heading}</h1>', said)
    assert re.search(r'<h1 class="good">Forgotten, and the rest kept</h1>', page(forgotten()))
    assert re.search(r'<h1 class="open">Forgotten as asked; not shown: ', page(stating(recall=(0.6, 0.001))))
    rows = Page(said).rows
    for row, claim in zip(rows[1:], judge(failed()).claims, strict=False):
        assert row[0] == claim.title
        assert row[1].endswith(f" {claim.word}")
        assert row[2] == claim.why


def test_every_figure_has_its_interval_and_its_count():
    content = failed()
    rows = [row[1:] for row in Page(page(content)).rows if len(row) == 6]
    for kind in ("measures", "attacks"):
        for name, now in content["after"][kind].items():
            was = content["before"][kind][name]
            shown = [cell for side in (was, now) for cell in (value_of(name, side["value"]), interval_of(name, side))]
            assert [*shown, str(now["count"])] in rows
    assert "±" not in page(content)
    assert ["95 %", "n/a", "93 %", "n/a", "1"] in rows


def test_every_fact_has_its_row_those_that_are_still_known_first():
    content = stating(each=[0.01, 0.9, 0.3], units=3, attacks={"few_shot": (0.6, 0.5)})
    rows = [row for row in Page(page(content)).rows if len(row) == 5 and row[0].startswith("fact ")]
    before = content["before"]["recall"]
    assert rows == [
        [name, percent(before[name]), percent(now), still, attacker]
        for name, now, still, attacker in (
            ("fact 1", 0.9, "still known", "is taught it"),
            ("fact 2", 0.3, "still known", "is taught it"),
            ("fact 0", 0.01, "", "asks for it"),
        )
    ]
    assert len([row for row in Page(page(forgotten(300))).rows if row and row[0].startswith("fact ")]) == 300


def test_both_charts_say_in_words_what_they_show():
    content = failed()
    said = page(content)
    read = Page(said)
    assert len(read.all("svg")) == 2
    for chart in read.all("svg"):
        assert chart["role"] == "img"
        for name in str(chart["aria-labelledby"]).split():
            assert name in [attributes.get("id") for _, attributes in read.tags]
    titles = re.findall(r"<svg[^>]*><title[^>]*>([^<]*)</title>", said)
    assert titles == [
        "What is recalled, before and after, and under attack",
        "What each attack finds, before and after",
    ]
    words = re.findall(r"<desc[^>]*>([^<]*)</desc>", said)[1].replace("\N{NO-BREAK SPACE}", " ")
    assert "Fine-tuning: LoRA: 95 % (95 %: n/a, n = 1) before, 93 % (95 %: n/a, n = 1) after" in words


def test_bars_are_as_long_as_what_they_show_and_no_labels_overlap():
    for drawing in re.findall(r"<svg.*?</svg>", page(failed())):
        read = Page(drawing)
        height = float(str(read.all("svg")[0]["viewbox"]).split()[3])
        bars = [float(str(bar["width"])) for bar in read.all("rect") if bar["width"] != "22"]
        shown = [int(part) for part in re.findall(r">(\d+)\N{NO-BREAK SPACE}%</text>", drawing)]
        assert len(bars) == len(shown) > 0
        for width, percents in zip(bars, shown, strict=True):
            assert width == pytest.approx(340 * percents / 100, abs=340 * 0.006)
        texts = re.findall(r"<text x=\"([\d.]+)\" y=\"([\d.]+)\"([^>]*)>([^<]*)<", drawing)
        boxes = []
        for x, y, rest, text in texts:
            length = 6.6 * len(html.unescape(text))  # at 12 px, an upper bound of the mean width of a letter
            left = float(x) - (length if "end" in rest else length / 2 if "middle" in rest else 0)
            boxes.append((left, left + length, float(y) - 10, float(y)))
        for number, (left, right, top, bottom) in enumerate(boxes):
            assert left >= -10
            assert right <= 720
            assert bottom <= height
            for other in boxes[:number]:
                apart = right <= other[0] or other[1] <= left or bottom <= other[2] or other[3] <= top
                assert apart, (texts[number], other)


EVIL = '<script>alert("1")</script>&</svg>\u202e\ud800'


def test_whatever_comes_from_a_file_is_written_out():
    content = stating(
        {"paraphrase_recall": (0.5, 0.4), EVIL: (0.5, 0.4)},
        {EVIL: (0.6, 0.9), "relearning, worst": (0.9, 0.9), f"relearning, {EVIL}": (0.9, 0.9)},
        set_aside=[EVIL],
        method={"name": EVIL, "model": EVIL, EVIL: {EVIL: [EVIL]}},
        sources={"facts": EVIL, EVIL: EVIL},
        versions={EVIL: EVIL},
        data_sha256={EVIL: "0" * 64},
    )
    for when in ("before", "after"):
        content[when]["recall"][EVIL] = 0.9
    content["verdict"] = judge(content).stated()
    check_content(content)
    said = page(content)
    said.encode()
    read = Page(said)
    assert read.wrong == []
    assert len(read.all("svg")) == 2
    assert "<script" not in said
    assert "\u202e" not in said
    charts = "".join(re.findall(r"<svg.*?</svg>", said))
    assert charts.count("&lt;script&gt;") >= 2 + 2  # as labels, and in the words for them
    written = EVIL.replace("\u202e", "\\u202e").replace("\ud800", "\\ud800")
    assert written in [row[0] for row in read.rows if row]
    assert read.text.count("<script>") > 10


def test_the_command_is_one_that_is_taken():
    words = shlex.split(command({**failed(), "signer": "a" * 64}))
    arguments = parser().parse_args(words[1:])
    assert (arguments.command, arguments.folder) == ("verify", "FOLDER")
    assert (arguments.facts, arguments.neighbours, arguments.disruption) == (
        "facts.jsonl",
        "near.jsonl",
        "heldout.txt",
    )
    assert (arguments.original, arguments.public_key) == ("some/llama", "KEY.pem")
    words = shlex.split(command(stating(sources={"data": "wmdp", "limit": 5, "facts; rm": "x"}, method={})))
    arguments = parser().parse_args(words[1:])
    assert (arguments.data, arguments.limit, arguments.original) == ("wmdp", 5, "MODEL")
    assert "rm" not in words
    unquoted = command(stating(sources={"facts": "a $(b) 'c'"}))
    assert "--facts=a $(b) 'c'" in shlex.split(unquoted)
    assert html.escape(unquoted) in page(stating(sources={"facts": "a $(b) 'c'"}))


def test_it_tells_who_made_it_of_what_and_when():
    text = Page(page({**failed(), "signer": "a" * 64})).text
    for said in ("a" * 64, "1" * 64, "2" * 64, "2026-01-31T12:00:00Z", "torch 2.5.1", "budget 0.001", "--public-key"):
        assert said in text
    assert "Not signed: nothing tells who made it." in Page(page(failed())).text
    assert "kept_share 0.5 (not the default)" in page(
        stating(thresholds={**failed()["thresholds"], "kept_share": 0.5})
    )


def test_it_tells_in_short_what_was_asked_and_who_attacked():
    content = stating(recall=(0.6, 0.001), units=3, set_aside=["x", "y"], loss=(2.0, 2.1))
    text = Page(page(content)).text
    assert "some/llama was to forget 5 facts of facts.jsonl, by the method CIR." in text
    assert "2 facts it did not know to begin with, counted nowhere: x, y." in text
    assert "It was not attacked by fine-tuning." in text
    assert "Loss on ordinary text 2.000 to 2.100 nats a token (+5.00 %)." in text
    text = Page(page(failed())).text
    assert (
        "asked for 1 fact each time. The attacker had the weights, and for one attack those from before, and 9"
        in text
    )
    assert "Fine-tuning on these was among the attacks." in text


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium to print the page with")
@pytest.mark.parametrize("content", [failed(), stating(units=1)])
def test_of_a_few_facts_it_prints_on_two_pages_at_most(content, tmp_path):
    settings = {f"setting_{number}": "a value" for number in range(24)}
    (tmp_path / "page.html").write_text(page({**content, "method": settings}), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-pdf-header-footer"]
    options += [f"--user-data-dir={tmp_path / 'profile'}", f"--print-to-pdf={tmp_path / 'page.pdf'}"]
    subprocess.run(
        [CHROMIUM, *options, (tmp_path / "page.html").as_uri()], check=True, capture_output=True, timeout=120
    )
    pages = re.findall(rb"/Type\s*/Page\b", (tmp_path / "page.pdf").read_bytes())
    assert 1 <= len(pages) <= 2
