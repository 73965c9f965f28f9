from __future__ import annotations

from dataclasses import asdict

import pytest

from cir.proof.verdict import BACK, FORGOTTEN, HARMED, KEPT, NOT_FORGOTTEN, NOT_SHOWN, PARTLY, Thresholds, judge
from tests.proof.stating import failed, forgotten, stating


def words(content) -> dict[str, str]:
    return judge(content).stated()["claims"]


def test_a_run_that_failed_is_called_so():
    verdict = judge(failed())
    assert verdict.heading == "Partly forgotten; comes back under fine-tuning"
    assert [claim.word for claim in verdict.claims] == [PARTLY, NOT_FORGOTTEN, BACK, PARTLY, KEPT, KEPT]
    why = {claim.name: claim.why for claim in verdict.claims}
    assert why["forgotten"] == "Recall 61 % before, 43 % after, of n = 12; bound: at most 5.0 %."
    assert (
        why["fine-tuning"] == "Fine-tuning, the worst of all: 95 % before, 93 % after, of n = 1; bound: at most 20 %."
    )


def test_a_run_in_which_all_holds_is_called_so():
    verdict = judge(forgotten())
    assert verdict.heading == "Forgotten, and the rest kept"
    assert [claim.word for claim in verdict.claims] == [FORGOTTEN] * 4 + [KEPT] * 2


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"recall": (0.6, 0.004)}, FORGOTTEN),
        ({"recall": (0.6, 0.07)}, PARTLY),  # above the bound of 5 %
        ({"recall": (0.3, 0.04)}, PARTLY),  # above a tenth of before
        ({"recall": (0.6, 0.5)}, NOT_FORGOTTEN),
        ({"recall": (0.6, 0.7)}, NOT_FORGOTTEN),
        ({"recall": (0.6, 0.004), "units": 4}, NOT_SHOWN),
        ({"recall": (0.6, 0.004), "units": 1}, NOT_SHOWN),
        ({"recall": (0.6, 0.4), "units": 1}, PARTLY),  # one that is still known is enough
        ({"recall": (0.6, 0.0), "each": [0.19, *[0.0] * 11]}, NOT_SHOWN),  # the interval is up to 5.1 %
        ({"recall": (0.6, 0.0), "each": [0.9, *[0.0] * 59], "units": 60}, PARTLY),  # the mean of 1.5 % hides it
        ({"recall": (0.6, 0.004), "thresholds": asdict(Thresholds(units=13))}, NOT_SHOWN),
        ({"recall": (0.6, 0.07), "thresholds": asdict(Thresholds(0.5, 0.1))}, FORGOTTEN),
    ],
)
def test_forgotten_as_asked(changes, word):
    assert words(stating(**changes))["forgotten"] == word


@pytest.mark.parametrize(
    ("measures", "word"),
    [
        ({}, NOT_SHOWN),
        ({"paraphrase_recall": (0.5, 0.01)}, FORGOTTEN),
        ({"paraphrase_recall": (0.5, 0.2)}, PARTLY),
        ({"paraphrase_recall": (0.5, 0.49)}, NOT_FORGOTTEN),
        ({"paraphrase_recall": (0.1, 0.01)}, NOT_SHOWN),  # found too little before
        ({"paraphrase_recall": (0.1, 0.3)}, NOT_FORGOTTEN),
        ({"generation_extraction": (0.9, 0.0)}, NOT_SHOWN),  # the questions are the same
        ({"generation_extraction": (0.9, 0.5)}, PARTLY),
        ({"paraphrase_recall": (0.5, 0.01), "generation_extraction": (0.9, 0.0)}, FORGOTTEN),
        ({"paraphrase_recall": (0.5, 0.01), "generation_extraction": (0.9, 0.8)}, NOT_FORGOTTEN),
    ],
)
def test_other_wordings(measures, word):
    assert words(stating(measures, recall=(0.6, 0.001), units=40))["other wordings"] == word


def test_few_answers_that_are_all_wrong_show_nothing():
    measures = {"paraphrase_recall": (0.5, 0.01), "generation_extraction": (0.9, 0.0)}
    of_twelve = judge(stating(measures, recall=(0.6, 0.001), units=12)).claims[1]
    assert of_twelve.word == NOT_SHOWN  # the rate may be up to 24 %
    assert "The interval is not within it." in of_twelve.why


@pytest.mark.parametrize(
    ("pair", "asked", "word"),
    [
        ((0.9, 0.01), 12, FORGOTTEN),
        ((0.9, 0.01), 1, NOT_SHOWN),
        ((0.9, 0.93), 1, BACK),
        ((0.9, 0.3), 12, BACK),
        ((0.4, 0.12), 12, BACK),  # above a quarter of before
    ],
)
def test_fine_tuning(pair, asked, word):
    attacks = {"relearning, worst": pair, "relearning, sgd": (0.0, 0.0)}
    assert words(stating(attacks=attacks, asked=asked))["fine-tuning"] == word


@pytest.mark.parametrize(
    ("attacks", "word"),
    [
        ({"few_shot": (0.6, 0.01), "quantized_8bit": (0.6, 0.01)}, FORGOTTEN),
        ({"few_shot": (0.6, 0.01), "quantized_8bit": (0.6, 0.3)}, PARTLY),
        ({"few_shot": (0.6, 0.6), "quantized_8bit": (0.6, 0.3)}, NOT_FORGOTTEN),
        ({"few_shot": (0.6, 0.01), "linear_probe": (0.1, 0.1)}, FORGOTTEN),  # which shows nothing
        ({"linear_probe": (0.1, 0.1)}, NOT_SHOWN),
        ({"relearning, worst": (0.9, 0.01)}, NOT_SHOWN),
    ],
)
def test_cheap_attacks(attacks, word):
    assert words(stating(attacks=attacks, asked=12))["cheap attacks"] == word


@pytest.mark.parametrize(("left", "word"), [(0.01, FORGOTTEN), (0.4, PARTLY), (0.6, NOT_FORGOTTEN)])
def test_an_attack_that_cannot_be_made_before_is_held_against_what_was_known(left, word):
    content = stating(attacks={"pruned": (0.0, left)}, asked=12)
    del content["before"]["attacks"]["pruned"]
    assert words(content)["cheap attacks"] == word


@pytest.mark.parametrize(
    ("kept", "units", "word"),
    [
        ({"neighbour_recall": (0.5, 0.49)}, 12, KEPT),
        ({"neighbour_recall": (0.5, 0.44)}, 12, HARMED),
        ({"neighbour_recall": (0.5, 0.44)}, 1, HARMED),
        ({"neighbour_recall": (0.5, 0.49)}, 4, NOT_SHOWN),
        ({"neighbour_recall": (0.01, 0.01)}, 12, NOT_SHOWN),  # hardly known before
        ({"neighbour_recall": (0.5, 0.5), "same_subject_recall": (0.5, 0.2)}, 12, HARMED),
        ({}, 12, NOT_SHOWN),
    ],
)
def test_other_facts(kept, units, word):
    assert words(stating(kept=kept, units=units))["other facts"] == word


def test_other_facts_of_which_some_were_lost_and_others_gained_are_not_shown_to_be_kept():
    content = stating(kept={"neighbour_recall": (0.5, 0.5)}, units=6)
    content["after"]["kept"]["neighbour_recall"] = dict(zip("012345", (0.1, 0.9, 0.1, 0.9, 0.1, 0.9), strict=True))
    assert words(content)["other facts"] == NOT_SHOWN


@pytest.mark.parametrize(
    ("loss", "measures", "word"),
    [
        ((2.7, 2.702), {}, KEPT),
        ((2.7, 2.6), {"kl": (0.0, 0.2)}, HARMED),  # a lower loss does not make up for it
        ((2.7, 2.8), {"kl": (0.0, 0.001)}, HARMED),
        ((2.7, 2.702), {"kl": (0.0, 0.001), "kl_worst_window": (0.0, 0.4)}, HARMED),
        ((2.7, 2.702), {"kl": (0.0, 0.001), "kl_worst_window": (0.0, 0.1)}, KEPT),
        (None, {}, NOT_SHOWN),
    ],
)
def test_language(loss, measures, word):
    assert words(stating(measures, loss=loss))["language"] == word


@pytest.mark.parametrize(
    ("content", "heading"),
    [
        (
            stating(recall=(0.6, 0.001), attacks={"few_shot": (0.6, 0.6), "relearning, worst": (0.9, 0.9)}),
            "Partly forgotten; comes back under fine-tuning; not shown: other wordings, other facts, language",
        ),
        (
            stating({"paraphrase_recall": (0.6, 0.6)}, recall=(0.6, 0.001), units=2),
            "Partly forgotten; not shown: fine-tuning, cheap attacks, other facts, language",
        ),
        (
            stating(recall=(0.6, 0.001)),
            "Forgotten as asked; not shown: other wordings, fine-tuning, cheap attacks, other facts, language",
        ),
        (
            stating(recall=(0.6, 0.001), units=2, kept={"neighbour_recall": (0.5, 0.1)}, loss=(2.0, 3.0)),
            "Not shown to be forgotten; harmed: other facts, language; "
            "not shown: other wordings, fine-tuning, cheap attacks",
        ),
        (
            stating(recall=(0.6, 0.6), attacks={"relearning, worst": (0.9, 0.9)}, loss=(2.0, 2.0)),
            "Not forgotten; not shown: other wordings, cheap attacks, other facts",
        ),
        (
            stating(
                {"paraphrase_recall": (0.6, 0.59)},
                {"relearning, worst": (0.9, 0.9), "few_shot": (0.6, 0.01)},
                recall=(0.6, 0.001),
                kept={"neighbour_recall": (0.5, 0.5)},
                loss=(2.0, 2.0),
                asked=12,
            ),
            "Partly forgotten; comes back under fine-tuning",
        ),
        (
            {
                **forgotten(),
                "after": {**forgotten()["after"], "kept": {"loss": forgotten()["after"]["kept"]["loss"]}},
            },
            "Forgotten; not shown: other facts",
        ),
    ],
)
def test_the_heading_names_all_that_does_not_hold(content, heading):
    assert judge(content).heading == heading


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kept_share": 1.1}, "kept_share: expected at most 1, got 1.1"),
        ({"kl": float("nan")}, "kl: expected a number of at least 0"),
        ({"loss_rise": 1e300}, "loss_rise: expected at most 1000000"),
        ({"units": 2.5}, "units: expected a whole number of at least 0, got 2.5"),
    ],
)
def test_bounds_that_are_none_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Thresholds(**changes)
