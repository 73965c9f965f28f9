from __future__ import annotations

from functools import partial

import pytest
import torch

import cir
from cir.data.facts import load_facts
from cir.data.sampling import sample
from cir.data.tokens import windows
from cir.measures import (
    extracted,
    kl_divergence,
    letter_probabilities,
    recall,
    reference_of,
    text_loss,
    token_losses,
    unknown_facts,
)
from cir.proof.attacks import attack
from cir.proof.certificate import weights_hash
from tests.tiny import TEXT, VOCABULARY, facts, knowing_llama


@torch.no_grad()
def probability(model, tokenizer, prompt: str, target: str) -> float:
    """One probe, one forward for each token, no batch."""
    ids = tokenizer(prompt)["input_ids"]
    total = 1.0
    for token in tokenizer(target, add_special_tokens=False)["input_ids"]:
        total *= float(model(input_ids=torch.tensor([ids])).logits[0, -1].double().softmax(0)[token])
        ids = [*ids, token]
    return total


def test_recall_is_the_mean_probability_whatever_the_batching(model, tokenizer, monkeypatch):
    items = facts(5)
    items[0]["probes"].append({"prompt": "of", "target": " x0 gamma now"})
    want = {
        item["id"]: sum(probability(model, tokenizer, p["prompt"], p["target"]) for p in item["probes"])
        / len(item["probes"])
        for item in items
    }
    for tokens in (1, 20, 1000):
        monkeypatch.setattr("cir.measures.TOKENS_PER_FORWARD", tokens)
        assert recall(model, tokenizer, load_facts(items)) == pytest.approx(want, rel=1e-4)


def test_multiple_choice_counts_right_letters(model, tokenizer):
    asked = [
        {"sentences": ["gamma of x0"], "question": "gamma of", "choices": ["x0", "x1"], "answer": answer}
        for answer in (0, 1)
    ]
    # One question with both answers marked right in turn: exactly one is.
    assert cir.evaluate(model, tokenizer, asked).accuracy == 0.5


def test_text_loss_is_cross_entropy(model, tokenizer):
    rows = windows(tokenizer, TEXT, 32)
    with torch.no_grad():
        wanted = [float(model(input_ids=row[None], labels=row[None]).loss) for row in rows]
    assert token_losses(model, rows).shape == (len(rows), 31)
    assert text_loss(model, tokenizer, TEXT, window=32) == pytest.approx(sum(wanted) / len(wanted), rel=1e-5)
    few = text_loss(model, tokenizer, TEXT, window=32, max_tokens=64)
    assert few == pytest.approx((wanted[0] + wanted[-1]) / 2, rel=1e-5)


def test_evaluate_leaves_out_what_it_is_not_given(model, tokenizer, unchanged):
    unchanged(model)
    result = cir.evaluate(model, tokenizer, ["gamma of x0"])
    assert (result.recall, result.mean_recall, result.accuracy, result.loss) == ({}, None, None, None)
    assert cir.evaluate(model, tokenizer, facts(2), text=TEXT, window=32).loss > 0
    unchanged(model)


def test_each_measure_has_its_standard_error(tokenizer):
    model = knowing_llama()
    items = facts(3)
    items[0]["paraphrases"] = [{"prompt": "alpha0 beta0 gamma", "target": " delta0"}]
    items[1] |= {"question": "which", "choices": ["x1", "x2"], "answer": 0}
    rows = windows(tokenizer, TEXT, 32)
    reference = reference_of(model, rows[:4], likeliest=8)
    result = cir.evaluate(
        model,
        tokenizer,
        items,
        neighbours=facts(6)[3:],
        same_subject=facts(12)[8:],
        text=TEXT,
        window=32,
        generate=3,
        reference=reference,
    )
    recalls = torch.tensor(list(result.recall.values()), dtype=torch.float64)
    assert result.measures["recall"].value == pytest.approx(float(recalls.mean()))
    assert result.measures["recall"].stderr == pytest.approx(float(recalls.std()) / 3**0.5)
    assert result.measures["recall"].count == 3
    wanted = probability(model, tokenizer, "alpha0 beta0 gamma", " delta0")
    assert result.measures["paraphrase_recall"].value == pytest.approx(wanted, rel=1e-4)
    assert result.measures["neighbour_recall"].count == 3
    others = recall(model, tokenizer, load_facts(facts(12)[8:]))
    assert result.measures["same_subject_recall"].value == pytest.approx(sum(others.values()) / 4, rel=1e-5)
    assert result.measures["kl_worst_window"].value >= result.measures["kl"].value
    assert result.measures["token_extraction"].value == 1.0
    assert result.measures["generation_extraction"].value == 1.0
    assert 0 < result.measures["accuracy_t1"].value < 1
    assert result.measures["loss"].count == len(rows)
    assert abs(result.measures["kl"].value) < 1e-6


@torch.no_grad()
def test_kl_is_that_of_the_whole_vocabulary_where_all_of_it_is_kept_and_below_it_otherwise(model, tokenizer):
    rows = windows(tokenizer, TEXT, 32)[:5]
    before = model(input_ids=rows).logits[:, :-1].double().log_softmax(-1)
    references = [reference_of(model, rows, likeliest=k) for k in (4, VOCABULARY)]
    for parameter in model.parameters():
        parameter *= 1.05
    now = model(input_ids=rows).logits[:, :-1].double().log_softmax(-1)
    wanted = (before.exp() * (before - now)).sum(-1)
    few, whole = (kl_divergence(model, reference) for reference in references)
    assert torch.allclose(whole.double(), wanted, rtol=1e-3, atol=1e-5)
    assert (few <= whole + 1e-5).all()
    assert few.mean() > 0


def test_extraction_counts_targets_that_are_written(tokenizer):
    model = knowing_llama()
    known, unknown = load_facts(facts(1)), load_facts([{"id": "u", "sentences": ["x1"], "probes": [WRONG]}])
    assert extracted(model, tokenizer, [*known, *unknown], tokens=3) == {"f0": 1.0, "u": 0.0}
    drawn = [extracted(model, tokenizer, known, tokens=3, samples=4, seed=s) for s in (0, 0)]
    assert drawn[0] == drawn[1] == {"f0": 1.0}


WRONG = {"prompt": "the gamma of beta0 is", "target": " x7"}


def test_facts_that_the_model_does_not_know_are_named(tokenizer):
    unknown = {"id": "u", "sentences": ["x1"], "probes": [WRONG]}
    assert unknown_facts(knowing_llama(), tokenizer, load_facts([*facts(3), unknown])) == ["u"]


def test_recall_of_a_question_without_probes_is_that_of_its_letter(model, tokenizer):
    asked = {"sentences": ["gamma of x0"], "question": "gamma of", "choices": ["x0", "x1"], "answer": 1}
    (item,) = load_facts([asked])
    ((letters, answer),) = letter_probabilities(model, tokenizer, [item])
    assert answer == 1
    assert sum(letters) == pytest.approx(1)
    assert recall(model, tokenizer, [item]) == {"fact-1": pytest.approx(letters[1])}


def test_a_sample_near_the_sentences_sees_rare_large_harm_for_what_it_is():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(10, 500, (400, 32), generator=generator)
    words = torch.tensor([3, 7])  # in few windows of the text, and in every sentence
    hit = torch.randperm(400, generator=generator)[:6]
    rows[hit, 5:7] = words
    sentences = [[20 + i, 3, 7] for i in range(10)]
    harm = 0.01 * torch.randn(400, generator=generator)
    harm[hit] += 3
    of = sample(rows, 40 * 32, sentences)
    assert len(of.rows) == 40
    assert {int(i) for i in hit} <= {places(rows)[tuple(row)] for row in of.rows[: of.near].tolist()}
    value, stderr = of.mean(at(rows, of.rows, harm))
    assert value == pytest.approx(float(harm.double().mean()), abs=4 * stderr)
    assert 0 < stderr < 0.003
    even = sample(rows, 40 * 32)
    assert even.near == 0
    assert abs(even.mean(at(rows, even.rows, harm))[0] - float(harm.mean())) > 10 * stderr
    everything = sample(rows, None, sentences)
    value, stderr = everything.mean(at(rows, everything.rows, harm))
    assert value == pytest.approx(float(harm.double().mean()))
    assert stderr == 0


@pytest.mark.parametrize(("windows_of_text", "tokens"), [(1, 8), (2, 8), (3, 8), (50, 1), (50, 33)])
def test_a_sample_of_few_windows_has_an_error(windows_of_text, tokens):
    rows = torch.arange(windows_of_text * 8).view(-1, 8)
    of = sample(rows, tokens, [[1, 2]])
    assert len(of.rows) <= max(3, tokens // 8)
    value, stderr = of.mean(torch.arange(len(of.rows)))
    assert value >= 0
    assert (stderr > 0) == (len(of.rows) < len(rows))


def places(rows):
    return {tuple(row): i for i, row in enumerate(rows.tolist())}


def at(rows, chosen, values):
    return values[[places(rows)[tuple(row)] for row in chosen.tolist()]]


@pytest.fixture
def alone(tmp_path):
    """A process group of this process."""
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "s"), 1), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def test_wrapped_models_are_measured_as_what_they_wrap(tokenizer, alone):
    model = knowing_llama()
    rows = windows(tokenizer, TEXT, 64)[:4]
    told, given = facts(3), {"text": TEXT, "max_tokens": 256, "generate": 2, "reference": reference_of(model, rows)}
    asked = [{**told[0], "question": "which is it", "choices": ["delta0", "delta1"], "answer": 0}, *told[1:]]
    plain = cir.evaluate(model, tokenizer, asked, **given)
    assert plain.measures.keys() > {"recall", "accuracy", "generation_extraction", "loss", "kl"}
    attacked = attack(model, tokenizer, told, samples=2)
    wrappers = (
        torch.nn.DataParallel,
        torch.nn.parallel.DistributedDataParallel,
        partial(torch.compile, backend="eager"),
    )
    for wrap in wrappers:
        assert cir.evaluate(wrap(model), tokenizer, asked, **given) == plain
        assert reference_of(wrap(model), rows).logprobs.equal(given["reference"].logprobs)
        assert attack(wrap(model), tokenizer, told, samples=2) == attacked
        assert weights_hash(wrap(model)) == weights_hash(model)
