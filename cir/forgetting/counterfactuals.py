"""Contrast that nobody has to give: sentences of the facts with one word another, and what the model says then.

"The capital of Italy is" with another subject, Spain, is near the fact and is not it. What the answer hangs on
tells which words are exchanged, the nearness of embeddings by which, and the model what it answers: that has to stay.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cir.data.tokens import Statement, opening
from cir.forgetting.questions import Sentence, asked_of, parts_of, states_of
from cir.model.capture import AnswerCapture
from cir.model.shards import whole

SENTENCES = 32
"""From which others are made, at most: of each fact one after the other, in wordings drawn at random."""
TRIED = 16
"""Tokens of a sentence that are tried, at most, for whether its answer hangs on them."""
PLACES, NEAREST = 4, 8
"""Tokens of a sentence that are exchanged, those on which its answer hangs most, and by how many others each."""
FALL, SHARE = 2.0, 0.7
"""Nats by which the answer's log-odds fall at least, for it to hang on a token; and what share of their fall with a
random one they fall by with another, for the sentence not to tell the fact: with "Italian" for "Italy" less."""
VOCABULARY_AT_ONCE = 2**14
"""Tokens whose embeddings are compared at once."""


def counterfactuals(
    model: Any, tape: AnswerCapture, tokenizer: Any, told: Sequence[Sentence], *, at_once: int, seed: int
) -> list[Sentence]:
    """Sentences ``told``, up to their first answer, with one token another.

    An answer hangs on a token if its log-odds fall by :data:`FALL` with a random one in its place. The :data:`PLACES`
    for which that is most are exchanged, each with the :data:`NEAREST` that are in none of ``told``, by the cosine of
    embeddings. Where the answer stays the likeliest, or falls by less than :data:`SHARE` of that, the sentence tells
    the fact in other words and is left out. The answer of the others is the token that the model finds likeliest.

    Args:
        model, tokenizer: as for :func:`cir.unlearn`. tape: of that model, as it is.
        told: of the facts to be forgotten.
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
    prompts = [sentence.statement.ids[: sentence.statement.told[0] + 1] for sentence in own]
    before = [odds for odds, _, _ in _answers(tape, prompts, at_once)]

    within = [range(first, len(ids) - 1) for ids in prompts]
    tried = [(row, place) for row, of in enumerate(within) for place in draw.sample(of, min(TRIED, len(of)))]
    random_ones = [_with(prompts[row], place, draw.choice(usual)) for row, place in tried]
    falls: dict[int, list[tuple[float, int]]] = {}
    for (row, place), (odds, _, _) in zip(tried, _answers(tape, random_ones, at_once), strict=True):
        if before[row] - odds >= FALL:
            falls.setdefault(row, []).append((before[row] - odds, place))
    places = [(row, *of) for row, every in falls.items() for of in sorted(every, reverse=True)[:PLACES]]

    near = _nearest(embeddings, sorted({prompts[row][place] for row, _, place in places}), usual)
    exchanged = [
        (row, fall, _with(prompts[row], place, token))
        for row, fall, place in places
        for token in near[prompts[row][place]]
    ]
    found = []
    answers = _answers(tape, [ids for _, _, ids in exchanged], at_once)
    for (row, fall, ids), (odds, likeliest, hidden) in zip(exchanged, answers, strict=True):
        if likeliest != ids[-1] and before[row] - odds >= max(FALL, SHARE * fall):
            statement = Statement([*ids[:-1], likeliest], [len(ids) - 1])
            found.append(Sentence(own[row].owner, statement, hidden))
    return found


def _with(ids: Sequence[int], place: int, token: int) -> list[int]:
    return [*ids[:place], token, *ids[place + 1 :]]


def _answers(
    tape: AnswerCapture, rows: Sequence[list[int]], at_once: int
) -> Iterator[tuple[float, int, Tensor | None]]:
    """Of each row of token ids the log-odds of the last, what is likeliest there, and ``hidden`` of a Sentence."""
    told = [(number, Statement(ids, [len(ids) - 1])) for number, ids in enumerate(rows)]
    for part in parts_of(told, at_once):
        asked = asked_of(tape, part)
        odds, likeliest = asked.likeliest(tape)
        yield from zip(odds.tolist(), likeliest.tolist(), states_of(asked, part), strict=True)


@torch.no_grad()
def _nearest(embeddings: Tensor, tokens: Sequence[int], among: Sequence[int]) -> dict[int, list[int]]:
    """Of each of ``tokens`` the :data:`NEAREST` ``among`` others by the cosine of ``embeddings`` (V, D)."""

    def directions(ids: Tensor) -> Tensor:
        return F.normalize(embeddings[ids].float(), dim=1)

    own, others = (torch.tensor(ids, device=embeddings.device, dtype=torch.long) for ids in (tokens, among))
    cosines = [directions(own) @ directions(some).T for some in others.split(VOCABULARY_AT_ONCE)]
    best = torch.cat(cosines, 1).topk(min(NEAREST, len(others)), dim=1).indices
    return dict(zip(tokens, others[best].tolist(), strict=True))
