"""Every fault of `faults.FAULTS` is noticed by a shipped check, and the same use of the healthy engine is not.

docs/trust.md shows the table; a test compares.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.broken_engines.faults import FAULTS, Fault
from tests.distributed.harness import run

TRUST = Path(__file__).resolve().parents[2] / "docs" / "trust.md"
PRESENT_IN_USE = {
    "a token-mean loss",
    "a parameter used behind its tap",
    "running statistics saved",
    "shuffled batches accounted as Poisson",
    "an optimizer that steps twice",
    "a parameter that becomes trainable later",
}
"""Faults of the program and not of the engine: there is no healthy engine to compare with."""


def outcome(fault: Fault) -> tuple[str, str]:
    """What was told of the healthy engine, and of the broken one."""
    healthy = "" if fault.name in PRESENT_IN_USE else fault.use()
    with fault.broken():
        return healthy, fault.use()


def on_ranks(rank: int, world_size: int) -> dict[str, tuple[str, str]]:
    return {fault.name: outcome(fault) for fault in FAULTS if fault.ranks == world_size}


@pytest.mark.parametrize("fault", [f for f in FAULTS if f.ranks == 1], ids=lambda f: f.name)
def test_it_is_caught(fault: Fault) -> None:
    healthy, broken = outcome(fault)
    assert healthy == "" and fault.told in broken


def test_those_of_several_ranks_are_caught_on_every_rank() -> None:
    for found in run(on_ranks, 2):
        for fault in FAULTS:
            if fault.ranks == 2:
                healthy, broken = found[fault.name]
                assert healthy == "" and ("Nothing was released" in broken or fault.told in broken), fault.name


def test_the_page_has_the_table() -> None:
    page = TRUST.read_text(encoding="utf-8")
    missing = [row for fault in FAULTS if (row := f"| {fault.name} | {fault.check} | {fault.releases} |") not in page]
    assert missing == []
