"""What the records of a ledger say together: how many releases count as spent, and how many may still be made.

Pure: from one standing and one record to the next standing, or to the error that the record is impossible there.
`fsdp_dp.ledger` writes and reads the records. No torch here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from fsdp_dp import accounting
from fsdp_dp.config import PrivacyConfig
from fsdp_dp.errors import PrivacyError

FORMAT = 1

# Options that may differ when a run goes on: they change neither a release nor how rows are drawn for it.
NOT_MECHANISM = frozenset({"seed", "steps", "target_epsilon", "target_delta", "accountant", "loss_reduction"})

# Those of the others that the accountant reads.
ACCOUNTED = ("noise_multiplier", "max_grad_norm", "expected_batch_size", "dataset_size", "sampling", "max_batch_size")


class LedgerError(PrivacyError):
    """The ledger is damaged, belongs to another run, or is held by another process."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Standing:
    """What the records say together.

    Attributes:
        mechanism: the options that decide a release, with `noise_multiplier` as calibrated.
        options: what was asked for besides, when the run was opened or last resumed.
        budget: releases that the run committed to; None leaves it open.
        lease: the most releases that one line reserves.
        released: releases that are settled: made for certain, or counted when the present process took over.
        counted: releases that count as spent if nothing else is written.
        session_start: `counted` when the present process took over.
        earlier_epochs: epochs of shuffling that earlier processes touched.
        running: a process holds the ledger, or ended without giving its lease back.
        lost: releases that were counted and may never have been made, or whose effect was lost.
        extended: the budget was raised.
        seeded: some of the noise came from a fixed seed, so that there is no guarantee.
    """

    run: str
    mechanism: Mapping[str, Any]
    options: Mapping[str, Any]
    budget: int | None
    lease: int
    released: int = 0
    counted: int = 0
    session_start: int = 0
    earlier_epochs: int = 0
    running: bool = True
    lost: int = 0
    sessions: int = 1
    extended: bool = False
    seeded: bool = False

    @property
    def releases_per_epoch(self) -> int:
        return int(self.mechanism["dataset_size"]) // int(self.mechanism["expected_batch_size"])

    @property
    def epochs(self) -> int:
        """Epochs touched, with shuffling: every process starts a new one."""
        return self._epochs(self.counted)

    def _epochs(self, release: int) -> int:
        return self.earlier_epochs - (self.session_start - release) // self.releases_per_epoch

    def accounted(self, release: int) -> int:
        """Releases as the accountant counts them when the present process has made `release`: whole epochs if shuffled."""
        if self.mechanism["sampling"] != "shuffle" or release < self.session_start:
            return release
        return self._epochs(release) * self.releases_per_epoch

    @property
    def limit(self) -> float:
        """The last release that the present process may make; with shuffling, whole epochs are counted."""
        if self.budget is None:
            return math.inf
        if self.mechanism["sampling"] != "shuffle":
            return self.budget
        epochs_left = -(-self.budget // self.releases_per_epoch) - self.earlier_epochs
        return min(self.budget, self.session_start + max(0, epochs_left) * self.releases_per_epoch)

    def epsilon(self, releases: int | None = None) -> accounting.EpsilonBounds:
        """Bounds at the run's delta, of what is counted or of `releases`."""
        sampled = {name: value for name, value in self.mechanism.items() if name in ACCOUNTED}
        privacy = PrivacyConfig(**sampled, **self.options)
        steps = self.accounted(self.counted if releases is None else releases)
        return accounting.epsilon_for(privacy, self.mechanism["noise_multiplier"], steps, privacy.target_delta)


def mechanism_of(privacy: PrivacyConfig, noise_multiplier: float) -> dict[str, Any]:
    """The options that decide a release; `noise_multiplier` is the calibrated one."""
    options = dataclasses.asdict(privacy) | {"noise_multiplier": float(noise_multiplier)}
    return {name: value for name, value in options.items() if name not in NOT_MECHANISM}


def opened(record: Mapping[str, Any]) -> Standing:
    """The standing after the first record."""
    if record["kind"] != "open" or record["format"] != FORMAT:
        raise LedgerError(f"the first record is of kind '{record['kind']}', expected 'open' of format {FORMAT}")
    names = ("run", "mechanism", "options", "budget", "lease", "seeded")
    return Standing(**{name: record[name] for name in names})


def after(standing: Standing, record: Mapping[str, Any]) -> Standing:
    """The standing after one more record. Raises LedgerError where it contradicts those before it."""
    kinds = {"lease": _after_lease, "close": _after_close, "resume": _after_resume}
    if record["kind"] not in kinds:
        raise LedgerError(f"a record of kind '{record['kind']}', expected one of {', '.join(kinds)}")
    return kinds[record["kind"]](standing, record)


def _after_lease(standing: Standing, record: Mapping[str, Any]) -> Standing:
    released, until = record["released"], record["until"]
    if not (standing.running and standing.released <= released <= standing.counted <= until <= standing.limit):
        raise LedgerError(f"a lease from {released} until {until}, where {standing.counted} were counted")
    if until - released > standing.lease:
        raise LedgerError(f"a lease of {until - released} releases, where {standing.lease} are the most")
    return dataclasses.replace(standing, released=released, counted=until)


def _after_close(standing: Standing, record: Mapping[str, Any]) -> Standing:
    released = record["released"]
    if not (standing.running and standing.released <= released <= standing.counted):
        raise LedgerError(
            f"closed at {released} releases, where {standing.released} to {standing.counted} are possible"
        )
    return dataclasses.replace(standing, released=released, counted=released, running=False)


def _after_resume(standing: Standing, record: Mapping[str, Any]) -> Standing:
    counted = counted_at_resume(standing, torn="torn" in record)
    if record["counted"] != counted:
        raise LedgerError(f"resumed at {record['counted']} releases, where {counted} were counted")
    before, budget = standing.budget, record["budget"]
    if before is not None and (budget is None or budget < before):
        raise LedgerError(f"the budget was lowered from {before} to {budget}")
    ended = dataclasses.replace(standing, counted=counted)
    return dataclasses.replace(
        ended,
        options=record["options"],
        budget=budget,
        lease=record["lease"],
        released=counted,
        session_start=counted,
        earlier_epochs=ended.epochs if ended.mechanism["sampling"] == "shuffle" else 0,
        running=True,
        lost=standing.lost + counted - standing.released,
        sessions=standing.sessions + 1,
        extended=standing.extended or budget != before,
        seeded=standing.seeded or record["seeded"],
    )


def counted_at_resume(standing: Standing, *, torn: bool) -> int:
    """What a crash left of a lease is spent; a line that was cut short counts as one more lease."""
    return (
        int(min(standing.counted + standing.lease, max(standing.limit, standing.counted))) if torn else standing.counted
    )
