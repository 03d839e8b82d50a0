"""Where the rows are in what a place of the program is given: guessed from sizes, proven by the rehearsal, then kept.

A place is a layer, or a function that a bare parameter meets rows in. Sizes alone may lie: sequences in front may be as
many as rows, and an expert may be given as many tokens. What the rehearsed microbatch did is verified by exchanging its
rows (see `independence`); what a later one does for the first time is not, so there only whole rows in front are taken.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence

import torch

from fsdp_dp.records import ALL_LAYOUTS, Layout, fits, layout_of


class RowLayouts:
    """The layouts that each place is known to have.

    Attributes:
        known: place -> its layouts.
        learning: the microbatch that runs now is rehearsed before anything is released.
    """

    def __init__(self) -> None:
        self.known: dict[Hashable, set[Layout]] = {}
        self.learning = True

    @property
    def fixed(self) -> Mapping[Hashable, set[Layout]] | None:
        """The layouts that are known now, another object as soon as others are; None while they are being learned."""
        return None if self.learning else self.known

    def forget(self) -> None:
        """What was learned, since it is not going to be verified."""
        self.known = {}

    def adopt(self, verified: Iterable[Mapping[Hashable, set[Layout]]]) -> None:
        """Know what was verified, here or on other ranks, and nothing else."""
        found: dict[Hashable, set[Layout]] = {}
        for known in verified:
            for place, layouts in known.items():
                found.setdefault(place, set()).update(layouts)
        self.known = found

    def of(
        self, place: Hashable, shapes: Sequence[torch.Size], rows: int, allowed: Sequence[Layout] = ALL_LAYOUTS
    ) -> Layout | None:
        """The layout of tensors of these shapes, or None if none can be relied on.

        One that the place had when it was verified; a new one otherwise only while ``learning``, or if rows are in front and
        cannot be mistaken for entries picked from all rows: whole sequences or images, not vectors.
        """
        if rows == 1:  # whatever it is, it is all of that row
            return layout_of(shapes, rows, allowed) or "merged"
        known = self.known.get(place, set())
        if len(known) == 1 and fits(only := next(iter(known)), shapes, rows):
            return only
        fitting = {layout for layout in known if fits(layout, shapes, rows)}
        if fitting == {"rows", "merged"}:  # one entry a row
            fitting = {"rows"}
        if len(fitting) == 1:
            return fitting.pop()
        guess = layout_of(shapes, rows, allowed)
        vectors = any(len(shape) < 3 for shape in shapes)
        if fitting or guess is None or not (self.learning or (guess == "rows" and not vectors)):
            return None
        if self.learning:
            self.known.setdefault(place, set()).add(guess)
        return guess
