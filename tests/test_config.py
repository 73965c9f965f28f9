from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest

from cir.config import BreakingConfig, CIRConfig, EditConfig

KINDS = (CIRConfig, EditConfig, BreakingConfig)
MAY_BE = {
    "floor": [-1],
    "relearning_floor": [-1],
    "full_check": [True],
    "update_loss_layers": [True],
    "exact": [True],
}


@pytest.mark.parametrize("kind", KINDS)
def test_no_setting_takes_what_is_no_value_of_it(kind):
    for field in fields(kind):
        default = getattr(kind(), field.name)
        optional = "None" in str(field.type)
        for wrong in (float("nan"), float("inf"), -float("inf"), True, "x", -1, (1,), None):
            if wrong in MAY_BE.get(field.name, []) or (wrong is None and optional):
                continue
            with pytest.raises(ValueError, match=f"{field.name}: expected"):
                kind(**{field.name: wrong})
        assert kind(**{field.name: default}) == kind()


def test_numbers_of_numpy_are_numbers():
    assert CIRConfig(budget=np.float32(0.5), max_steps=np.int64(3)) == CIRConfig(budget=0.5, max_steps=3)
