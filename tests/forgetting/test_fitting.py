from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from cir import Subspaces
from tests.forgetting.test_subspace import rows, solve


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
