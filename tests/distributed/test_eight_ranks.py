"""Updates are the oracle's on eight ranks, in the meshes that scaling is measured on: 8, 2 x 4, and 4 x 2 with TP."""

import pytest

from tests.distributed.backends import Training, disagreements, fail_if_any, played
from tests.oracle import Groups

RANKS = 8
BACKENDS = ("fsdp2", "fsdp2 2x4", "fsdp2 hybrid", "tp 4x2")  # "hybrid" is four copies of two shards here
GROUPINGS = ("flat", "block", "layer")


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_updates_are_the_oracles(backend: str) -> None:
    tasks = [
        Training(case=case, backend=backend, groups=Groups(clipping=clipping), empty_last=True, **options)
        for clipping in GROUPINGS
        for case, options in (
            ("decoder", {"optimizer": "adamw", "steps": 3, "microbatch": 1}),
            ("tied", {"optimizer": "momentum", "steps": 2, "loss_reduction": "sum"}),
        )
    ]
    fail_if_any(disagreements(played(RANKS, tasks)))
