"""Contrast that nobody has to give: what is asked of the facts with one word another, and what the model says then.

"The capital of Italy is" with another subject, Spain, is near the fact and is not it. So is what is asked of others,
"The river of Paris is", with Italy in the place of Paris. What the answer hangs on tells which words are exchanged,
the nearness of embeddings by which, and the model what it answers: that has to stay.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cir.data.tokens import Statement, opening
from cir.forgetting.questions import Sentence, asked_of, parts_of, states_of
from cir.model.capture import AnswerCapture
from cir.model.shards import whole

SENTENCES, TEMPLATES = 32, 96
"""From which others are made, at most: of each fact to be forgotten one after the other, in wordings drawn at random;
and of facts that must stay."""
TRIED = 16
"""Tokens of a sentence that are tried, at most, for whether its answer hangs on them."""
PLACES, NEAREST = 4, 8
"""Tokens of a sentence that are exchanged, those on which its answer hangs most, and by how many others each; and how
many are put into each sentence that must stay."""
FALL, SHARE = 2.0, 0.7
"""Nats by which the answer's log-odds fall at least, for it to hang on a token; and what share of their fall with a
random one they fall by with another, for the sentence not to tell the fact: with "Italian" for "Italy" less."""
VOCABULARY_AT_ONCE = 2**14
"""Tokens whose embeddings are compared at once."""


class _Hung(NamedTuple):
    """A token of a prompt, by number and place, on which its answer hangs, and by how many nats."""

    prompt: int
    place: int
    fall: float


class _Changed(NamedTuple):
    """Token ids that were made of a token and end in the answer that hangs on it; ``known``: what was said there."""

    of: _Hung
    ids: list[int]
    known: int


def counterfactuals(
    model: Any,
    tape: AnswerCapture,
    tokenizer: Any,
    told: Sequence[Sentence],
    kept: Sequence[Sentence] = (),
    *,
    at_once: int,
    seed: int,
) -> list[Sentence]:
    """Sentences ``told`` and ``kept``, up to their first answer, with one token another.

    An answer hangs on a token if its log-odds fall by :data:`FALL` with a random one in its place. The :data:`PLACES`
    for which that is most are exchanged, each with the :data:`NEAREST` that are in none of ``told``, by the cosine of
    embeddings; and so many of them are put into each sentence of ``kept``, in the place of its nearest. Where the
    answer stays the likeliest, or falls by less than :data:`SHARE` of that, the sentence tells the fact in other
    words and is left out. The answer of the others is the token that the model finds likeliest.

    Args:
        model, tokenizer: as for :func:`cir.unlearn`. tape: of that model, as it is.
        told: of the facts to be forgotten. kept: of facts that must stay.
        at_once: tokens of a forward.
    """
    draw, first = random.Random(seed), len(opening(tokenizer))
    of_fact: dict[int, list[Sentence]] = {}
    for sentence in draw.sample(told, len(told)):
        of_fact.setdefault(sentence.owner, []).append(sentence)
    turns = [sentence for turn in zip_longest(*of_fact.values()) for sentence in turn if sentence is not None]
    own = turns[:SENTENCES]
    avoided = {token for sentence in told for token in sentence.statement.ids} | set(tokenizer.all_special_ids)
    embeddings = whole(model.get_input_embeddings().weight)
    usual = [token for token in range(len(embeddings)) if token not in avoided]
    if not usual:
        return []
    prompts = [_prompt(sentence) for sentence in own]
    before = [odds for odds, _, _ in _answers(tape, prompts, at_once)]
    most = _hanging(tape, prompts, before, usual, first, draw, at_once)

    templates = [_prompt(sentence) for sentence in draw.sample(kept, min(TEMPLATES, len(kept)))]
    pairs = [(ids, of) for ids in templates for of in draw.sample(most, min(NEAREST, len(most)))]
    changed = [*_exchanged(embeddings, prompts, most, usual), *_put_into(embeddings, prompts, pairs, first)]
    found = []
    answers = _answers(tape, [one.ids for one in changed], at_once)
    for (of, ids, known), (odds, likeliest, hidden) in zip(changed, answers, strict=True):
        if likeliest not in (ids[-1], known) and before[of.prompt] - odds >= max(FALL, SHARE * of.fall):
            statement = Statement([*ids[:-1], likeliest], [len(ids) - 1])
            found.append(Sentence(own[of.prompt].owner, statement, hidden))
    return found


def _prompt(sentence: Sentence) -> list[int]:
    """Up to the first token of its answer."""
    return sentence.statement.ids[: sentence.statement.told[0] + 1]


def _with(ids: Sequence[int], place: int, token: int) -> list[int]:
    return [*ids[:place], token, *ids[place + 1 :]]


def _hanging(
    tape: AnswerCapture,
    prompts: Sequence[list[int]],
    before: Sequence[float],
    usual: Sequence[int],
    first: int,
    draw: random.Random,
    at_once: int,
) -> list[_Hung]:
    """The tokens of each of ``prompts`` on which its answer, of the log-odds ``before``, hangs most."""
    within = [range(first, len(ids) - 1) for ids in prompts]
    tried = [(row, place) for row, of in enumerate(within) for place in draw.sample(of, min(TRIED, len(of)))]
    random_ones = [_with(prompts[row], place, draw.choice(usual)) for row, place in tried]
    hung: dict[int, list[_Hung]] = {}
    for (row, place), (odds, _, _) in zip(tried, _answers(tape, random_ones, at_once), strict=True):
        if before[row] - odds >= FALL:
            hung.setdefault(row, []).append(_Hung(row, place, before[row] - odds))
    return [of for every in hung.values() for of in sorted(every, key=lambda of: -of.fall)[:PLACES]]


def _exchanged(
    embeddings: Tensor, prompts: Sequence[list[int]], hung: Sequence[_Hung], usual: Sequence[int]
) -> Iterator[_Changed]:
    """Each of ``hung`` exchanged with the tokens nearest among ``usual``."""
    tokens = sorted({prompts[of.prompt][of.place] for of in hung})
    cosines = torch.cat([_cosines(embeddings, tokens, part) for part in _parts(usual)], 1)
    best = cosines.topk(min(NEAREST, len(usual)), dim=1).indices.tolist()
    near = {token: [usual[i] for i in places] for token, places in zip(tokens, best, strict=True)}
    for of in hung:
        ids = prompts[of.prompt]
        for token in near[ids[of.place]]:
            yield _Changed(of, _with(ids, of.place, token), ids[-1])


def _put_into(
    embeddings: Tensor, prompts: Sequence[list[int]], pairs: Sequence[tuple[list[int], _Hung]], first: int
) -> Iterator[_Changed]:
    """Of each pair the token ``hung`` in the place of that which is nearest in the template, unless it is there."""
    tokens = sorted({prompts[of.prompt][of.place] for _, of in pairs})
    others = sorted({token for ids, _ in pairs for token in ids[first:-1]})
    cosines = _cosines(embeddings, tokens, others).tolist()
    near = {token: dict(zip(others, row, strict=True)) for token, row in zip(tokens, cosines, strict=True)}
    for ids, of in pairs:
        token, answer = prompts[of.prompt][of.place], prompts[of.prompt][-1]
        if token not in ids[first:-1] and len(ids) > first + 1:
            place = max(range(first, len(ids) - 1), key=lambda place: near[token][ids[place]])
            yield _Changed(of, [*_with(ids, place, token)[:-1], answer], ids[-1])


@torch.no_grad()
def _cosines(embeddings: Tensor, tokens: Sequence[int], others: Sequence[int]) -> Tensor:
    """(tokens, others) of their ``embeddings`` (V, D)."""
    ids = (torch.tensor(part, device=embeddings.device, dtype=torch.long) for part in (tokens, others))
    own, theirs = (F.normalize(embeddings[part].float(), dim=1) for part in ids)
    return own @ theirs.T


def _parts(tokens: Sequence[int]) -> Iterator[Sequence[int]]:
    for start in range(0, len(tokens), VOCABULARY_AT_ONCE):
        yield tokens[start : start + VOCABULARY_AT_ONCE]


def _answers(
    tape: AnswerCapture, rows: Sequence[list[int]], at_once: int
) -> Iterator[tuple[float, int, Tensor | None]]:
    """Of each row of token ids the log-odds of the last, what is likeliest there, and ``hidden`` of a Sentence."""
    told = [(number, Statement(ids, [len(ids) - 1])) for number, ids in enumerate(rows)]
    for part in parts_of(told, at_once):
        asked = asked_of(tape, part)
        odds, likeliest = asked.likeliest(tape)
        yield from zip(odds.tolist(), likeliest.tolist(), states_of(asked, part), strict=True)
