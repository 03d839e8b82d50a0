"""The plan as a table: one column a side, bytes of one rank, collectives of one microbatch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from fsdp_dp.planning.answer import Answer
from fsdp_dp.planning.options import PlanConfig, decoder
from fsdp_dp.planning.trace import Trace
from fsdp_dp.planning.tracker import KINDS, Segment

GIB = 2**30
_LABEL, _COLUMN = 34, 16


def table(config: PlanConfig, parameters: int, rows_of_a_rank: int, answers: Mapping[str, Answer]) -> str:
    """The whole page."""
    sides = list(answers)
    traces = [answer.trace for answer in answers.values()]
    lines = [*_heading(config, parameters, rows_of_a_rank), "", _row("GiB on a rank, at its peak", sides)]
    lines += [
        _row(f"  {kind}", [_gib(t.peak[kind]) for t in traces]) for kind in KINDS if any(t.peak[kind] for t in traces)
    ]
    lines += [_row("peak", [_gib(t.peak.total()) for t in traces])]
    lines += [_row("  reached in", [_named(t.peak_segment) for t in traces])]
    if "plain" in answers:
        plain = answers["plain"].trace.peak.total()
        lines += [_row("  beyond plain", [f"{(t.peak.total() - plain) / GIB:+.2f}" for t in traces])]
    for phases in _PHASES:
        lines += [_row(f"  peak of {phases}", [_gib(_of_phases(t, _PHASES[phases])) for t in traces])]
    usable = config.plan.usable_bytes
    lines += [_row("fits", ["yes" if t.peak.total() <= usable else "no" for t in traces])]
    if config.plan.search != "none":
        lines += [_row(f"largest {_ASKED[config.plan.search]}", [str(a.largest or "none") for a in answers.values()])]
    return "\n".join([*lines, "", *_collectives(traces, sides, config, rows_of_a_rank)])


_ASKED = {"microbatch": "microbatch (rows)", "model": "model (blocks)"}
_PHASES = {
    "forward and loss": ("forward", "loss"),
    "backward": ("backward", "sum", "after backward"),
    "the optimizer's step": ("release", "optimizer"),
}


def _heading(config: PlanConfig, parameters: int, rows: int) -> list[str]:
    model, plan = decoder(config), config.plan
    recomputed = ", activation checkpointing" if plan.activation_checkpointing else ""
    microbatches = math.ceil(rows / config.microbatch_size)
    return [
        f"{model.architecture}, {model.layers} blocks of width {model.width}: {parameters / 1e9:.2f} billion parameters",
        f"{plan.world_size} ranks of {plan.device_memory_gib:g} GiB, of which {plan.usable_bytes / GIB:.1f} are used; "
        f"{config.sharding.strategy}, {config.precision.compute}, {config.optimizer.name}{recomputed}",
        f"microbatch: {config.microbatch_size} rows of {model.block_size} tokens; a step: {rows} rows on a rank, "
        f"{microbatches} microbatches",
    ]


def _collectives(traces: Sequence[Trace], sides: Sequence[str], config: PlanConfig, rows: int) -> list[str]:
    lines = [_row("collectives of a microbatch", sides)]
    for kind in sorted({kind for t in traces for kind in t.calls}):
        lines += [_row(f"  {kind}s", [str(t.calls[kind]) for t in traces])]
        lines += [_row("    GiB, unsharded", [_gib(t.sent[kind]) for t in traces])]
    microbatches = math.ceil(rows / config.microbatch_size)
    of_a_step = [microbatches * t.sent.total() + t.sent_by_optimizer.total() for t in traces]
    lines += [_row("GiB of a step", [_gib(nbytes) for nbytes in of_a_step])]
    return lines


def _of_phases(trace: Trace, phases: Sequence[str]) -> int:
    return max(peak.total() for (phase, _), peak in trace.peaks.items() if phase in phases)


def _named(segment: Segment) -> str:
    phase, place = segment
    return phase if phase not in ("forward", "backward", "sum") else f"{phase} [{place}]"


def _gib(nbytes: int) -> str:
    return f"{nbytes / GIB:.2f}"


def _row(label: str, cells: Sequence[str]) -> str:
    return f"{label:<{_LABEL}}" + "".join(f"{cell:>{_COLUMN}}" for cell in cells)
