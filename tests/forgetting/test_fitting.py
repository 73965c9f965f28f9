from __future__ import annotations

import contextlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from cir import Subspaces
from tests.forgetting.test_subspace import rows, solve
from tests.fuzz import examples


@pytest.mark.parametrize("mode", ["orthogonal", "sequential", "soft"])
def test_save_and_load(tmp_path, mode):
    saved = Subspaces({"s": solve(rows(), 4, mode)}, mode)
    saved.save(tmp_path / "s.safetensors")
    loaded = Subspaces.load(tmp_path / "s.safetensors")
    assert loaded.mode == mode
    for part, tensor in vars(saved["s"]).items():
        assert torch.equal(getattr(loaded["s"], part), tensor) if tensor is not None else part == "mixer"
    torch.testing.assert_close(loaded["s"].collapse_(rows()), saved["s"].collapse_(rows()))
    assert [file.name for file in tmp_path.iterdir()] == ["s.safetensors"]


def test_load_refuses_another_file(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="expected a file of format cir-subspaces-2, got None"):
        Subspaces.load(tmp_path / "other.safetensors")


@given(st.data())
@settings(max_examples=examples(60), deadline=None)
def test_no_bytes_do_more_than_be_refused(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("fuzz") / "s.safetensors"
    Subspaces({"s": solve(rows(), 4, "soft")}, "soft").save(path)
    whole = path.read_bytes()
    start, count = data.draw(st.integers(0, len(whole))), data.draw(st.integers(0, 40))
    path.write_bytes(whole[:start] + data.draw(st.binary(max_size=40)) + whole[start + count :])
    with contextlib.suppress(ValueError):
        assert Subspaces.load(path)
