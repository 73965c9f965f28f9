"""Sentences and text as token ids: batches of sentences, windows of text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from cir.data.facts import Fact, answer_pattern

PIECE = 2**16
"""Characters that a tokenizer is given at once, of a long text."""
TRIES = 16
"""Spaces that are tried, to part a piece from the next."""
AROUND = 512
"""Characters before and after a space that must have the same tokens whether it parts them or not."""
_SPACE = re.compile(r"(?<=\w) (?=\w)|(?<=\S)\n(?=\S)")

PACKED_WIDTH = 64
"""Tokens to which short sentences are packed: attention costs by the square of it, padding by its inverse."""


@dataclass(frozen=True)
class Batch:
    """Token ids (B, L) padded on the right, and their bool attention mask (B, L).

    Its N real tokens are counted row after row, without the padding.
    """

    input_ids: Tensor
    attention_mask: Tensor

    def to(self, device: torch.device | str) -> Batch:
        return Batch(self.input_ids.to(device), self.attention_mask.to(device))

    def split(self, rows: int) -> list[Batch]:
        """In batches of so many rows."""
        pieces = zip(self.input_ids.split(rows), self.attention_mask.split(rows), strict=True)
        return [Batch(ids, mask) for ids, mask in pieces]

    @cached_property
    def position_ids(self) -> Tensor:
        """(N,) the place of each real token in its row."""
        return (self.attention_mask.cumsum(1) - 1)[self.attention_mask]

    @cached_property
    def packed(self) -> tuple[Tensor, Tensor, Tensor]:
        """The rows laid end to end into fewer, so that little is padding.

        Returns:
            Token and position ids (R, W), positions restarting with each row of the batch, and, for the real
            tokens, their places (N,) in the flattened (R, W).
        """
        lengths = self.attention_mask.sum(1).tolist()
        width = max(PACKED_WIDTH, *lengths)
        used: list[int] = []
        starts = [0] * len(lengths)
        for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):  # the longest first: they fit worst
            row = next((r for r, n in enumerate(used) if n + lengths[i] <= width), len(used))
            if row == len(used):
                used.append(0)
            starts[i] = row * width + used[row]
            used[row] += lengths[i]
        places = torch.tensor(starts, device=self.input_ids.device).repeat_interleave(self.attention_mask.sum(1))
        places = places + self.position_ids
        ids, positions = (self.input_ids.new_zeros(len(used) * width) for _ in range(2))
        ids[places], positions[places] = self.input_ids[self.attention_mask], self.position_ids
        return ids.view(-1, width), positions.view(-1, width), places

    def counted(self, skip_first: int) -> Tensor:
        """(N,) bool: the real tokens without the first ``skip_first`` of each row."""
        return self.position_ids >= skip_first

    def predicting(self, skip_first: int) -> Tensor:
        """(N,) bool: as :meth:`counted`, without the last real token of each row, which predicts nothing."""
        last = self.position_ids.roll(-1) == 0
        return self.counted(skip_first) & ~last


def opening(tokenizer: Any) -> list[int]:
    """Special tokens, BOS say, that the tokenizer puts in front of every text; what it puts after them is none.

    Raises:
        ValueError: if it encodes a text otherwise with special tokens than without.
    """
    whole, plain = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return list(whole[:start])
    raise ValueError(
        f"expected a tokenizer that encodes 'a' alike with special tokens and without, got {whole}, {plain}"
    )


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of ``text`` as it begins: with BOS where the tokenizer adds one, and without EOS, which would end it
    where something is to follow. A text that begins with these tokens, such as a chat template's, has them once.
    """
    first, ids = opening(tokenizer), list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return ids if ids[: len(first)] == first else first + ids


def continuation(tokenizer: Any, prompt: str, target: str) -> tuple[list[int], list[int]]:
    """Token ids of ``prompt`` with ``target`` after it, as one text, parted where the target begins: a token that
    spans both is the target's. Encoded alone a target may be other tokens, which nobody would write there.

    Raises:
        ValueError: if nothing is left before the target, or of it.
    """
    whole = encode(tokenizer, prompt + target)
    start = _common(whole, encode(tokenizer, prompt))
    if not 0 < start < len(whole):
        raise ValueError(
            f"expected a prompt and a target of one token at least, got {prompt[-60:]!r} and {target[:60]!r}: "
            f"{start} of {len(whole)} tokens are the prompt's"
        )
    return whole[:start], whole[start:]


def pad(rows: Sequence[Sequence[int]]) -> Batch:
    """Token ids of unequal length to one batch, padded on the right (with id 0, never attended to)."""
    width = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = True
    return Batch(ids, mask)


def sentence_batches(
    tokenizer: Any, facts: Sequence[Fact], *, batch_size: int, max_length: int, skip_first: int
) -> list[Batch]:
    """Batches of the facts' sentences, in their order.

    Raises:
        ValueError: on a sentence longer than ``max_length`` tokens, or too short to leave one counted token.
    """
    return batches_of(
        [row for fact in facts for row in sentence_rows(tokenizer, fact, max_length, skip_first)], batch_size
    )


def batches_of(rows: Sequence[Sequence[int]], size: int) -> list[Batch]:
    """Token ids in batches of ``size`` rows."""
    return [pad(rows[i : i + size]) for i in range(0, len(rows), size)]


def sentence_rows(tokenizer: Any, fact: Fact, max_length: int, skip_first: int) -> list[list[int]]:
    """The token ids of each sentence.

    Raises:
        ValueError: as :func:`sentence_batches`.
    """
    rows = [encode(tokenizer, sentence) for sentence in fact.sentences]
    for row, sentence in zip(rows, fact.sentences, strict=True):
        if not skip_first + 2 <= len(row) <= max_length:
            raise ValueError(
                f"fact {fact.id!r:.80}: expected sentences of {skip_first + 2} to {max_length} tokens, got "
                f"{len(row)}: {sentence[:60]!r}"
                + "; allow more with max_length (--max-length)"
                * (len(row) > max_length)
            )
    return rows


@dataclass(frozen=True)
class Statement:
    """A sentence of a fact up to the end of its answer.

    Attributes:
        ids: of its tokens. told: places among them, 1 and above, of the tokens that may tell the fact: those of the
            answer, which is the target of a probe, or all but the first where there is no answer in it.
    """

    ids: list[int]
    told: Sequence[int]


def statements(tokenizer: Any, fact: Fact, max_length: int) -> list[Statement]:
    """The sentences of ``fact``, cut after the answer, from which on a text has it anyway.

    That is its first mention, or the last where a probe's prompt has it too: the capital of Singapore is Singapore. A
    sentence that begins with the answer leads to nothing and is left out; where every one does, all are whole.

    Raises:
        ValueError: as :func:`sentence_rows`.
    """
    rows = sentence_rows(tokenizer, fact, max_length, 0)
    answers = [(answer_pattern(probe.target.strip()), probe.prompt) for probe in fact.probes]
    cut = []
    for row, sentence in zip(rows, fact.sentences, strict=True):
        mentions = [(list(answer.finditer(sentence)), bool(answer.search(prompt))) for answer, prompt in answers]
        found = min((every[-1 if last else 0] for every, last in mentions if every), key=_start, default=None)
        if found is None:
            cut.append(Statement(row, range(1, len(row))))
            continue
        start = _common(row, encode(tokenizer, sentence[: found.start()].rstrip()))
        upto = encode(tokenizer, sentence[: found.end()])
        # A token that spans either end of the answer is the answer's.
        stop = max(start + 1, _common(row, upto) + (row[: len(upto)] != upto))
        cut.append(Statement(row[:stop], range(start, min(stop, len(row)))))
    kept = [statement for statement in cut if statement.told and statement.told[0] >= 1 + len(opening(tokenizer))]
    return kept or [Statement(row, range(1, len(row))) for row in rows]


def _start(match: re.Match[str]) -> int:
    return match.start()


def _common(row: Sequence[int], other: Sequence[int]) -> int:
    """Tokens that both begin with."""
    same = [a == b for a, b in zip(row, other, strict=False)]
    return [*same, False].index(False)


def windows(tokenizer: Any, text: str, length: int) -> Tensor:
    """``text`` as consecutive windows (N, length) of token ids, each opened by BOS where the tokenizer adds one.

    Raises:
        ValueError: if the text is shorter than one window.
    """
    ids = torch.cat([torch.tensor(_plain(tokenizer, piece), dtype=torch.long) for piece in _pieces(tokenizer, text)])
    first = opening(tokenizer)
    body = length - len(first)
    count = len(ids) // body
    if count == 0:
        raise ValueError(f"expected a text of at least {body} tokens, got {len(ids)}")
    rows = ids[: count * body].view(count, body)
    return torch.cat([torch.tensor(first, dtype=torch.long).expand(count, -1), rows], dim=1)


def _plain(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _pieces(tokenizer: Any, text: str) -> Iterator[str]:
    """``text`` in pieces, whose tokens one after the other are those of the whole.

    A tokenizer needs a hundred times the memory of its text, and gives it back after each. Where no place is found to
    cut, a piece is longer, up to the whole.
    """
    start = 0
    while len(text) - start > 2 * PIECE:
        cuts = (_cut(tokenizer, text, space.start()) for space in islice(_SPACE.finditer(text, start + PIECE), TRIES))
        end, after = next(filter(None, cuts), (len(text), len(text)))
        yield text[start:end]
        start = after
    yield text[start:]


def _cut(tokenizer: Any, text: str, at: int) -> tuple[int, int] | None:
    """Where a piece may end and the next begin: before the space ``at``, after it, or without it where a tokenizer
    sets one itself.
    """
    start, stop = max(at - AROUND, 0), at + AROUND
    whole = _plain(tokenizer, text[start:stop])
    for end, after in ((at, at), (at, at + 1), (at + 1, at + 1)):
        if whole == _plain(tokenizer, text[start:end]) + _plain(tokenizer, text[after:stop]):
            return end, after
    return None
