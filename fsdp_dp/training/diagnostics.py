"""What a step tells of un-noised data: the score, how long rows' gradients were, throughput and memory (rule 16).

All of it is outside the guarantee. It leaves a rank in one vector, together with what the run itself must know, so that a
step costs one collective.

Legend: B rows, W ranks, M microbatches of a step.
"""

from __future__ import annotations

import math
import resource
import sys
import time

import torch
from torch import Tensor

from fsdp_dp.engine import PrivacyEngine
from fsdp_dp.training.world import World

QUANTILES = {"norm_10": 0.1, "norm_50": 0.5, "norm_90": 0.9}
_COUNTS = 6  # of the elements of `Step.vector` that are no norms


class Step:
    """One logical batch, as this rank sees it."""

    def __init__(self, world: World, engine: PrivacyEngine | None) -> None:
        self._world, self._engine = world, engine
        self._totals = torch.zeros(4, dtype=torch.float64, device=world.device)
        self._norms: list[Tensor] = []
        self._bound = math.nan if engine is None else engine.max_grad_norm  # the step may move it (adaptive)

    def count(self, score_totals: Tensor, real_B: Tensor) -> None:
        """After a microbatch's backward: add its [sum, count] of the score, its rows, and their norms."""
        self._totals += torch.cat(
            [score_totals, real_B.sum().view(1), real_B.new_tensor([len(real_B)], dtype=torch.long)]
        )
        if self._engine is not None:
            self._norms.append(self._engine.per_sample_norms.where(real_B, torch.nan))

    def gather(self, started: float, stopping: bool) -> tuple[dict[str, float], bool]:
        """Of all ranks: the diagnostics by name, and whether any rank was asked to stop. Every rank calls it.

        Args:
            started: `time.perf_counter()` when the step began; this is its end.
            stopping: this rank was asked to stop.
        """
        extra = self._totals.new_tensor([float(stopping), peak_memory(self._world.device)])
        ranks_WN = self._world.gather(torch.cat([self._totals, extra, *self._norms]))
        seconds = time.perf_counter() - started
        score, count, rows, padded, asked, _ = ranks_WN[:, :_COUNTS].sum(0).tolist()
        found = {
            # An empty Poisson draw has no score.
            "score": score / count if count else math.nan,
            "rows_per_second": rows * self._world.data_size / self._world.size / seconds,
            "useful_rows": rows / padded,
            "memory_gib": ranks_WN[:, _COUNTS - 1].max().item() / 2**30,
        }
        return found | self._of_norms(ranks_WN[:, _COUNTS:].flatten()), asked > 0

    def _of_norms(self, norms: Tensor) -> dict[str, float]:
        """Quantiles of the rows' norms before clipping, in units of the bound, and the share that was clipped."""
        if self._engine is None:
            return {}
        norms = norms[~norms.isnan()] / self._bound
        if not len(norms):
            return {}
        levels = torch.tensor(list(QUANTILES.values()), dtype=norms.dtype)
        found = dict(zip(QUANTILES, norms.quantile(levels).tolist(), strict=True))
        if len(self._engine.groups) == 1 and self._engine.privacy.clip_function == "abadi":
            found["clipped"] = (norms > 1).double().mean().item()
        return found


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that this process has held on its device so far (on CPU, of the whole process)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
