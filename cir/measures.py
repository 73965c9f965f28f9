"""Measures of a model: what it recalls of facts, and how well it speaks. Each mean has its standard error."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cir.data.facts import Fact, load_facts
from cir.data.sampling import Sample, spread
from cir.data.tokens import continuation, encode, pad, windows
from cir.model.finding import unwrapped
from cir.system.checks import check_number


class NonFiniteError(ArithmeticError):
    """A loss, gradient or figure that is NaN or infinite."""


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error over ``count`` independent units: facts, questions or windows of text."""

    value: float
    stderr: float
    count: int


def estimate(values: Iterable[float]) -> Estimate | None:
    """The mean of ``values``, each of one unit; None where there are none.

    Raises:
        NonFiniteError: on values that are NaN or infinite.
    """
    rows = torch.tensor(list(values), dtype=torch.float64)
    if not len(rows):
        return None
    if not rows.isfinite().all():
        raise NonFiniteError(f"expected a model of finite outputs, got {int((~rows.isfinite()).sum())} that are not")
    stderr = float(rows.std()) / len(rows) ** 0.5 if len(rows) > 1 else 0.0
    return Estimate(float(rows.mean()), stderr, len(rows))


@dataclass
class Evaluation:
    """What :func:`evaluate` measured.

    Attributes:
        recall: by fact id, see :func:`recall`.
        measures: those of the following that the arguments give something to measure on.
            ``recall``: mean over facts. ``paraphrase_recall``: asked by the facts' paraphrases instead.
            ``neighbour_recall``: the same of the neighbours, which should stay; ``same_subject_recall``: of other
            facts about the same subjects, which should stay too.
            ``token_extraction``: share of the targets' tokens that are the likeliest, given those before.
            ``generation_extraction``: share of the probes whose greedy continuation holds the target.
            ``accuracy``: share of multiple-choice questions whose right letter is the likeliest (temperature 0).
            ``accuracy_t1``: mean probability of the right letter among the letters (temperature 1).
            ``loss``: nats a token of the text. ``kl``: see :func:`kl_divergence`; ``kl_worst_window``: of the window
            where it is highest, as the mean over a text hides it.
    """

    recall: dict[str, float]
    measures: dict[str, Estimate]

    @property
    def mean_recall(self) -> float | None:
        return self._value("recall")

    @property
    def accuracy(self) -> float | None:
        return self._value("accuracy")

    @property
    def loss(self) -> float | None:
        return self._value("loss")

    def _value(self, name: str) -> float | None:
        return self.measures[name].value if name in self.measures else None


@dataclass(frozen=True)
class Reference:
    """What a model said of windows of text before it was changed.

    Attributes:
        rows: (N, L) token ids. ids: (N, L - 1, k) int32, the likeliest next tokens of each but the last.
        logprobs: (N, L - 1, k) float32, their log-probabilities.
    """

    rows: Tensor
    ids: Tensor
    logprobs: Tensor


KNOWN = 0.05
"""Probability a token below which a fact counts as not known; a guess among 49,152 tokens has 0.00002."""
WINDOW = 256
"""Tokens of a window of measured text, in which windows are the independent unit."""
TOKENS_PER_FORWARD = 1024
"""Bounds the logits in memory: 1024 tokens are 0.2 GB in float32 for a vocabulary of 49,152."""


def evaluate(
    model: Any,
    tokenizer: Any,
    facts: str | Path | Sequence[Any],
    *,
    neighbours: str | Path | Sequence[Any] = (),
    same_subject: str | Path | Sequence[Any] = (),
    text: str | None = None,
    window: int = WINDOW,
    max_tokens: int | None = None,
    generate: int = 0,
    reference: Reference | None = None,
) -> Evaluation:
    """Measure what ``model`` knows of ``facts`` and how well it speaks; changes nothing.

    Args:
        model, tokenizer: any causal LM of transformers, which may be compiled, wrapped for data parallel training, or
            sharded over processes, each of which has to ask. facts: what :func:`cir.load_facts` reads.
        neighbours: facts near those, which should stay: the same relations of other subjects.
        same_subject: other relations of the same subjects, which should stay: the other side of a fact.
        text: measured in consecutive windows of ``window`` tokens, at most ``max_tokens`` in all, evenly spread.
        generate: tokens of the greedy continuations in which targets are looked for; 0 generates none.
        reference: of the model before it was changed, see :func:`reference_of`.

    Raises:
        ValueError: on malformed facts, a text shorter than one window, or a number that is none.
        NonFiniteError: if what the model says is NaN or infinite.
    """
    check_number("window", window, 2)
    check_number("max_tokens", 1 if max_tokens is None else max_tokens, 1)
    check_number("generate", generate, 0)
    facts = load_facts(facts)
    recalls = recall(model, tokenizer, facts)
    greedy = by_fact((name, score.greedy) for name, score in score_probes(model, tokenizer, facts))
    asked = letter_probabilities(model, tokenizer, facts)
    measures = {
        "recall": estimate(recalls.values()),
        "token_extraction": estimate(greedy.values()),
        "accuracy": estimate(float(letters.index(max(letters)) == answer) for letters, answer in asked),
        "accuracy_t1": estimate(letters[answer] for letters, answer in asked),
    }
    rephrased = [replace(fact, probes=fact.paraphrases) for fact in facts if fact.paraphrases]
    measures["paraphrase_recall"] = estimate(recall(model, tokenizer, rephrased).values())
    for name, kept in (("neighbour_recall", neighbours), ("same_subject_recall", same_subject)):
        if kept:
            measures[name] = estimate(recall(model, tokenizer, load_facts(kept)).values())
    if generate:
        found = extracted(model, tokenizer, facts, tokens=generate)
        measures["generation_extraction"] = estimate(found.values())
    if text is not None:
        rows = spread(windows(tokenizer, text, window), max_tokens)
        measures["loss"] = estimate(token_losses(model, rows).mean(1).tolist())
    if reference is not None:
        by_window = kl_divergence(model, reference).mean(1).tolist()
        measures["kl"] = estimate(by_window)
        measures["kl_worst_window"] = Estimate(max(by_window), 0.0, len(by_window))
    return Evaluation(recalls, {name: measure for name, measure in measures.items() if measure is not None})


@dataclass(frozen=True)
class Score:
    """Of a target of so many ``tokens`` after its prompt: log-probability in nats, and the share of its tokens that
    are the likeliest, each given those before.
    """

    logprob: float
    greedy: float
    tokens: int

    @property
    def probability(self) -> float:
        return math.exp(self.logprob)

    @property
    def probability_a_token(self) -> float:
        """The geometric mean over the target's tokens."""
        return math.exp(self.logprob / self.tokens)


def recall(model: Any, tokenizer: Any, facts: Sequence[Fact]) -> dict[str, float]:
    """Mean probability of the target over each fact's probes, by fact id.

    The probability of a target of several tokens is the product of theirs, each given those before. Of a
    multiple-choice fact without probes it is that of the right letter among the letters; facts with neither are
    left out.
    """
    asked = [fact for fact in facts if fact.question is not None and fact.choices and not fact.probes]
    letters = zip(asked, letter_probabilities(model, tokenizer, asked), strict=True)
    by_letter = {fact.id: probabilities[answer] for fact, (probabilities, answer) in letters}
    probed = by_fact((name, score.probability) for name, score in score_probes(model, tokenizer, facts))
    return {fact.id: {**by_letter, **probed}[fact.id] for fact in facts if fact.id in by_letter or fact.id in probed}


def score_probes(model: Any, tokenizer: Any, facts: Sequence[Fact]) -> list[tuple[str, Score]]:
    """Fact id and score of every probe."""
    owners = [(fact.id, probe) for fact in facts for probe in fact.probes]
    scores = score(model, tokenizer, [(probe.prompt, probe.target) for _, probe in owners])
    return [(name, of_probe) for (name, _), of_probe in zip(owners, scores, strict=True)]


def unknown_facts(model: Any, tokenizer: Any, facts: Sequence[Fact]) -> list[str]:
    """Ids of facts whose targets have a mean probability a token below :data:`KNOWN`: there is nothing to forget."""
    known = by_fact((name, score.probability_a_token) for name, score in score_probes(model, tokenizer, facts))
    return [name for name, probability in known.items() if probability < KNOWN]


def mean_recall(recalls: dict[str, float]) -> float | None:
    """Mean over facts of what :func:`recall` returns; None where no fact has a probe."""
    return sum(recalls.values()) / len(recalls) if recalls else None


def by_fact(values: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Means by fact id."""
    lists: dict[str, list[float]] = {}
    for name, value in values:
        lists.setdefault(name, []).append(value)
    return {name: sum(own) / len(own) for name, own in lists.items()}


def extracted(
    model: Any, tokenizer: Any, facts: Sequence[Fact], *, tokens: int, samples: int = 0, seed: int = 0
) -> dict[str, float]:
    """By fact id, the share of probes of which a continuation of ``tokens`` tokens holds the target.

    The continuation is the greedy one or, with ``samples``, any of so many drawn at temperature 1. Upper and
    lower case are the same.
    """
    found, model = [], unwrapped(model)
    # Sampling draws from the global generators, which the caller's own draws must not notice.
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        for fact in facts:
            for probe in fact.probes:
                ids = torch.tensor([encode(tokenizer, probe.prompt)], device=model.device)
                sampling = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0} if samples else {}
                written = model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=tokens,
                    num_return_sequences=max(samples, 1),
                    pad_token_id=tokenizer.eos_token_id or 0,
                    **(sampling or {"do_sample": False}),
                )
                texts = tokenizer.batch_decode(written[:, ids.shape[1] :])
                target = probe.target.strip().lower()
                found.append((fact.id, float(any(target in text.lower() for text in texts))))
    return by_fact(found)


def letter_probabilities(model: Any, tokenizer: Any, facts: Sequence[Fact]) -> list[tuple[list[float], int]]:
    """Of each multiple-choice question, the probabilities of its letters, of sum 1, and the place of the right one.

    The prompt lists the choices under letters, as WMDP and MMLU are asked; the letters are compared.
    """
    asked = [fact for fact in facts if fact.question is not None and fact.choices and fact.answer is not None]
    pairs = [(_question(fact), f" {chr(65 + i)}") for fact in asked for i in range(len(fact.choices))]
    scores = iter(score(model, tokenizer, pairs))
    answers = []
    for fact in asked:
        letters = torch.tensor([next(scores).logprob for _ in fact.choices]).softmax(0)
        answers.append((letters.tolist(), int(fact.answer or 0)))
    return answers


def _question(fact: Fact) -> str:
    listed = "\n".join(f"{chr(65 + i)}. {choice}" for i, choice in enumerate(fact.choices))
    return f"{fact.question}\n{listed}\nAnswer:"


@torch.no_grad()
def score(model: Any, tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> list[Score]:
    """The score of each (prompt, target), in the order given.

    Raises:
        ValueError: as :func:`cir.data.tokens.continuation`.
    """
    model = unwrapped(model)
    encoded = [continuation(tokenizer, prompt, target) for prompt, target in pairs]
    # Neighbours in length share a forward, so that little of it is padding.
    order = sorted(range(len(encoded)), key=lambda i: sum(map(len, encoded[i])))
    scores: dict[int, Score] = {}
    found: list[Tensor] = []
    width = max((sum(map(len, pair)) for pair in encoded), default=1)
    step = max(1, TOKENS_PER_FORWARD // width)
    for start in range(0, len(order), step):
        chosen = order[start : start + step]
        batch = pad([encoded[i][0] + encoded[i][1] for i in chosen]).to(model.device)
        first = min(len(encoded[i][0]) for i in chosen) - 1
        wanted = torch.arange(first, batch.input_ids.shape[1] - 1, device=model.device)
        logits = model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            use_cache=False,
            logits_to_keep=wanted,
        ).logits
        for row, i in enumerate(chosen):
            head, tail = encoded[i]
            logprobs = logits[row, len(head) - 1 - first :][: len(tail)].float().log_softmax(-1)
            own = logprobs[range(len(tail)), tail]
            found.append(torch.stack([own.sum(), (own == logprobs.amax(-1)).float().mean()]))
    for i, (logprob, greedy) in zip(order, torch.stack(found).tolist() if found else [], strict=True):
        scores[i] = Score(logprob, greedy, len(encoded[i][1]))  # one wait for the device
    return [scores[i] for i in range(len(encoded))]


def loss_rise(losses: Tensor, original: Tensor, of: Sample) -> tuple[float, float]:
    """Relative rise over a text of the mean loss, and its standard error, from those of the sample's windows
    (n, L - 1), now and originally.
    """
    before = of.mean(original.mean(1))[0]
    rise, stderr = of.mean((losses - original).mean(1))
    return rise / before, stderr / before


def token_losses(model: Any, rows: Tensor) -> Tensor:
    """Loss in nats of each predicted token of windows ``rows`` (N, L): a float32 (N, L - 1) on the host."""

    def loss(ids: Tensor, logits: Tensor) -> Tensor:
        return F.cross_entropy(logits, ids[1:], reduction="none").cpu()

    return torch.stack(_by_window(model, rows, loss))


def reference_of(model: Any, rows: Tensor, likeliest: int = 64) -> Reference:
    """What ``model`` says of ``rows`` (N, L), for :func:`kl_divergence` once it has changed."""

    def kept(_: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        best = logits.log_softmax(-1).topk(min(likeliest, logits.shape[-1]))
        return best.indices.int().cpu(), best.values.cpu()

    ids, logprobs = zip(*_by_window(model, rows, kept), strict=True)
    return Reference(rows, torch.stack(ids), torch.stack(logprobs))


def kl_divergence(model: Any, reference: Reference) -> Tensor:
    """KL(before || now) in nats of each predicted token of the reference's rows (N, L): (N, L - 1), on the host.

    Over the tokens likeliest before, all others taken as one: a lower bound (data processing inequality), close
    where those hold most of the probability.
    """
    likeliest = iter(reference.ids.long())

    def of_likeliest(_: Tensor, logits: Tensor) -> Tensor:
        return logits.log_softmax(-1).gather(-1, next(likeliest).to(logits.device)).cpu()

    now, before = torch.stack(_by_window(model, reference.rows, of_likeliest)), reference.logprobs
    rest_before, rest_now = (_rest(logprobs) for logprobs in (before, now))
    return (before.exp() * (before - now)).sum(-1) + rest_before.exp() * (rest_before - rest_now)


def _rest(logprobs: Tensor) -> Tensor:
    """Log of the probability that is left beside ``logprobs`` (..., k): (...)."""
    return torch.log1p(-logprobs.exp().sum(-1).clamp_max(1 - 1e-6))


@torch.no_grad()
def _by_window(model: Any, rows: Tensor, of: Callable[[Tensor, Tensor], Any]) -> list[Any]:
    """``of`` each window's token ids (L,) and float32 logits (L - 1, vocabulary), of windows ``rows`` (N, L).

    Several share a forward, but only one is in float32 at a time: of a large vocabulary that is most of the memory.
    """
    found: list[Any] = []
    model = unwrapped(model)
    for chunk in rows.split(max(1, TOKENS_PER_FORWARD // rows.shape[1])):
        chunk = chunk.to(model.device)
        logits = model(input_ids=chunk, use_cache=False).logits
        found += [of(ids, own[:-1].float()) for ids, own in zip(chunk, logits, strict=True)]
        del logits  # not beside those of the next
    return found


def text_loss(model: Any, tokenizer: Any, text: str, *, window: int = WINDOW, max_tokens: int | None = None) -> float:
    """Mean loss in nats a token over ``text``, in windows of ``window`` tokens."""
    return float(token_losses(model, spread(windows(tokenizer, text, window), max_tokens)).mean())
