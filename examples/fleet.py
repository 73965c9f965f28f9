"""The same edits in every replica of a model, with Ray: in all of them or in none.

    python examples/fleet.py --model some/llama --edits edits/*.safetensors --replicas 4 --gpus 1

The edits are what ``cir.Edit.save`` wrote, made once, by ``examples/batch.py`` say. A replica holds the weights that
it came with plus the edits that are asked for, so that one that is no longer asked for is gone to the bit, and a
replica that Ray has started anew has the same as the others once it is asked again. A line of JSON a replica says
what it recalls of the facts. Where one fails or has other weights than the rest, all go back to what they held, and
the exit status is 1.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import cir


class Replica:
    """One copy of a model, which a server would answer requests with."""

    def __init__(self, source: str) -> None:
        self._model, self._tokenizer = cir.load_model(source)
        self._came: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def hold(self, edits: Sequence[bytes]) -> dict[str, Any]:
        """The model with these edits and no others: a hash of what they may have changed, and what is recalled of
        their facts.

        Raises:
            ValueError: if one is no edit, or not of such a model; nothing is changed then.
        """
        wanted = [cir.Edit.from_bytes(data) for data in edits]
        for target in [target for edit in wanted for target in edit.targets_in(self._model)]:
            self._came.setdefault(target.parameter_name, target.parameter.cpu().clone())
        for name, weight in self._came.items():
            self._model.get_parameter(name).copy_(weight)
        for edit in wanted:
            edit.apply_(self._model)
        recalls = cir.evaluate(self._model, self._tokenizer, [edit.fact for edit in wanted]).recall if wanted else {}
        return {"weights": self._hash(), "recall": recalls}

    def _hash(self) -> str:
        digest = hashlib.sha256()
        for name, parameter in self._model.named_parameters():
            digest.update(name.encode() + parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


class Fleet:
    """Replicas on the machines of a Ray cluster; without one, on this machine."""

    def __init__(self, source: str, count: int, gpus: float = 0) -> None:
        import ray

        self._ray = ray
        if not ray.is_initialized():
            ray.init(log_to_driver=False)
        kind = ray.remote(Replica).options(num_gpus=gpus, max_restarts=-1, max_task_retries=1)
        self._replicas = [kind.remote(source) for _ in range(count)]
        self._held: list[bytes] = []

    def hold(self, edits: Sequence[cir.Edit]) -> list[dict[str, Any]]:
        """Have all replicas hold these edits and no others; what each says of itself.

        Raises:
            RuntimeError: if one fails, or differs from the others; those that answer hold what they held before.
        """
        data = [edit.to_bytes() for edit in edits]
        try:
            said = self._ray.get(self._asked(data))
            if len({one["weights"] for one in said}) > 1:
                raise ValueError("expected the same weights in every replica, got several")
        except Exception as error:
            self._ray.wait(answers := self._asked(self._held), num_returns=len(answers))
            raise RuntimeError(f"taken back in all replicas: {error}") from error
        self._held = data
        return said

    def _asked(self, data: list[bytes]) -> list[Any]:
        shared = self._ray.put(data)  # once for all replicas of a machine
        return [replica.hold.remote(shared) for replica in self._replicas]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Have every replica of a model hold the same edits.")
    parser.add_argument("--model", required=True, help="a hub id or a local folder, the same on every machine")
    parser.add_argument("--edits", required=True, nargs="+", type=Path, help="files that Edit.save wrote")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--gpus", type=float, default=0, help="of each replica")
    arguments = parser.parse_args(argv)
    try:
        edits = [cir.Edit.load(path) for path in arguments.edits]
        for said in Fleet(arguments.model, arguments.replicas, arguments.gpus).hold(edits):
            print(json.dumps(said), flush=True)
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        print(f"fleet: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
