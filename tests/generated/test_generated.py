"""Generated architectures are trained as the oracle's loop trains them, on two ranks, by FSDP1 and by FSDP2.

A failure prints its seed, its architecture and the command that shows it again.
"""

import pytest

from tests.distributed.backends import fail_if_any
from tests.generated.running import problems

CI = range(0, 22)
SLOW = [range(first, first + 25) for first in range(0, 400, 25)]
BACKENDS = ["fsdp1", "fsdp2"]


def test_a_covering_few() -> None:
    fail_if_any(problems(CI, BACKENDS))


@pytest.mark.slow
@pytest.mark.parametrize("seeds", SLOW, ids=str)
def test_many(seeds: range) -> None:
    fail_if_any(problems(seeds, BACKENDS))
