"""What was released so far, as the accountant counts it: releases, epochs of shuffled loaders, and whether epsilon holds.

In the step: `begin` before the first draw of noise. Counts only grow, whatever fails after that (rule 10).
"""

from __future__ import annotations

import dataclasses
import warnings
import weakref
from typing import Any

from fsdp_dp import accounting
from fsdp_dp.config import PrivacyConfig
from fsdp_dp.errors import NoEpsilonWarning, PrivacyError

_MECHANISM = (
    "noise_multiplier", "max_grad_norm", "expected_batch_size", "dataset_size", "sampling", "max_batch_size", "clipping",
    "group_bounds", "clip_function", "clip_stability", "adaptive_bounds", "numerics",
)  # fmt: skip
_of_detached: weakref.WeakKeyDictionary[object, int] = weakref.WeakKeyDictionary()
"""Model -> the releases that an engine had counted when it was detached from it."""

SEED_WARNING = "seed fixed: no privacy guarantee. Leave seed=None outside tests"


class Releases:
    """Counts of one engine.

    Args:
        noise_multiplier: sigma, given or calibrated.
        model: whose releases they are.

    Attributes:
        number: releases so far.
        vouched: all rows so far were sampled as the accountant assumes.
        seeded: some noise came from a fixed seed, so that there is no guarantee.
        loaders: how many draw rows for this engine.
        before_load: the releases that were counted when a state was loaded last; 0 before that.
    """

    def __init__(self, privacy: PrivacyConfig, noise_multiplier: float, model: object) -> None:
        self._privacy, self._noise_multiplier, self._model = privacy, noise_multiplier, model
        self._left_out = _of_detached.get(model, 0)
        self.number, self.before_load, self.vouched, self.seeded = 0, 0, True, privacy.seed is not None
        self._warned = False
        self._draws: list[int] = []  # of every loader
        self._epoch: tuple[int, int] | None = None  # of the last draw: loader, and which of its epochs
        self._released: set[tuple[int, int]] = set()
        self._earlier_epochs = 0

    @property
    def loaders(self) -> int:
        return len(self._draws)

    def add_loader(self) -> None:
        self._draws.append(0)

    def draw(self, loader: int) -> None:
        """A loader's next logical batch begins."""
        self._epoch = (loader, self._draws[loader] // self._steps_per_epoch)
        self._draws[loader] += 1

    def begin(self) -> int:
        """The number of the release that begins, which is counted from here on."""
        self.number += 1
        if self._epoch is not None:
            self._released.add(self._epoch)
        return self.number

    def is_budget_spent(self) -> bool:
        """Whether one more would be more than sigma was calibrated for; shuffling counts whole epochs."""
        limit = self._privacy.steps
        if self._privacy.target_epsilon is None or limit is None:
            return False
        if self._privacy.sampling == "shuffle" and self._epoch not in self._released:
            return self.number >= limit or self._epochs >= -(-limit // self._steps_per_epoch)
        return self.number >= limit

    def epsilon(self, delta: float | None) -> float:
        """Upper bound at ``delta`` (default ``target_delta``).

        Raises:
            PrivacyError: a batch was released that the accountant's sampling assumption does not cover.
        """
        privacy = self._privacy
        if not self.vouched:
            raise PrivacyError(
                f"epsilon: sampling='{privacy.sampling}' assumes that every microbatch comes from "
                "engine.loader(...), but some did not, so no epsilon holds. Use engine.loader, or set "
                "sampling='external_poisson' if your own loader draws every row independently with probability "
                f"{privacy.sample_rate:g}"
            )
        if self.seeded:
            warnings.warn(SEED_WARNING, stacklevel=3)
        if self._left_out:
            warnings.warn(
                f"epsilon leaves out {self._left_out} releases of an engine that was detached from this model. Load its "
                "state_dict() to count them, too; if they were made from other data, each has its own epsilon",
                NoEpsilonWarning,
                stacklevel=3,
            )
        delta = privacy.target_delta if delta is None else delta
        return accounting.epsilon_for(privacy, self._noise_multiplier, self._accounted, delta).upper

    def warn_unless_vouched(self, stacklevel: int) -> None:
        """Once."""
        if not self.vouched and not self._warned:
            self._warned = True
            warnings.warn(
                f"No epsilon holds for this run: a release held rows that did not come from engine.loader, as "
                f"sampling='{self._privacy.sampling}' assumes. Use engine.loader, or say with sampling='external_poisson' "
                "that your own loader draws every row independently",
                NoEpsilonWarning,
                stacklevel=stacklevel,
            )

    def state(self) -> dict[str, Any]:
        """The counts, and the mechanism that they are of. Nothing secret."""
        mechanism = {k: v for k, v in dataclasses.asdict(self._privacy).items() if k != "seed"}
        return {
            **mechanism,
            "steps": self.number,
            "epochs": self._epochs,
            "noise_multiplier": self._noise_multiplier,
            "vouched": self.vouched,
            "seeded": self.seeded,
        }

    def check(self, state: dict[str, Any]) -> None:
        """Raises PrivacyError unless the releases of ``state`` can be accounted together with these."""
        now = self.state()
        for name in _MECHANISM:
            if state[name] != now[name]:
                raise PrivacyError(
                    f"load_state_dict: {name} was {state[name]!r} when the state was saved and is {now[name]!r} now; "
                    "releases of two mechanisms are not accounted together. Use the saved value"
                )

    def load(self, state: dict[str, Any]) -> None:
        """Go on from the larger of both counts."""
        self._earlier_epochs = max(self._epochs, int(state["epochs"]))
        self._released.clear()
        self.number = self.before_load = max(self.number, int(state["steps"]))
        if self.number >= self._left_out:
            self._left_out = 0
        self.vouched = self.vouched and bool(state["vouched"])
        self.seeded = self.seeded or bool(state["seeded"])

    def leave(self) -> None:
        """Their engine is detached: one that comes after it is to count on, or to say that it does not.

        Without noise nothing was private, and a check that released nothing is no release.
        """
        if self.number + self._left_out and self._noise_multiplier:
            _of_detached[self._model] = self.number + self._left_out

    @property
    def _epochs(self) -> int:
        """Epochs of shuffling with a release, over all loaders: no row was in more releases than that."""
        return self._earlier_epochs + len(self._released)

    @property
    def _steps_per_epoch(self) -> int:
        return self._privacy.dataset_size // self._privacy.expected_batch_size

    @property
    def _accounted(self) -> int:
        """Releases as the accountant counts them: for shuffling, whole epochs."""
        return self._epochs * self._steps_per_epoch if self._privacy.sampling == "shuffle" else self.number
