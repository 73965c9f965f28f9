"""What a tokenizer adds to a text."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Regex, Tokenizer, normalizers
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel, Split
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

import cir
from cir.data.facts import load_facts
from cir.data.shipped import builtin_text
from cir.data.tokens import continuation, encode, opening, statements, windows
from cir.measures import extracted, recall
from tests.tiny import TEXT, facts, knowing_llama, word_tokenizer

FACTS = load_facts(facts(12))


def closing_tokenizer():
    """One that puts EOS after every text, beside BOS before it."""
    tokenizer = word_tokenizer()
    special = [("<s>", 1), ("<unk>", 0)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A <unk>", special_tokens=special)
    return tokenizer


def test_what_closes_a_text_is_left_out():
    tokenizer, closing = word_tokenizer(), closing_tokenizer()
    sentence = FACTS[0].sentences[1]
    assert closing(sentence)["input_ids"] == [*tokenizer(sentence)["input_ids"], 0]
    assert opening(closing) == opening(tokenizer) == [1]
    assert encode(closing, sentence) == encode(tokenizer, sentence) == tokenizer(sentence)["input_ids"]
    for fact in FACTS[:2]:
        assert statements(closing, fact, 64) == statements(tokenizer, fact, 64)
    assert torch.equal(windows(closing, TEXT, 32), windows(tokenizer, TEXT, 32))


def test_nothing_changes_with_a_tokenizer_that_closes_texts():
    models = [knowing_llama(), knowing_llama()]
    config = cir.CIRConfig(layers=0.5, budget=9.0, worst_window=9.0, max_steps=4)
    reports = []
    for model, tokenizer in zip(models, (word_tokenizer(), closing_tokenizer()), strict=True):
        assert extracted(model, tokenizer, FACTS[:2], tokens=2) == {"f0": 1.0, "f1": 1.0}
        reports.append(
            cir.unlearn(model, tokenizer, FACTS[:3], contrast=FACTS[6:], retain=TEXT, config=config, progress=False)
        )
    assert reports[0].before.recall == reports[1].before.recall
    assert reports[0].before.mean_recall > 0.9
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(a, b)


def test_a_tokenizer_whose_special_tokens_change_the_text_is_refused():
    def tokenizer(text, add_special_tokens=True):
        return {"input_ids": [1, 7] if add_special_tokens else [8]}

    with pytest.raises(ValueError, match=r"alike with special tokens and without, got \[1, 7\], \[8\]"):
        encode(tokenizer, "a")


def prepending_tokenizer():
    """One that writes a mark for each space, and one before every text, as those of Mistral and Phi-3 do."""
    words = {word: i for word, i in word_tokenizer().get_vocab().items() if word not in ("<s>", "<unk>")}
    vocabulary = {f"\u2581{word}": i for word, i in words.items()}
    plain = Tokenizer(WordLevel({**vocabulary, "<s>": 1, "<unk>": 0}, unk_token="<unk>"))
    plain.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    plain.pre_tokenizer = Split(Regex("\u2581"), "merged_with_next")
    plain.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>", bos_token="<s>")


def test_a_target_has_the_tokens_that_it_has_after_its_prompt():
    words, marks, model = word_tokenizer(), prepending_tokenizer(), knowing_llama()
    probe = FACTS[0].probes[0]
    alone = marks(probe.target, add_special_tokens=False)["input_ids"]
    head, tail = continuation(marks, probe.prompt, probe.target)
    assert (head, tail) == continuation(words, probe.prompt, probe.target)
    assert alone != tail
    assert recall(model, marks, FACTS) == pytest.approx(recall(model, words, FACTS))
    assert min(recall(model, marks, FACTS).values()) > 0.5
    # A token that spans both is the target's.
    assert continuation(words, "the alpha of be", "ta1 is") == continuation(words, "the alpha of", " beta1 is")
    for prompt, target in (("the alpha", ""), ("the alpha", "  ")):
        with pytest.raises(ValueError, match="expected a prompt and a target of one token at least, got 'the alpha'"):
            continuation(words, prompt, target)


def test_a_text_that_is_opened_already_is_opened_once():
    tokenizer = word_tokenizer()
    assert encode(tokenizer, f"{tokenizer.bos_token} the alpha") == encode(tokenizer, "the alpha")


def test_an_answer_that_its_prompt_has_too_is_the_last_mention():
    tokenizer = word_tokenizer(["The capital of Singapore is Singapore . Rome Italy"])
    probes = [{"prompt": "The capital of Singapore is", "target": " Singapore"}]
    said = {"id": "s", "sentences": ["The capital of Singapore is Singapore ."], "probes": probes}
    (statement,) = statements(tokenizer, load_facts([said])[0], 64)
    assert tokenizer.decode(statement.ids) == "<s> The capital of Singapore is Singapore"
    assert list(statement.told) == [6]
    # Where it is no part of the question, what follows its first mention is a copy.
    twice = {"id": "t", "sentences": ["The capital of Italy is Rome . Rome is The capital"]}
    twice["probes"] = [{"prompt": "The capital of Italy is", "target": " Rome"}]
    (statement,) = statements(tokenizer, load_facts([twice])[0], 64)
    assert list(statement.told) == [6]
    assert len(statement.ids) == 7


def byte_tokenizer():
    """One of pieces of words, each with the space before it, as that of GPT-2."""
    plain = Tokenizer(BPE())
    plain.pre_tokenizer = ByteLevel(add_prefix_space=False)
    trainer = BpeTrainer(vocab_size=600, initial_alphabet=ByteLevel.alphabet(), show_progress=False)
    plain.train_from_iterator([builtin_text()[:50_000]], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=plain)


@pytest.mark.parametrize("made", [word_tokenizer, prepending_tokenizer, byte_tokenizer])
@pytest.mark.parametrize(
    "text", [builtin_text()[:60_000], TEXT, "x" * 20_000, "word\n" * 5000, "\u5b57\u3002\n" * 5000]
)
def test_a_long_text_has_in_pieces_the_tokens_of_the_whole(made, text, monkeypatch):
    tokenizer = made()
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    monkeypatch.setattr("cir.data.tokens.PIECE", 1000)
    given = []

    def watched(text, **settings):
        given.append(len(text))
        return tokenizer(text, **settings)

    body = 64 - len(opening(tokenizer))
    if len(whole) >= body:
        assert windows(watched, text, 64)[:, -body:].flatten().tolist() == whole[: len(whole) // body * body]
    if " " in text:
        assert max(given) < 4000


def test_a_tokenizer_that_cannot_be_cut_is_given_the_whole(monkeypatch):
    monkeypatch.setattr("cir.data.tokens.PIECE", 100)
    given = []

    def tokenizer(text, **_):
        given.append(text)
        return {"input_ids": [len(text), *map(ord, text)]}

    text = "a few words " * 100
    assert windows(tokenizer, text, 50).flatten().tolist() == [1200, *map(ord, text)][:1200]
    assert text in given
