"""Commands that ``torchrun`` starts in several processes, over which a model is sharded."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

SHARDED = ("unlearn", "eval")
"""Commands that run so."""


def started_by_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def launched(command: str) -> Iterator[int]:
    """The number of this process, 0 where it is alone. The first speaks and writes; others say only what fails.

    Raises:
        ValueError: if ``command`` is not one of :data:`SHARDED`, and there are several.
    """
    if not started_by_torchrun():
        yield 0
        return
    if command not in SHARDED:
        raise ValueError(f"expected one of {', '.join(SHARDED)} in several processes, got {command}")
    from cir.system.processes import joined_group

    with joined_group() as number:
        if number == 0:
            yield 0
            return
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            logging.disable(logging.WARNING)
            try:
                yield number
            finally:
                logging.disable(logging.NOTSET)


def way_to_shard(device: str | None, shard: str | None) -> str | None:
    """How the model is sharded, which only several processes do: by default by FSDP."""
    if not started_by_torchrun():
        if shard is not None:
            raise ValueError("--shard: expected several processes, as torchrun starts them, got one")
        return None
    if device is not None:
        raise ValueError(f"--device: expected none in several processes, which take a GPU each, got {device}")
    return shard or "fsdp"
