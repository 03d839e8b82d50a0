"""The privacy statement of a run: what a data-protection officer can check, and sign.

It says what the run's ledger proves, in the terms of docs/guarantee.md, and nothing that depends on un-noised data.
"""

from __future__ import annotations

import math

from fsdp_dp.ledger import EXTENDED, UNDETECTED
from fsdp_dp.reporting.page import Banner, Block, Bullets, Heading, Paragraph, Table
from fsdp_dp.reporting.run import Run
from fsdp_dp.second_opinion import cross_check
from fsdp_dp.training.report import (
    MECHANISM,
    adjacency_in_words,
    assumed,
    noise_in_words,
    public_parts,
    qualified,
    sampling_in_words,
    settled,
    uncovered,
)

NUMERICS = {
    "certified": "certified: the bound on a row's contribution holds for what is summed, as rounded (docs/numerics.md)",
    "nominal": "nominal: the rounding of the clipping is not bounded; a row may contribute more than the bound",
}


SIGNATURE = (
    Paragraph("Name and function: ______________________________"),
    Paragraph("Date: ______________  Signed: ______________________________"),
)


def claim(run: Run) -> str:
    """The guarantee in one line, or that there is none and why."""
    if not run.claimed_private:
        return "NOT PRIVATE: plain training (privacy=none)"
    if run.bounds is None or run.privacy is None or run.standing is None:
        return "NO EPSILON CAN BE STATED: the ledger does not hold together"
    if not math.isfinite(run.bounds.upper):
        return "NO PRIVACY GUARANTEE: no noise was added, epsilon is infinite"
    bound = f"epsilon = {run.bounds.upper:.4g} at delta = {run.privacy.target_delta:.3g}"
    if run.standing.seeded:
        return f"NO PRIVACY GUARANTEE: seed fixed ({bound} would hold with a secret, random seed)"
    return qualified(bound, run.privacy)


def verdict_banner(run: Run) -> Banner:
    """The claim, coloured by whether there is a guarantee, or one with a reservation."""
    return Banner(f"**{claim(run)}**", tone(run) if run.guaranteed else "bad")


def tone(run: Run) -> str:
    assert run.privacy is not None
    return "note" if run.privacy.numerics == "nominal" else "good"


def statement(run: Run) -> list[Block]:
    """The statement as blocks of a page."""
    opening: list[Block] = [Heading(2, f"Privacy statement: {run.name}"), verdict_banner(run)]
    if run.privacy is None:
        return [*opening, Paragraph(f"Ledger: {run.verdict}.")]
    return [
        *opening,
        Table(("", ""), tuple(guaranteed(run))),
        Paragraph("This holds if:"),
        Bullets(tuple(assumed(run.privacy, run.unit, public_parts(run.model, run.data))) + tuple(reservations(run))),
        Paragraph("Outside the guarantee:"),
        Bullets(tuple(uncovered())),
        *(SIGNATURE if run.guaranteed else []),
    ]


def guaranteed(run: Run) -> list[tuple[str, str]]:
    """Unit, adjacency, mechanism, sampling, accounting, numerics."""
    privacy, bounds, standing = run.privacy, run.bounds, run.standing
    assert privacy is not None and bounds is not None and standing is not None
    return [
        ("unit of privacy", run.unit),
        ("adjacency", f"{adjacency_in_words(privacy)} of {privacy.dataset_size}"),
        ("mechanism", MECHANISM),
        ("clipping", privacy.clipping_in_words),
        ("noise", noise_in_words(privacy, run.noise_multiplier)),
        ("sampling", sampling_in_words(privacy)),
        ("releases that epsilon is of", committed(run)),
        ("delta", f"{privacy.target_delta:.6g}"),
        ("epsilon, upper bound", f"{bounds.upper:.6g} ({accountant(run)})"),
        ("epsilon, lower bound", f"{bounds.lower:.6g}" if bounds.lower else f"not known to {privacy.accountant}"),
        ("second accountant", cross_check(privacy, run.noise_multiplier, run.releases)),
        ("numerics", NUMERICS[privacy.numerics]),
        ("ledger", f"{run.verdict}; run {standing.run}, {standing.sessions} start(s)"),
    ]


def accountant(run: Run) -> str:
    """Whose bound it is: where nothing is known from below, prv's may have been taken from pld."""
    assert run.privacy is not None and run.bounds is not None
    asked = f"accountant {run.privacy.accountant}"
    return f"{asked}, or pld where that cannot bound it" if asked.endswith("prv") and not run.bounds.lower else asked


def committed(run: Run) -> str:
    """Which releases ε counts. How many were made is public; how many a crash lost is, too."""
    standing = run.standing
    assert standing is not None
    if standing.budget is None:
        return f"{standing.counted}, all that count as spent; the run has no budget"
    lost = f", {standing.lost} of them lost to interruptions" if standing.lost else ""
    budget = settled(standing) if standing.extended else f"the budget {settled(standing)}"
    return f"{standing.budget}, {budget} ({standing.counted} are spent{lost})"


def reservations(run: Run) -> list[str]:
    """What this run's ledger asks to be said."""
    assert run.standing is not None
    return [*([EXTENDED] if run.standing.extended else []), f"The ledger is the run's own. {UNDETECTED}"]
