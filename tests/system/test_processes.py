from __future__ import annotations

import torch
import torch.distributed as dist

from cir.system.processes import Processes, agreed, anywhere, everywhere, least, summed, together


def said(x: torch.Tensor) -> list[object]:
    return [summed(x).tolist(), agreed(x).tolist(), least(3), anywhere(False), anywhere(True), everywhere(True)]


def test_one_process_agrees_with_itself(tmp_path):
    x = torch.arange(6.0).view(2, 3).T  # not contiguous
    alone = said(x)
    assert alone == [x.tolist(), x.tolist(), 3, False, True, True]
    assert agreed(x) is x
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        with together(Processes(dist.group.WORLD, torch.device("cpu"))):
            assert said(x) == alone
            assert agreed(x) is not x  # it was sent
        assert agreed(x) is x
    finally:
        dist.destroy_process_group()
