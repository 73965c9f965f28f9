from __future__ import annotations

import pytest

from cir.proof.charts import MOST_LABEL
from cir.proof.figures import NAMES, interval_of, percent, value_of
from cir.proof.statistics import UNBOUNDED


@pytest.mark.parametrize(
    ("rate", "said"),
    [
        (0.0, "0 %"),
        (0.0004, "< 0.1 %"),
        (0.004, "0.4 %"),
        (0.0949, "9.5 %"),
        (0.0996, "10 %"),
        (0.43, "43 %"),
        (0.985, "98 %"),
        (0.9951, "99.5 %"),
        (0.9996, "> 99.9 %"),
        (1.0, "100 %"),
        (-0.02, "-2.0 %"),
    ],
)
def test_a_rate_has_the_digits_that_matter(rate, said):
    assert percent(rate) == said


def test_what_is_in_nats_has_three_decimals_and_no_negative_zero():
    assert [value_of("loss", 2.7004), value_of("kl", -0.0001)] == ["2.700", "0.000"]
    assert value_of("recall", 0.5) == percent(0.5)


def test_a_single_unit_and_a_maximum_have_no_interval():
    assert interval_of("recall", {"value": 0.93, "stderr": 0.0, "count": 1}) == "n/a"
    assert interval_of("kl_worst_window", {"value": 0.1, "stderr": 0.0, "count": 32}) == "n/a"
    assert interval_of("loss", {"value": 2.0, "stderr": 0.1, "count": 2}) == "0.729 to 3.271"
    assert interval_of("recall", {"value": 0.5, "stderr": 1e-4, "count": 9}) == "50 %"


def test_the_names_of_rates_fit_beside_their_bars():
    assert max(len(said) for name, said in NAMES.items() if name not in UNBOUNDED) <= MOST_LABEL
