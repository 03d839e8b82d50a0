"""docs/support.md is what its script makes of the tests, and every hole of a peer has its test, by number."""

from pathlib import Path

import pytest

from scripts.make_support_matrix import PAGE, documented, page, peer_holes
from tests.models.zoo import MODELS

HOLES = {"Opacus": 16, "FastDP": 14, "FlashDP": 6}


def test_the_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run python scripts/make_support_matrix.py"


def test_the_readme_counts_as_many_models() -> None:
    readme = (PAGE.parents[1] / "README.md").read_text(encoding="utf-8")
    assert f"lists {len(MODELS)} unmodified Hugging Face models" in readme


def test_every_hole_is_tested() -> None:
    tested = {(hole.peer, hole.number) for hole in peer_holes()}
    assert tested == {(peer, number) for peer, count in HOLES.items() for number in range(1, count + 1)}


@pytest.mark.parametrize("name", ["test_behaviour.py"])
def test_every_behaviour_has_its_line(name: str) -> None:
    path = Path(__file__).parents[1] / "models" / name
    with_lines = {test for test, _ in documented(path)}
    assert with_lines == {
        line[4:].split("(")[0] for line in path.read_text().splitlines() if line.startswith("def test_")
    }
