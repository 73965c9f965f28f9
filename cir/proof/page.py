"""The page of a certificate, for people."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from cir.proof.charts import Row, chart, plain
from cir.proof.figures import interval_of, name_of, percent, value_of
from cir.proof.verdict import FORGOTTEN, KEPT, NOT_SHOWN, WORST, Thresholds, Verdict, judge

OPTIONS = ("data", "data_path", "limit", "facts", "neighbours", "same_subject", "related", "disruption")
"""Of `cir verify`, which name what a certificate was made from."""
LIMITS = (
    "It holds for the probes, texts and attacks listed, not for every way to ask or to attack.",
    "Facts that share no probe with these, and knowledge from which the facts follow, were not examined.",
    "A fine-tuning attacker who has the facts themselves can always teach them again.",
    "Intervals are of 95 %, over the n units that were counted: facts, questions or windows of text. They are "
    "Wilson's for shares of answers, which are mostly right or wrong, and Student's for other means; one unit has "
    "none (n/a).",
    "The worst of several attacks, each at its worst epoch, is rather too high than too low.",
    "A bound that is passed refuses a claim, whatever the interval; to grant it, the whole interval must be within.",
)
STYLE = """
:root{color-scheme:light dark;--ink:#1b1f24;--dim:#59636e;--paper:#fff;--line:#d1d9e0;--soft:#f6f8fa;--bar:#3b6fb6;
--good:#1a7f37;--bad:#b3261e;--open:#8a5a00}
@media (prefers-color-scheme:dark){:root{--ink:#e6edf3;--dim:#9aa5b1;--paper:#0d1117;--line:#3d444d;--soft:#161b22;
--bar:#6ea8fe;--good:#4ac26b;--bad:#ff8a80;--open:#e3b341}}
*{box-sizing:border-box}
body{font:15px/1.5 system-ui,sans-serif;max-width:54rem;margin:1.5rem auto;padding:0 1rem;color:var(--ink);
background:var(--paper);overflow-wrap:break-word}
h1{font-size:1.6rem;line-height:1.25;margin:.1rem 0 .8rem}h2{font-size:1.1rem;margin:1.6rem 0 .4rem}
p{margin:.4rem 0}.dim,small{color:var(--dim)}
.wide{overflow-x:auto}
table{border-collapse:collapse;width:100%}
td,th{padding:.25rem .5rem;border-bottom:1px solid var(--line);text-align:left;vertical-align:top;font-weight:400}
thead th{color:var(--dim)}
.figures td{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.figures thead th:not(:first-child){text-align:right}
.claims th{white-space:nowrap}
.word{font-weight:600;white-space:nowrap}.good{color:var(--good)}.bad{color:var(--bad)}.open{color:var(--open)}
h1.good,h1.bad,h1.open{border-left:.4rem solid;padding-left:.7rem}
svg{display:block;width:100%;min-width:34rem;font:12px system-ui,sans-serif}svg text{fill:var(--ink)}
svg .axis{fill:var(--dim)}svg .grid{stroke:var(--line)}
svg .before{fill:var(--paper);stroke:var(--dim)}svg .after{fill:var(--bar);stroke:var(--bar)}
svg .whisker{stroke:var(--ink);fill:none}
code,pre{font:12px/1.5 ui-monospace,monospace;overflow-wrap:anywhere}
pre{white-space:pre-wrap;background:var(--soft);border:1px solid var(--line);padding:.6rem}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.15rem .9rem;margin:.4rem 0}dt{color:var(--dim)}
dd{margin:0;min-width:0}ul{padding-left:1.2rem;margin:.3rem 0}
@page{size:A4;margin:12mm}
@media print{
:root{color-scheme:light;--ink:#000;--dim:#444;--paper:#fff;--line:#bbb;--soft:#fff;--bar:#3b6fb6;--good:#1a7f37;
--bad:#b3261e;--open:#8a5a00}
body{font-size:8pt;line-height:1.25;max-width:none;margin:0;padding:0}h1{font-size:14pt;margin:0 0 4pt}
h2{font-size:10pt;margin:7pt 0 2pt;break-after:avoid}td,th{padding:1pt 4pt}p,ul,dl,pre{margin:2pt 0}
code,pre{font-size:7pt;line-height:1.25}pre{padding:3pt}tr,svg,dt,dd{break-inside:avoid}thead{display:table-header-group}
.wide{overflow:visible}svg{min-width:0;width:80%;margin:auto}.facts{columns:2}}
"""


def page(certificate: Mapping[str, Any]) -> str:
    """The certificate as one self-contained HTML page: the verdict first, then what it rests on."""
    verdict = judge(certificate)
    tone = _tone([claim.word for claim in verdict.claims])
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{plain(verdict.heading)}: certificate of unlearning</title><style>{STYLE}</style></head><body>"
        f'<header><p class="dim">Certificate of unlearning, {plain(certificate["date"])}</p>'
        f'<h1 class="{tone}">{plain(verdict.heading)}</h1></header><main>'
        + "".join(
            (
                _claims(verdict),
                _section("In short", _summary(certificate)),
                _charts(certificate),
                _section("Measures and attacks", _figures(certificate)),
                _section("Each fact", _facts(certificate)),
                _section("What this does not guarantee", _list(LIMITS)),
                _section("Check it", _check(certificate)),
                _section("How it was made", _made(certificate)),
            )
        )
        + "</main></body></html>\n"
    )


def _tone(words: Iterable[str]) -> str:
    """The class of the worst of ``words``: which is bad, open or good."""
    left = {*words} - {FORGOTTEN, KEPT}
    return "bad" if left - {NOT_SHOWN} else "open" if left else "good"


def _claims(verdict: Verdict) -> str:
    marks = {"good": "\N{CHECK MARK}", "bad": "\N{BALLOT X}", "open": "?"}
    rows = []
    for claim in verdict.claims:
        tone = _tone([claim.word])
        word = f'<td class="word {tone}">{marks[tone]} {plain(claim.word)}</td>'
        rows.append(f'<tr><th scope="row">{plain(claim.title)}</th>{word}<td>{plain(claim.why)}</td></tr>')
    head = _head("claim", "verdict", "why")
    return f'<div class="wide"><table class="claims">{head}<tbody>{"".join(rows)}</tbody></table></div>'


def _summary(of: Mapping[str, Any]) -> str:
    model, sources = of["method"].get("model"), of["sources"]
    known, aside, attacker = len(of["after"]["recall"]), of["set_aside"], of["attacker"]
    where = sources.get("facts", sources.get("data"))
    asked = f"{'The model' if model is None else model} was to forget {_count(known + len(aside), 'fact')}"
    asked += f" of {where}, " if where is not None else ", "
    asked += f"by the method {of['method'].get('name', 'not named')}. "
    asked += (
        "All of them were known to begin with."
        if not aside
        else (f"{_count(len(aside), 'fact')} it did not know to begin with, counted nowhere: {_some(aside)}.")
    )
    trained = WORST in of["after"]["attacks"]
    attacks = f"It was attacked before and after, and asked for {_count(len(attacker['asked']), 'fact')} each time. "
    attacks += "The attacker had the weights"
    attacks += ", and for one attack those from before" if "pruned" in of["after"]["attacks"] else ""
    attacks += f", and {_count(attacker['taught'], 'other fact')} of the kind to show or to learn from. "
    attacks += "Fine-tuning on these was among the attacks." if trained else "It was not attacked by fine-tuning."
    changes = "; ".join(_changes(of)) or "nothing was measured"
    answers = "What the model answers is not shown, and facts are named by their ids: the page can be handed on."
    return "".join(
        f"<p><b>{lead}</b> {plain(text)}</p>"
        for lead, text in (
            ("Asked.", asked),
            ("Attacked.", attacks),
            ("What else changed.", f"{changes[:1].upper()}{changes[1:]}."),
            ("Not here.", answers),
        )
    )


def _changes(of: Mapping[str, Any]) -> Iterable[str]:
    before, after = of["before"]["measures"], of["after"]["measures"]
    for name, said in (
        ("neighbour_recall", "other subjects"),
        ("same_subject_recall", "the same subjects' other facts"),
    ):
        if name in before and name in after:
            yield f"recall of {said} {percent(before[name]['value'])} to {percent(after[name]['value'])}"
    if "loss" in before and "loss" in after:
        was, now = before["loss"]["value"], after["loss"]["value"]
        yield f"loss on ordinary text {was:.3f} to {now:.3f} nats a token" + (
            f" ({100 * (now / was - 1):+.2f} %)" if was > 0 else ""
        )
    if "kl" in after:
        yield f"KL from before on that text {value_of('kl', after['kl']['value'])} nats a token"


def _charts(of: Mapping[str, Any]) -> str:
    before, after = of["before"], of["after"]

    def row(kind: str, name: str, label: str | None = None) -> Row:
        return Row(name, label or name_of(name), before[kind].get(name), after[kind].get(name))

    cheap = {name: found["value"] for name, found in after["attacks"].items() if not name.startswith("relearning")}
    recalled = [row("measures", name) for name in ("recall", "paraphrase_recall") if name in after["measures"]]
    if cheap:
        worst = max(cheap, key=lambda name: cheap[name])
        recalled.append(row("attacks", worst, "The worst attack without training"))
    recalled += [row("attacks", WORST)] if WORST in after["attacks"] else []
    kept = ("neighbour_recall", "same_subject_recall")
    recalled += [row("measures", name) for name in kept if name in after["measures"]]
    attacked = [row("attacks", name) for name in {**before["attacks"], **after["attacks"]} if name != WORST]
    found = ""
    for name, title, rows in (
        ("recall", "What is recalled, before and after, and under attack", recalled),
        ("attacks", "What each attack finds, before and after", attacked),
    ):
        if rows:
            found += _section(title, f'<div class="wide">{chart(name, title, rows)}</div>')
    return found


def _figures(of: Mapping[str, Any]) -> str:
    before, after = of["before"], of["after"]
    rows = []
    for kind in ("measures", "attacks"):
        for name in {**before[kind], **after[kind]}:
            sides = [before[kind].get(name), after[kind].get(name)]
            counts = dict.fromkeys(str(side["count"]) for side in sides if side is not None)
            cells = [text for side in sides for text in _cells(name, side)]
            rows.append([name_of(name), *cells, " / ".join(counts)])
    return _table(("", "before", "95 %", "after", "95 %", "n"), rows)


def _cells(name: str, outcome: Mapping[str, Any] | None) -> tuple[str, str]:
    if outcome is None:
        return "", ""
    return value_of(name, outcome["value"]), interval_of(name, outcome)


def _facts(of: Mapping[str, Any]) -> str:
    """Those of which most is left first."""
    before, after, asked = of["before"]["recall"], of["after"]["recall"], {*of["attacker"]["asked"]}
    most = of["thresholds"]["fact_most"]
    rows = []
    for name in sorted({**before, **after}, key=lambda name: -after.get(name, 0.0)):
        was, now = (percent(side[name]) if name in side else "" for side in (before, after))
        still = "still known" if after.get(name, 0.0) > most else ""
        rows.append([name, was, now, still, "asks for it" if name in asked else "is taught it"])
    note = "What attacks find is held as means over the facts that they ask for, not by fact."
    table = _table(("fact", "before", "after", "", "the attacker"), rows)
    return f'<div class="facts">{table}</div><p class="dim">{note}</p>'


def command(of: Mapping[str, Any]) -> str:
    """What recomputes the certificate; words in capitals are to be filled in."""
    sources = {name: str(of["sources"][name]) for name in OPTIONS if name in of["sources"]}
    if "data" not in sources:
        sources = {"facts": "FACTS", "neighbours": "NEIGHBOURS", "disruption": "TEXT", **sources}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in sources.items()]
    model = of["method"].get("model")
    options.append(f"--original={model if isinstance(model, str) else 'MODEL'}")
    options += ["--public-key=KEY.pem"] if of["signer"] is not None else []
    return shlex.join(["cir", "verify", "FOLDER", *options])


def _check(of: Mapping[str, Any]) -> str:
    signer = of["signer"]
    signed = (
        "Not signed: nothing tells who made it."
        if signer is None
        else f"Signed in certificate.sig with the Ed25519 key of the fingerprint (SHA-256 of its DER form) {signer}. "
        "This page cannot tell whether that is true: compare the fingerprint with one that the issuer gave you, and "
        "let the command check the signature."
    )
    return (
        "<p>This page is made of certificate.json. The command computes every figure and the verdict anew, from "
        "where the files that it names lie; FOLDER is the folder of this page, and what else is in capitals is yours "
        "to fill in.</p>"
        f"<pre>{plain(command(of))}</pre><p>{plain(signed)}</p>"
    )


def _made(of: Mapping[str, Any]) -> str:
    usual, own = asdict(Thresholds()), of["thresholds"]
    bounds = [f"{name} {own[name]:g}" + ("" if own[name] == usual[name] else " (not the default)") for name in own]
    pairs = {
        "Date": of["date"],
        "Format": of["format"],
        "Method": _pairs(of["method"]),
        "Examined with": _pairs(of["settings"]),
        "Sources": _pairs(of["sources"]),
        "Bounds": "; ".join(bounds),
        "Versions": _pairs(of["versions"]),
        **{f"Weights {when}": f"SHA-256 {digest}" for when, digest in of["weights_sha256"].items()},
        **{f"Data: {name}": f"SHA-256 {digest}" for name, digest in of["data_sha256"].items()},
        "Files": f"{_count(len(of['files_sha256']), 'file')} beside this one, whose SHA-256 are in certificate.json",
    }
    rows = (
        f"<dt>{plain(name)}</dt><dd>{f'<code>{plain(text)}</code>' if 'SHA-256 ' in text[:8] else plain(text)}</dd>"
        for name, text in pairs.items()
    )
    return f"<dl>{''.join(rows)}</dl>"


def _pairs(values: Mapping[str, Any]) -> str:
    """On one line; text as it is, what is not text as JSON."""
    said = (f"{name} {value if isinstance(value, str) else json.dumps(value)}" for name, value in values.items())
    return "; ".join(said) or "none"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")


def _count(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _section(title: str, inside: str) -> str:
    return f"<section><h2>{plain(title)}</h2>{inside}</section>"


def _list(items: Iterable[str]) -> str:
    return f"<ul>{''.join(f'<li>{plain(item)}</li>' for item in items)}</ul>"


def _head(*names: str) -> str:
    cells = "".join(f'<th scope="col">{plain(name)}</th>' if name else "<td></td>" for name in names)
    return f"<thead><tr>{cells}</tr></thead>"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = (
        f'<tr><th scope="row">{plain(first)}</th>{"".join(f"<td>{plain(cell)}</td>" for cell in cells)}</tr>'
        for first, *cells in rows
    )
    return f'<div class="wide"><table class="figures">{_head(*head)}<tbody>{"".join(lines)}</tbody></table></div>'
