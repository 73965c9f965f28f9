"""What a run changed beside a model that stays as it is, as a LoRA adapter: truncated, measured again, written."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from cir.config import CIRConfig
from cir.forgetting.budget import Meter, is_inside
from cir.forgetting.factors import norm_sq, truncated, write_lora
from cir.forgetting.report import Adapter, Measure, Report
from cir.forgetting.update import Factors, add_factors
from cir.model.sites import Target
from cir.system.writing import check_output

logger = logging.getLogger(__name__)
RETURNED = 0.01
"""Of mean recall, what may come back with what an adapter leaves out."""


class Delivery:
    """An adapter to be written to a new ``folder``, for a model of the name ``base_model``.

    Raises:
        FileExistsError, OSError: if it cannot be written there.
    """

    def __init__(self, folder: str | Path, base_model: str, config: CIRConfig) -> None:
        self._folder, self._base_model = check_output(str(folder), overwrite=False), base_model
        self._config = config
        self._factors: Factors = {}

    @torch.no_grad()
    def truncate(self, targets: Sequence[Target], meter: Meter, report: Report) -> None:
        """Leave of the deltas of ``targets`` what the adapter holds, and have ``report`` say what the model is then.

        Its rank is the least that holds ``adapter_energy`` of the squared norm of all deltas; where the model is not
        what it was with them, twice that and so on, and ``adapter_rank`` at most.
        """
        config, whole = self._config, report.after
        squared, held, pairs = 0.0, torch.zeros(config.adapter_rank, dtype=torch.float64), Factors()
        for target in targets:
            delta = target.parameter
            squared += float(torch.linalg.vector_norm(delta, dtype=torch.float64)) ** 2
            b, a = truncated(None, delta[None], config.adapter_rank, 1.0)[0]
            pairs[target.name] = b.to(delta.dtype), a.to(delta.dtype)
            held[: len(b)] += (b.double().square().sum(1) * a.double().square().sum(1)).cpu()
        if not squared:
            logger.warning("nothing was forgotten within the budget: the adapter changes nothing")
        most = max(len(b) for b, _ in pairs.values())
        rank = min(int((held.cumsum(0) < config.adapter_energy * squared).sum()) + 1, most)
        while True:
            self._factors = {name: (b[:rank], a[:rank]) for name, (b, a) in pairs.items()}
            for target in targets:
                target.parameter.zero_()
            add_factors(targets, [self._factors])
            now = meter.measure()
            wrong = _wrong(now, whole, config)
            if not wrong or rank == most:
                break
            rank = min(2 * rank, most)
        energy = min(1.0, norm_sq(self._factors.values()) / squared) if squared else 1.0
        report.after, report.adapter = now, Adapter(rank, energy, whole)
        if wrong:
            logger.warning("the adapter holds %.1f %% of the change, and %s: raise adapter_rank", 100 * energy, wrong)

    def write(self) -> None:
        """Write what :meth:`truncate` found, whole or not at all."""
        write_lora(self._folder, self._factors, self._base_model)


def _wrong(now: Measure, whole: Measure, config: CIRConfig) -> str:
    """What a model measured ``now`` has lost of one that was forgotten on the ``whole``, in words, if anything."""
    if not is_inside(now, config.budget, config.worst_window):
        return f"the text loss rises by {now.rise:+.3%}, which is above the budget"
    recall, before = now.mean_recall or 0.0, whole.mean_recall or 0.0
    return f"recall is {recall:.3f} in place of {before:.3f}" if recall > before + RETURNED else ""
