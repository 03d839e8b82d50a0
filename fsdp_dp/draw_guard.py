"""Guard of the draws: are the rows that a loader hands out drawn as the accountant assumes? Yes or no, for every draw.

Draws are made without a look at the data, so that neither answer tells anything of it. A healthy loader is refused with
probability e^-40 a question; what is asked is added up over the run, so that a fault too small for one draw shows later.
"""

from __future__ import annotations

import math
from typing import NoReturn

import torch
from torch import Tensor

from fsdp_dp.config import PrivacyConfig
from fsdp_dp.errors import PrivacyError

_TAIL = 40.0  # minus the logarithm of a false alarm's probability


class DrawGuard:
    """Looks at the global draws of one loader, in order."""

    def __init__(self, privacy: PrivacyConfig) -> None:
        self._privacy = privacy
        self._per_epoch = privacy.dataset_size // privacy.expected_batch_size
        self._number, self._last = -1, torch.empty(0, dtype=torch.int64)
        self._draws, self._rows = 0, 0
        self._pairs, self._common = 0, 0

    def look(self, number: int, drawn: Tensor) -> Tensor:
        """The draw, if it can be one. A draw that is made again, since an iteration was left early, is counted once.

        Raises:
            PrivacyError: it holds a row twice or one that does not exist, or is no draw of the accounted sampling.
        """
        rows = drawn.sort().values if self._privacy.sampling == "shuffle" else drawn  # Poisson draws are sorted
        self._check_rows(rows)
        if number > self._number:
            last = self._last if number == self._number + 1 else None
            self._number, self._last = number, rows
            if self._privacy.sampling == "shuffle":
                self._check_shuffled(number, rows, last)
            else:
                self._check_poisson(number, rows, last)
        return drawn

    def _check_rows(self, rows: Tensor) -> None:
        if bool((rows[1:] <= rows[:-1]).any()):
            refuse("a row is in it more than once")
        if len(rows) and not 0 <= int(rows[0]) <= int(rows[-1]) < self._privacy.dataset_size:
            refuse(f"a row in it is none of the {self._privacy.dataset_size} of the data set")

    def _check_shuffled(self, number: int, rows: Tensor, last: Tensor | None) -> None:
        if len(rows) != self._privacy.expected_batch_size:
            refuse("a batch of shuffling does not have expected_batch_size rows")
        if number % self._per_epoch and last is not None and in_common(rows, last):
            refuse("a row comes twice in one epoch")

    def _check_poisson(self, number: int, rows: Tensor, last: Tensor | None) -> None:
        """Numbers of rows, and of rows that two draws share: every second pair, since those are independent of each other."""
        privacy, cut = self._privacy, self._privacy.max_batch_size is not None
        self._draws, self._rows = self._draws + 1, self._rows + len(rows)
        trials = self._draws * privacy.dataset_size
        if is_unlikely(self._rows, trials, privacy.sample_rate, at_most=cut):
            refuse("the draws so far do not have the number of rows that their rate gives")
        if number % 2 and last is not None:
            self._pairs, self._common = self._pairs + 1, self._common + in_common(rows, last)
            trials = self._pairs * privacy.dataset_size
            if is_unlikely(self._common, trials, privacy.sample_rate**2, at_most=cut):
                refuse(
                    "one draw after the other holds the same rows, or none of the same, as independent draws would not"
                )


def in_common(rows: Tensor, others: Tensor) -> int:
    """How many rows are in both; each is sorted and without duplicates."""
    if not len(rows) or not len(others):
        return 0
    places = torch.searchsorted(others, rows).clamp_(max=len(others) - 1)
    return int((others[places] == rows).sum())


def is_unlikely(found: int, trials: int, rate: float, *, at_most: bool = False) -> bool:
    """Whether so many successes of independent trials, or more extreme, have probability e^-40 at most (Chernoff's bound).

    Args:
        at_most: trials succeed at this rate *or less*, so that few successes are no surprise.
    """
    if at_most and found <= trials * rate:
        return False
    exponent = 0.0
    for count, expected in ((found, trials * rate), (trials - found, trials * (1 - rate))):
        if count:
            if expected <= 0:
                return True
            exponent += count * math.log(count / expected)
    return exponent > _TAIL


def refuse(what: str) -> NoReturn:
    raise PrivacyError(
        f"No rows were handed out: {what}, so this is no draw that the accountant assumes. This is a fault of fsdp_dp, or "
        "of what replaces a part of it: do not train on, and report it with engine.summary()"
    )
