"""On two ranks as on one device: a parameter that goes around its layer is found (see `tests/unit/test_hidden_uses.py`).

FSDP1's own code is then on the stack of everything that the model computes, which once hid all of it.
"""

import functools
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from fsdp_dp import UnsupportedModelError
from tests.distributed.backends import BACKENDS, played, privacy_config
from tests.distributed.harness import RankFailure, run
from tests.oracle import Unit
from tests.unit.test_hidden_uses import EXACT, REPLACED, ROWS, USES, Model, in_place_of, row_loss, rows


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """What a training step is told."""

    use: str
    backend: str
    bare: bool = False

    def run(self) -> str:
        use = USES.get(self.use) or (lambda m, x, w: in_place_of(m, x, REPLACED[self.use](x)))
        model, engine = BACKENDS[self.backend](Model(use, self.bare), privacy_config(max_grad_norm=1.0))
        try:
            with engine.microbatch(torch.ones(ROWS, dtype=torch.bool)):
                row_loss(model, rows()).backward()
            engine.privatize()
        except (UnsupportedModelError, RuntimeError) as refused:
            return str(refused)
        finally:
            engine.detach()
        return "released"


ATTEMPTS = [
    *(Attempt(use=use, backend=backend) for use in USES if use not in EXACT for backend in ("fsdp1", "fsdp2")),
    *(Attempt(use=use, backend="fsdp2") for use in REPLACED),
    *(Attempt(use="autograd function", backend=backend, bare=True) for backend in ("fsdp1", "fsdp2")),
]
# FSDP1 has views beside the registry, which functional_call does not replace: the layer runs with its own weight.
NO_EFFECT = Attempt(use="in the place of another's", backend="fsdp1")
results = functools.cache(lambda: played(2, ATTEMPTS))


@pytest.mark.parametrize("attempt", [x for x in ATTEMPTS if x != NO_EFFECT], ids=str)
def test_refused_by_name(attempt: Attempt) -> None:
    """Seen to fail, under FSDP1, when anything on the stack of torch's distributed code is taken for a use by FSDP."""
    told = results()[attempt]
    assert any(part in told for part in ("'first.weight' is used by", "in the place of", "'bare'", "TorchScript")), told


def test_what_functional_call_does_not_replace() -> None:
    assert results()[NO_EFFECT] == "released"


class Part(Unit):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x)


class Summing(nn.Module):
    """Reads a weight of a unit whose forward is over."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.part, self.last = Part(width), nn.Linear(width, 2)
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.part(x) * self.read().square().sum())

    def read(self) -> torch.Tensor:
        return self.part.fc.weight


class SummingBias(Summing):
    """One of two ranks has all of it in its shard, the other nothing."""

    def read(self) -> torch.Tensor:
        return self.part.fc.bias


def train_summing(rank: int, world_size: int, backend: str) -> None:
    x = rows()
    model, engine = BACKENDS[backend](Summing(x.shape[-1]), privacy_config(max_grad_norm=1.0))
    with engine.microbatch(torch.ones(len(x), dtype=torch.bool)):
        row_loss(model, x).backward()


def refused_summing(rank: int, world_size: int, backend: str) -> str:
    x = rows()
    model, engine = BACKENDS[backend](SummingBias(x.shape[-1]), privacy_config(max_grad_norm=1.0))
    with pytest.raises(UnsupportedModelError) as refused, engine.microbatch(torch.ones(len(x), dtype=torch.bool)):
        row_loss(model, x).backward()
    return str(refused.value)


@pytest.mark.parametrize("backend", ["fsdp1", "fsdp2"])
def test_sharded_parameters_that_are_read_are_refused(backend: str) -> None:
    """Under FSDP1 a rank would read its own part. Seen to fail with an error of torch's, of a gradient that does not fit."""
    with pytest.raises(RankFailure, match=r"'part.fc.weight', read outside of a layer's own forward, is sharded there"):
        run(train_summing, 2, backend, timeout=60.0)


@pytest.mark.parametrize("backend", ["fsdp1", "fsdp2"])
def test_a_parameter_that_is_whole_on_one_rank_is_refused_on_all(backend: str) -> None:
    """Seen to hang, under FSDP1: the rank that had all of it went on, and waited for the other."""
    told = run(refused_summing, 2, backend, timeout=30.0)
    assert all("'part.fc.bias', read outside of a layer's own forward, is sharded there" in x for x in told)
