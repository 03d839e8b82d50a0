"""Every hole of a peer has its test, by number; the support page lists them (`scripts/make_support_matrix.py`)."""

from scripts.make_support_matrix import peer_holes

HOLES = {"Opacus": 16, "FastDP": 14, "FlashDP": 6}


def test_every_hole_is_tested() -> None:
    tested = {(hole.peer, hole.number) for hole in peer_holes()}
    assert tested == {(peer, number) for peer, count in HOLES.items() for number in range(1, count + 1)}
