"""What the figures of a certificate come to, in words, against bounds that it declares."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

from cir.measures import estimate
from cir.proof.figures import name_of, percent, value_of
from cir.proof.statistics import interval
from cir.system.checks import check_number

FORGOTTEN, PARTLY, NOT_FORGOTTEN = "forgotten", "partly forgotten", "not forgotten"
BACK, KEPT, HARMED, NOT_SHOWN = "comes back under fine-tuning", "kept", "harmed", "not shown"
WORDS = (NOT_FORGOTTEN, PARTLY, BACK, HARMED, NOT_SHOWN, FORGOTTEN, KEPT)
"""The worst first: of several figures, the worst is the word of their claim."""
WORST = "relearning, worst"


@dataclass(frozen=True)
class Thresholds:
    """The bounds of a verdict.

    Attributes:
        forgotten_share, forgotten_most: forgotten is what is recalled, in the mean over facts, at most at this share
            of what it was, and at most so much; ``fact_most``: and no one fact more than that.
        partly_share: what is above those bounds, yet at most at this share, is forgotten in part.
        A guess among four choices has 0.25: of facts that only have choices, none is forgotten by these defaults.
        recovered_share, recovered_most: the same for what other wordings and attacks bring back, as a share of what
            they found before; an attack that found no more than ``recovered_most`` then shows nothing.
        kept_share: other facts are kept if they are recalled at this share of before at least.
        loss_rise, kl, kl_window: language is kept if the loss on text rises by this share at most, and the KL from
            before, in nats a token, is at most so much, in the mean and in the window that changed most.
        units: facts, or windows of text, below which nothing good is shown.

    Raises:
        ValueError: on a number that is none, or out of its range.
    """

    forgotten_share: float = 0.1
    forgotten_most: float = 0.05
    fact_most: float = 0.2
    partly_share: float = 0.75
    recovered_share: float = 0.25
    recovered_most: float = 0.2
    kept_share: float = 0.9
    loss_rise: float = 0.01
    kl: float = 0.05
    kl_window: float = 0.25
    units: int = 5

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            check_number(field.name, value, 0, whole=field.name == "units")
            most = 1 if field.name.endswith(("share", "most")) else 1_000_000
            if value > most:
                raise ValueError(f"{field.name}: expected at most {most}, got {value!r:.80}")


@dataclass(frozen=True)
class Claim:
    """A claim: its short ``name``, what it is about, the ``word`` for it, and the figures that led to it."""

    name: str
    title: str
    word: str
    why: str


@dataclass(frozen=True)
class Verdict:
    """``heading`` is the whole in a few words."""

    heading: str
    claims: tuple[Claim, ...]

    def stated(self) -> dict[str, Any]:
        """As a certificate states it."""
        return {"heading": self.heading, "claims": {claim.name: claim.word for claim in self.claims}}


class _Finding(NamedTuple):
    word: str
    why: str


def judge(content: Mapping[str, Any]) -> Verdict:
    """The verdict on the figures and thresholds of a certificate's ``content``; nothing else enters into it.

    One figure beyond its bound refuses a claim, whatever its error: it is of the facts themselves. To grant it, the
    whole 95 % interval must be within the bound, and of enough units.
    """
    bounds = Thresholds(**content["thresholds"])
    before, after = content["before"], content["after"]
    attacks = [name for name in after["attacks"] if not name.startswith("relearning")]
    asked = [before["recall"][name] for name in content["attacker"]["asked"] if name in before["recall"]]
    # What undoes the changes cannot be tried before there are any: it is held against what was known without it.
    known = dict.fromkeys(after["attacks"], _mean(asked)) if asked else {}
    attacked = {**known, **before["attacks"]}
    trained = _left([WORST], attacked, after["attacks"], bounds)
    if trained.word in (PARTLY, NOT_FORGOTTEN):
        trained = trained._replace(word=BACK)
    wordings = _wordings(before["measures"], after["measures"], bounds)
    others = [_others(name, before, after, bounds) for name in ("neighbour_recall", "same_subject_recall")]
    claims = (
        Claim("forgotten", "As they were asked for", *_forgotten(before["recall"], after["recall"], bounds)),
        Claim("other wordings", "In other wordings", *wordings),
        Claim("fine-tuning", "After fine-tuning", *trained),
        Claim(
            "cheap attacks",
            "Under cheap attacks",
            *_left(attacks, attacked, after["attacks"], bounds),
        ),
        Claim("other facts", "Other facts", *_worst(finding for finding in others if finding)),
        Claim("language", "Language", *_language(before, after, bounds)),
    )
    return Verdict(_heading(claims), claims)


def _heading(claims: Iterable[Claim]) -> str:
    words = {claim.name: claim.word for claim in claims}
    lead = words["forgotten"]
    others = {words["other wordings"], words["cheap attacks"]}
    if lead in (FORGOTTEN, NOT_SHOWN) and others & {PARTLY, NOT_FORGOTTEN}:
        lead = PARTLY
    elif lead == NOT_SHOWN:
        lead = "not shown to be forgotten"
    elif lead == FORGOTTEN and NOT_SHOWN in others | {words["fine-tuning"]}:
        lead = "forgotten as asked"
    parts = [lead]
    if words["fine-tuning"] == BACK and lead != NOT_FORGOTTEN:
        parts.append(BACK)
    for word in (HARMED, NOT_SHOWN):
        named = ", ".join(name for name in words if words[name] == word and name != "forgotten")
        parts += [f"{word}: {named}"] if named else []
    if parts == [FORGOTTEN]:
        parts = ["forgotten, and the rest kept"]
    heading = "; ".join(parts)
    return heading[:1].upper() + heading[1:]


def _worst(findings: Iterable[_Finding]) -> _Finding:
    """The worst word, and all that led to it."""
    found = list(findings) or [_Finding(NOT_SHOWN, "Not measured.")]
    word = min((finding.word for finding in found), key=WORDS.index)
    reasons = [finding.why for finding in found if finding.word == word]
    return _Finding(word, " ".join(reasons[:2]) + (f" And {len(reasons) - 2} more." if reasons[2:] else ""))


def _forgotten(before: Mapping[str, float], after: Mapping[str, float], bounds: Thresholds) -> _Finding:
    names = [name for name in after if name in before]
    now = estimate(after[name] for name in names)
    if now is None:
        return _Finding(NOT_SHOWN, "Not measured.")
    was = sum(before[name] for name in names) / len(names)
    most = min(bounds.forgotten_most, bounds.forgotten_share * was)
    known = [name for name in names if after[name] > bounds.fact_most]
    why = f"Recall {percent(was)} before, {percent(now.value)} after, of n = {now.count}; "
    why += f"bound: at most {percent(most)}."
    if now.value > most:
        return _Finding(PARTLY if now.value <= bounds.partly_share * was else NOT_FORGOTTEN, why)
    if known:
        return _Finding(PARTLY, f"{why} Still recalled above {percent(bounds.fact_most)}: {_listed(known)}.")
    above = [_high("recall", asdict(now)) - bounds.forgotten_most]
    above += [_high("loss", _mean(after[name] - bounds.forgotten_share * before[name] for name in names))]
    return _granted(FORGOTTEN, why, now.count, max(above) <= 0, bounds)


def _wordings(before: Mapping[str, Any], after: Mapping[str, Any], bounds: Thresholds) -> _Finding:
    found = _left(["paraphrase_recall", "generation_extraction"], before, after, bounds)
    if found.word == FORGOTTEN and "paraphrase_recall" not in after:
        return _Finding(NOT_SHOWN, f"No paraphrases were given. {found.why}")
    return found


def _left(names: Iterable[str], before: Mapping[str, Any], after: Mapping[str, Any], bounds: Thresholds) -> _Finding:
    """Of what should find nothing any more: what it found, the most first."""
    findings = []
    measured = [name for name in names if name in before and name in after]
    for name in sorted(measured, key=lambda name: -after[name]["value"]):
        was, now = before[name]["value"], after[name]
        dull = was <= bounds.recovered_most
        most = bounds.recovered_most if dull else min(bounds.recovered_most, bounds.recovered_share * was)
        why = f"{_short(name)}: {percent(was)} before, {percent(now['value'])} after, of n = {now['count']}; "
        why += f"bound: at most {percent(most)}."
        if now["value"] > most:
            findings.append(_Finding(PARTLY if now["value"] <= bounds.partly_share * was else NOT_FORGOTTEN, why))
        elif not dull:
            findings.append(_granted(FORGOTTEN, why, now["count"], _high(name, now) <= most, bounds))
    if measured and not findings:
        return _Finding(NOT_SHOWN, f"None found more than {percent(bounds.recovered_most)} before.")
    return _worst(findings)


def _others(name: str, before: Mapping[str, Any], after: Mapping[str, Any], bounds: Thresholds) -> _Finding | None:
    """Whether the facts that were asked for, each with itself as its control, are recalled as before."""
    was, now = before["kept"].get(name, {}), after["kept"].get(name, {})
    names = [unit for unit in now if unit in was]
    if not names:
        return None
    mean_was, mean_now = (sum(side[unit] for unit in names) / len(names) for side in (was, now))
    why = f"{_short(name)}: {percent(mean_was)} before, {percent(mean_now)} after, of n = {len(names)}; "
    why += f"bound: at least {percent(bounds.kept_share * mean_was)}."
    missing = _mean(bounds.kept_share * was[unit] - now[unit] for unit in names)
    if missing["value"] > 0:
        return _Finding(HARMED, why)
    if mean_was <= bounds.forgotten_most:
        return _Finding(NOT_SHOWN, f"{why} Hardly known before.")
    return _granted(KEPT, why, len(names), _high("loss", missing) <= 0, bounds)


def _language(before: Mapping[str, Any], after: Mapping[str, Any], bounds: Thresholds) -> _Finding:
    findings = []
    was, now = before["kept"].get("loss", {}), after["kept"].get("loss", {})
    if windows := [window for window in now if window in was]:
        rise = _mean(now[window] - (1 + bounds.loss_rise) * was[window] for window in windows)
        means = [sum(side[window] for window in windows) / len(windows) for side in (was, now)]
        why = f"Loss {means[0]:.3f} before, {means[1]:.3f} nats a token after, of n = {len(windows)} windows; "
        why += f"bound: at most {(1 + bounds.loss_rise) * means[0]:.3f}."
        fits = _high("loss", rise) <= 0
        findings.append(
            _Finding(HARMED, why) if rise["value"] > 0 else _granted(KEPT, why, len(windows), fits, bounds)
        )
    for name, most in (("kl", bounds.kl), ("kl_worst_window", bounds.kl_window)):
        if name in after["measures"]:
            found = after["measures"][name]
            why = (
                f"{_short(name)}: {value_of(name, found['value'])}, of n = {found['count']}; bound: at most {most:g}."
            )
            fits = name == "kl_worst_window" or _high(name, found) <= most
            findings.append(
                _Finding(HARMED, why) if found["value"] > most else _granted(KEPT, why, found["count"], fits, bounds)
            )
    return _worst(findings)


def _granted(word: str, why: str, count: int, within: bool, bounds: Thresholds) -> _Finding:
    """``word``, unless the units are too few or the interval is not within the bound."""
    if count < bounds.units:
        return _Finding(NOT_SHOWN, f"{why} Fewer than {bounds.units} were counted.")
    return _Finding(word, why) if within else _Finding(NOT_SHOWN, f"{why} The interval is not within it.")


def _mean(values: Iterable[float]) -> dict[str, Any]:
    found = estimate(values)
    assert found is not None
    return asdict(found)


def _high(name: str, outcome: Mapping[str, Any]) -> float:
    """The upper end of its interval."""
    found = interval(name, outcome)
    return float("inf") if found is None else found[1]


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _short(name: str) -> str:
    return name_of(name).partition(" (")[0]
