"""Engines that are broken on purpose, one fault each, and what a user does with them. Never shipped.

A fault replaces a piece of the engine while `use` runs; `use` returns what the user was told: the message of a refusal, or
an empty string. The table of docs/trust.md is that of `FAULTS`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from fsdp_dp import PrivacyConfig, PrivacyEngine, check_private, engine, make_private, noise
from fsdp_dp.auditing import Audit
from fsdp_dp.errors import PrivacyError, UnsupportedModelError
from fsdp_dp.gradients import IndexedRows, Materialized, OuterProduct, TiedSum
from fsdp_dp.guards import ReleaseGuard
from fsdp_dp.kernels import release
from fsdp_dp.models.config import GPTConfig
from fsdp_dp.models.objective import IGNORED
from fsdp_dp.sharding import sums
from fsdp_dp.sharding.tensor_parallel import TensorParallel
from fsdp_dp.training.app import privacy_config
from fsdp_dp.training.audit_options import AuditConfig, AuditOptions
from fsdp_dp.training.auditing_run import Job, audit
from fsdp_dp.training.schema import PrivacyOptions, ShardingConfig
from fsdp_dp.training.world import describe_world, start_world
from tests.distributed.backends import BACKENDS
from tests.oracle import CASES

INPUTS, WIDTH, OUTPUTS, ROWS, VALID = 6, 16, 3, 4, 5
STEPS = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fault:
    """`check` is what shall notice it, after `releases` releases at the latest; `told` is a part of what it says."""

    name: str
    check: str
    releases: str
    told: str
    use: Callable[[], str]
    broken: Callable[[], AbstractContextManager[Any]] = nullcontext
    ranks: int = 1


# ----------------------------------------------------------------------------------------------------- what users do


def config(**changes: Any) -> PrivacyConfig:
    options: dict[str, Any] = {
        "max_grad_norm": 0.1, "noise_multiplier": 1.0, "expected_batch_size": 8, "dataset_size": 800,
        "target_delta": 1e-4, "sampling": "external_poisson",
    }  # fmt: skip
    return PrivacyConfig(**(options | changes))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(INPUTS, WIDTH), nn.Tanh(), nn.Linear(WIDTH, OUTPUTS))


def rows(count: int = ROWS) -> Tensor:
    return torch.randn(count, INPUTS, generator=torch.Generator().manual_seed(1))


def told(act: Callable[[], Any]) -> str:
    """What a user was told."""
    try:
        act()
    except (PrivacyError, UnsupportedModelError) as error:
        return str(error)
    return ""


def training(real: int = ROWS, count: int = ROWS, steps: int = STEPS, reload: bool = False) -> str:
    """A few releases of `count` rows, of which `real` take part; then perhaps a checkpoint is loaded."""
    model = network()
    if dist.is_initialized():
        model = fully_shard(model)

    def act() -> None:
        private = make_private(model, config())
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        for _ in range(steps):
            with private.microbatch(torch.arange(count) < real):
                model(rows(count)).square().sum(-1).mean().backward()
            optimizer.step()
        if reload:
            private.load_state_dict(private.state_dict())

    return told(act)


def shuffled_batches() -> str:
    """The program's own shuffled loader, where the accountant was told of Poisson draws."""
    model = network()
    with patch("warnings.warn"):
        private = make_private(model, config(sampling="poisson"))
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        for batch in torch.utils.data.DataLoader(rows(8), batch_size=4, shuffle=True):
            model(batch).square().sum(-1).mean().backward()
            optimizer.step()
    return told(private.epsilon)


def refused(model: nn.Module, batch: Any, loss: Any) -> str:
    """What `check_private` refuses."""
    verdict = check_private(model, batch, loss)
    return "\n".join(str(finding) for finding in verdict.findings if finding.status == "REFUSED")


def verdict_on_network() -> str:
    return refused(network(), rows(), lambda model, x: model(x).square().sum(-1).mean())


def verdict_on_tied() -> str:
    case = CASES["tied"]
    return refused(case.model(), case.batch(), lambda model, b: case.row_losses(model(b[0]), b[1]).mean())


class Words(nn.Module):
    """Ids to logits."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(7, 8), nn.Linear(8, 7)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.table(ids).tanh())


def token_mean() -> str:
    ids = torch.randint(7, (ROWS, VALID), generator=torch.Generator().manual_seed(1))
    targets = torch.where(torch.arange(VALID) <= torch.arange(1, ROWS + 1)[:, None], ids, IGNORED)
    return refused(Words(), (ids, targets), lambda m, b: F.cross_entropy(m(b[0]).mT, b[1], ignore_index=IGNORED))


def weight_penalty() -> str:
    return refused(network(), rows(), lambda m, x: m(x).square().sum(-1).mean() + m[0].weight.square().sum())


def running_statistics() -> str:
    model = nn.Sequential(nn.Linear(INPUTS, WIDTH), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, OUTPUTS))
    return refused(model, rows(), lambda m, x: m(x).square().sum(-1).mean())


def sequence_parallel() -> str:
    """Norm layers that see a part of the positions on each rank."""
    case = CASES["four positions"]

    def act() -> None:
        model, _ = BACKENDS["sp alone"](case.model(torch.float64), config())
        inputs, targets = case.batch()
        case.row_losses(model(inputs), targets).mean().backward()

    return told(act)


def audited(coins: int = 0, noise_multiplier: float = 4.0, **options: Any) -> Audit:
    """One release of 400 canaries in a tiny decoder; epsilon 1.5 with this much noise."""
    config = AuditConfig(
        sharding=ShardingConfig(strategy="fully_shard"),
        model=GPTConfig(layers=1, heads=1, width=8, mlp_width=8, block_size=8),
        privacy=PrivacyOptions(noise_multiplier=noise_multiplier, target_delta=1e-10, **options),
        audit=AuditOptions(canaries=400, rows=0, seed=coins),
        steps=1, batch_size=400, microbatch_size=200, device="cpu",
    )  # fmt: skip
    privacy = privacy_config(config, 400)
    assert privacy is not None
    job = Job(config=config, privacy=privacy, rows=torch.empty(0, 9, dtype=torch.uint8))
    if dist.is_initialized():
        return audit(job, describe_world(config, torch.device("cpu")))
    with start_world(config) as world:
        return audit(job, world)


def auditing() -> str:
    """What an audit says against the claim."""
    found: list[Audit] = []
    refusal = told(lambda: found.append(audited()))
    return refusal or ("" if found[0].consistent else str(found[0]))


# ------------------------------------------------------------------------------------------------------- what is broken


@contextmanager
def other_noise(change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """The release adds something else than the noise it drew."""

    def drawn(*args: Any, **kwargs: Any) -> Tensor:
        return change(noise.standard_normal(*args, **kwargs))

    with patch.object(release, "noise", SimpleNamespace(standard_normal=drawn)):
        yield


def missing_on_one_rank() -> AbstractContextManager[None]:
    return other_noise(lambda xi: xi * (dist.get_rank() != 1))


def root_of_ranks_too_small() -> AbstractContextManager[None]:
    return other_noise(lambda xi: xi / math.sqrt(dist.get_world_size()))


def rounded_noise() -> AbstractContextManager[None]:
    return other_noise(lambda xi: xi.bfloat16().double())


def weak_source() -> AbstractContextManager[Any]:
    drawn = noise.standard_normal
    return patch.object(noise, "standard_normal", lambda *args, **kwargs: drawn(*args, **kwargs) / 2)


def same_on_every_rank() -> AbstractContextManager[Any]:
    return patch.object(engine, "Segment", lambda **fields: release.Segment(**(fields | {"start": 0})))


def drawn_batch_as_divisor() -> AbstractContextManager[Any]:
    def privatize(segments: Sequence[Any], **options: Any) -> Any:
        return release.privatize_all_(segments, **(options | {"divisor": ROWS}))

    return patch.object(engine, "privatize_all_", privatize)


@contextmanager
def uncounted_release() -> Iterator[None]:
    made = PrivacyEngine._private_gradients

    def uncounted(self: PrivacyEngine) -> dict[str, Tensor]:
        gradients = made(self)
        self.steps -= 1
        return gradients

    with patch.object(PrivacyEngine, "_private_gradients", uncounted):
        yield


def constant_key() -> AbstractContextManager[Any]:
    return patch.object(noise, "new_key", lambda: bytes(32))


@contextmanager
def other_weights(mask: bool = True, times: float = 1.0) -> Iterator[None]:
    """Rows are weighted without their mask, or several times."""
    weigh = engine.row_weights

    def broken(terms: Any, mask_B: Tensor, **options: Any) -> Any:
        found = weigh(terms, mask_B if mask else torch.ones_like(mask_B), **options)
        return dataclasses.replace(found, weight_B=found.weight_B * times)

    with patch.object(engine, "row_weights", broken):
        yield


@contextmanager
def unclipped_layer() -> Iterator[None]:
    """The first layer's weight is summed with the weights of rows that need no clipping."""
    stored, outer = Materialized.weighted_sum, OuterProduct.weighted_sum

    def of_stored(self: Materialized, weight_B: Tensor, keep_B: Tensor) -> Tensor:
        return stored(self, weight_B.amax().expand_as(weight_B) if self.value.shape[-1] == INPUTS else weight_B, keep_B)

    def of_outer(self: OuterProduct, weight_B: Tensor, keep_B: Tensor) -> Tensor:
        return outer(self, weight_B.amax().expand_as(weight_B) if self.a_BTD.shape[-1] == INPUTS else weight_B, keep_B)

    with patch.object(Materialized, "weighted_sum", of_stored), patch.object(OuterProduct, "weighted_sum", of_outer):
        yield


def unclipped_table() -> AbstractContextManager[Any]:
    """The gradients of tables are summed without weights."""
    summed = IndexedRows.weighted_sum
    return patch.object(
        IndexedRows, "weighted_sum", lambda self, w_B, keep_B: summed(self, torch.ones_like(w_B), keep_B)
    )


def no_cross_term() -> AbstractContextManager[Any]:
    def nothing(self: TiedSum) -> tuple[Tensor, Tensor]:
        zeros = torch.zeros(len(self.outer.a_BTD), dtype=torch.float64)
        return zeros, zeros

    return patch.object(TiedSum, "_inner_product", nothing)


def parts_as_wholes() -> AbstractContextManager[Any]:
    return patch.object(TensorParallel, "_add_up", lambda self, gradients: gradients)


@contextmanager
def no_noise_and_no_guards() -> Iterator[None]:
    with other_noise(torch.zeros_like), patch.object(ReleaseGuard, "before", lambda self, segments, bound: []):
        yield


def rounded_sums() -> AbstractContextManager[Any]:
    """Buckets travel in bfloat16."""
    start = sums.start_reduce_scatter

    def narrow(shard: Tensor, bucket: Tensor, group: Any) -> Any:
        half = torch.empty_like(shard, dtype=torch.bfloat16)
        start(half, bucket.bfloat16(), group).wait()
        shard.copy_(half)
        return SimpleNamespace(wait=lambda: None)

    return patch.object(sums, "start_reduce_scatter", narrow)


GUARD, VERDICT, REFUSAL, AUDIT = "guard of the release", "`check_private`", "refusal", "`fsdp_dp.audit`"
NOISE = "is not what is accounted for"
TOO_LONG = "longer than max_grad_norm"

FAULTS = [
    Fault(
        name="noise of half the scale at its source", check=GUARD, releases="1", told=NOISE, use=training,
        broken=weak_source,
    ),
    Fault(name="noise rounded to bfloat16", check=GUARD, releases="1", told=NOISE, use=training, broken=rounded_noise),
    Fault(
        name="mean over the drawn batch", check=GUARD, releases="1", told=NOISE, use=training, broken=drawn_batch_as_divisor
    ),
    Fault(
        name="a release not counted", check=GUARD, releases="2", told="was counted already", use=training,
        broken=uncounted_release,
    ),
    Fault(
        name="noise repeated after a load", check=GUARD, releases="at the load", told="the last one again",
        use=lambda: training(reload=True), broken=constant_key,
    ),
    Fault(
        name="dummy rows counted", check=GUARD, releases="1, of an empty draw", told=TOO_LONG,
        use=lambda: training(real=0), broken=lambda: other_weights(mask=False),
    ),
    Fault(
        name="a row counted twice", check=GUARD, releases="1, of one row", told=TOO_LONG,
        use=lambda: training(real=1, count=1), broken=lambda: other_weights(times=2.0),
    ),
    Fault(
        name="a row counted twice, among others", check=VERDICT, releases="0", told="clipped sum", use=verdict_on_network,
        broken=lambda: other_weights(times=2.0),
    ),
    Fault(
        name="a layer not clipped", check=VERDICT, releases="0", told="parameter '0.weight'", use=verdict_on_network,
        broken=unclipped_layer,
    ),
    Fault(
        name="tied cross term dropped", check=VERDICT, releases="0", told="run backward alone", use=verdict_on_tied,
        broken=no_cross_term,
    ),
    Fault(name="a token-mean loss", check=VERDICT, releases="0", told="loss", use=token_mean),
    Fault(name="a parameter used behind its tap", check=VERDICT, releases="0", told="0.weight", use=weight_penalty),
    Fault(name="running statistics saved", check=VERDICT, releases="0", told="BatchNorm", use=running_statistics),
    Fault(
        name="shuffled batches accounted as Poisson", check=REFUSAL, releases="1: `epsilon()` raises",
        told="so no epsilon holds", use=shuffled_batches,
    ),
    Fault(
        name="noise missing on one shard", check=GUARD, releases="1", told=NOISE, use=training, broken=missing_on_one_rank,
        ranks=2,
    ),
    Fault(
        name="sqrt(W) too little noise", check=GUARD, releases="1", told=NOISE, use=training,
        broken=root_of_ranks_too_small, ranks=2,
    ),
    Fault(
        name="the same noise on every shard", check=GUARD, releases="1", told=NOISE, use=training,
        broken=same_on_every_rank, ranks=2,
    ),
    Fault(
        name="no noise at all, and no guards", check=AUDIT, releases="1, with 400 canaries", told="BROKEN", use=auditing,
        broken=no_noise_and_no_guards,
    ),
    Fault(
        name="sums reduced in bfloat16", check=AUDIT, releases="0", told="a narrow format", use=auditing,
        broken=rounded_sums, ranks=2,
    ),
    Fault(
        name="a layer not clipped, under FSDP", check=AUDIT, releases="0", told=TOO_LONG, use=auditing,
        broken=unclipped_table, ranks=2,
    ),
    Fault(
        name="norms of partial gradients summed under TP", check=REFUSAL, releases="0: the first backward",
        told="are parts of a row's gradient", use=sequence_parallel, broken=parts_as_wholes, ranks=2,
    ),
]  # fmt: skip
