"""What fits: the largest microbatch of a model, and the deepest model of a width."""

from __future__ import annotations

from collections.abc import Callable

from fsdp_dp.planning.depth import SHALLOW, Lines
from fsdp_dp.planning.trace import Step

MOST_LAYERS = 10_000


def most_layers(step: Step, usable: int) -> int:
    """The most blocks of the step's width, an even number, that fit in ``usable`` bytes; 0 where not even `SHALLOW` do."""
    lines, pairs = Lines.of(step), SHALLOW // 2
    found = largest(lambda n: lines.at(2 * max(n, pairs)).peak.total(), pairs, usable, MOST_LAYERS // 2)
    return 2 * found if found >= pairs else 0


def largest(used: Callable[[int], int], first: int, usable: int, limit: int) -> int:
    """The largest integer of ``1 .. limit`` with ``used(it) <= usable``, 0 if there is none; ``used`` does not fall.

    ``used`` is dear and close to a line: each guess is where the line through the last two answers meets ``usable``, and
    the search ends where that line says so. What is returned has been asked for.
    """
    low, high, guess = 0, limit + 1, min(first, limit)
    answers: list[tuple[int, int]] = []
    while low < guess < high:
        answers.append((guess, used(guess)))
        low, high = (guess, high) if answers[-1][1] <= usable else (low, guess)
        guess = _next_guess(answers, usable, low, high)
    return low


def _next_guess(answers: list[tuple[int, int]], usable: int, low: int, high: int) -> int:
    """Where to ask next; ``low`` itself where the line says that no more fits."""
    if len(answers) == 1:
        return min(2 * low, high - 1) if low else high // 2
    (x, used_x), (y, used_y) = answers[-2:]
    slope = (used_y - used_x) / (y - x)
    on_line = int(y + (usable - used_y) / slope) if slope > 0 else high - 1
    return min(max(on_line, low if low else 1), high - 1)
