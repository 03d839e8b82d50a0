"""Engines that are broken on purpose, one fault each, and what a user does with them. Never shipped.

A fault replaces a piece of the engine while `use` runs; `use` returns what the user was told: the message of a refusal, or
an empty string. The table of docs/trust.md is that of `FAULTS`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from fsdp_dp import (
    AdaptiveBounds,
    PrivacyConfig,
    PrivacyEngine,
    adaptive_bounds,
    bounds,
    check_private,
    engine,
    guards,
    make_private,
    noise,
    sampling,
)
from fsdp_dp.auditing import Audit
from fsdp_dp.errors import PrivacyError, UnsupportedModelError
from fsdp_dp.gradients import IndexedRows, Materialized, OuterProduct, TiedSum
from fsdp_dp.guards import ReleaseGuard
from fsdp_dp.kernels import release
from fsdp_dp.models.config import GPTConfig
from fsdp_dp.models.objective import IGNORED
from fsdp_dp.sharding import ShardedModel, sums
from fsdp_dp.sharding.tensor_parallel import TensorParallel
from fsdp_dp.training.app import privacy_config
from fsdp_dp.training.audit_options import AuditConfig, AuditOptions
from fsdp_dp.training.auditing_run import Job, audit
from fsdp_dp.training.schema import ClippingOptions, PrivacyOptions, ShardingConfig
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


def network(width: int = WIDTH) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(INPUTS, width), nn.Tanh(), nn.Linear(width, OUTPUTS))


def rows(count: int = ROWS) -> Tensor:
    return torch.randn(count, INPUTS, generator=torch.Generator().manual_seed(1))


def told(act: Callable[[], Any]) -> str:
    """What a user was told."""
    try:
        act()
    except (PrivacyError, UnsupportedModelError) as error:
        return str(error)
    return ""


def training(
    real: int = ROWS, count: int = ROWS, steps: int = STEPS, reload: bool = False, width: int = WIDTH, **options: Any
) -> str:
    """A few releases of `count` rows, of which `real` take part; then perhaps a checkpoint is loaded."""
    model = network(width)
    if dist.is_initialized():
        model = fully_shard(model)

    def act() -> None:
        private = make_private(model, config(**options))
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        for _ in range(steps):
            with private.microbatch(torch.arange(count) < real):
                model(rows(count)).square().sum(-1).mean().backward()
            optimizer.step()
        if reload:
            private.load_state_dict(private.state_dict())

    return told(act)


def drawing(steps: int = STEPS, **options: Any) -> str:
    """A few releases of rows that the engine's loader draws."""
    model = network()
    if dist.is_initialized():
        model = fully_shard(model)

    def act() -> None:
        chosen = {"sampling": "poisson", "expected_batch_size": 200, "dataset_size": 1000} | options
        private = make_private(model, config(**chosen))
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        for logical_batch in private.loader(rows(chosen["dataset_size"]), microbatch_size=100, steps=steps):
            for microbatch in logical_batch:
                model(microbatch).square().sum(-1).mean().backward()
            optimizer.step()

    return told(act)


def discarding(count: int) -> str:
    """One logical batch is dropped, and another of the same rows released."""
    model = network()

    def act() -> None:
        private = make_private(model, config())
        model(rows(count)).square().sum(-1).mean().backward()
        private.discard()
        model(rows(count)).square().sum(-1).mean().backward()
        private.privatize()

    return told(act)


def stepping_twice() -> str:
    model = network()

    def act() -> None:
        make_private(model, config())
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        model(rows()).square().sum(-1).mean().backward()
        optimizer.step()
        optimizer.step()

    return told(act)


def thawing() -> str:
    """A parameter becomes trainable after the engine was attached."""
    model = network()
    model[0].weight.requires_grad_(False)

    def act() -> None:
        make_private(model, config())
        model[0].weight.requires_grad_(True)
        model(rows()).square().sum(-1).mean().backward()

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


def audited(
    coins: int = 0, noise_multiplier: float = 4.0, clipping: str = "flat", batch_size: int = 400, **options: Any
) -> Audit:
    """One release of 400 canaries in a tiny decoder; epsilon 1.5 with this much noise."""
    config = AuditConfig(
        sharding=ShardingConfig(strategy="fully_shard"),
        model=GPTConfig(layers=1, heads=1, width=8, mlp_width=8, block_size=8),
        privacy=PrivacyOptions(noise_multiplier=noise_multiplier, target_delta=1e-10, **options),
        audit=AuditOptions(canaries=400, rows=0, seed=coins),
        clipping=ClippingOptions(groups=clipping),
        steps=1, batch_size=batch_size, microbatch_size=200, device="cpu",
    )  # fmt: skip
    privacy = privacy_config(config, 400)
    assert privacy is not None
    job = Job(config=config, privacy=privacy, rows=torch.empty(0, 9, dtype=torch.uint8))
    if dist.is_initialized():
        return audit(job, describe_world(config, torch.device("cpu")))
    try:
        with start_world(config) as world:
            return audit(job, world)
    finally:
        if dist.is_initialized():  # after an error, which in a program of its own ends all ranks
            dist.destroy_process_group()


def auditing(clipping: str = "flat") -> str:
    """What an audit says against the claim."""
    found: list[Audit] = []
    refusal = told(lambda: found.append(audited(clipping=clipping)))
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


def noise_at_looked_at_elements() -> AbstractContextManager[None]:
    """What a kernel that leaves out its inner blocks would do."""

    def change(xi: Tensor) -> Tensor:
        kept = torch.zeros_like(xi, dtype=torch.bool)
        kept[guards._sites(len(xi), xi.device)] = True
        return torch.where(kept, xi, 0.0)

    return other_noise(change)


def other_release(change: Callable[[dict[str, Any]], dict[str, Any]]) -> AbstractContextManager[Any]:
    """The release is made with other options than the mechanism's."""

    def privatize(segments: Sequence[Any], **options: Any) -> Any:
        return release.privatize_all_(segments, **(options | change(options)))

    return patch.object(engine, "privatize_all_", privatize)


def drawn_batch_as_divisor() -> AbstractContextManager[Any]:
    return other_release(lambda _: {"divisor": ROWS})


def number_of_the_last_release() -> AbstractContextManager[Any]:
    return other_release(lambda options: {"release": options["release"] - 1})


def noise_in_the_first_release_only() -> AbstractContextManager[Any]:
    return other_release(lambda options: {"noise_std": options["noise_std"] * (options["release"] == 1)})


def noise_of_one_parameter_only() -> AbstractContextManager[Any]:
    def privatize(segments: Sequence[Any], *, later: Iterable[Sequence[Any]], **options: Any) -> Any:
        segments = [*segments, *itertools.chain(*later)]
        release.privatize_all_(segments[1:], **(options | {"noise_std": 0.0}))
        return release.privatize_all_(segments[:1], **options)

    return patch.object(engine, "privatize_all_", privatize)


def other_split(of_gradients: float, of_counts: float) -> AbstractContextManager[Any]:
    """Standard deviations that are not those of the accounted noise multiplier."""

    def split(*args: Any) -> tuple[float, float]:
        found = adaptive_bounds.split_noise(*args)
        return found[0] * of_gradients, found[1] * of_counts

    return patch.object(bounds, "split_noise", split)


def noise_for_one_group() -> AbstractContextManager[Any]:
    """R of all groups together is taken to be that of one of them."""
    return patch.object(bounds.math, "hypot", lambda *of_groups: of_groups[0])


def groups_bounded_by_the_whole() -> AbstractContextManager[Any]:
    """Each of K groups may be as long as R."""
    of_row_in = bounds.Bounds.of_row_in
    return patch.object(
        bounds.Bounds, "of_row_in", lambda self, group: of_row_in(self, group) * math.sqrt(len(self.of_groups))
    )


def other_draws(change: Callable[..., Tensor]) -> AbstractContextManager[Any]:
    drawn = sampling.poisson_draw
    return patch.object(sampling, "poisson_draw", lambda *args: change(drawn, *args))


def whole_draws_on_every_rank() -> AbstractContextManager[Any]:
    share = sampling.microbatch_rows
    return patch.object(sampling, "microbatch_rows", lambda drawn, size, *args: share(drawn, size, 0, 1))


def sums_that_stay() -> AbstractContextManager[Any]:
    """A discard leaves the sums where they are."""
    return patch.object(ShardedModel, "zero_accumulators", lambda self: self._sums.finish())


@contextmanager
def uncounted_release() -> Iterator[None]:
    made = PrivacyEngine._private_gradients

    def uncounted(self: PrivacyEngine, release: int) -> dict[str, Tensor]:
        gradients = made(self, release)
        self._releases.number -= 1
        return gradients

    with patch.object(PrivacyEngine, "_private_gradients", uncounted):
        yield


def sums_published() -> AbstractContextManager[Any]:
    """What the guards have looked at is not what the optimizer is given."""
    made = PrivacyEngine._private_gradients

    def unnoised(self: PrivacyEngine, release: int) -> dict[str, Tensor]:
        sums = {p.name: p.accumulator / self.privacy.expected_batch_size for p in self.model.parameters}
        made(self, release)
        return sums

    return patch.object(PrivacyEngine, "_private_gradients", unnoised)


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


@contextmanager
def no_cross_term() -> Iterator[None]:
    def nothing(self: TiedSum) -> tuple[Tensor, Tensor]:
        zeros = torch.zeros(len(self.outer.a_BTD), dtype=torch.float64)
        return zeros, zeros

    with patch.object(TiedSum, "_inner_product", nothing), patch.object(TiedSum, "is_fused", False):
        yield


def parts_as_wholes() -> AbstractContextManager[Any]:
    return patch.object(TensorParallel, "_add_up", lambda self, gradients: gradients)


@contextmanager
def no_noise_and_no_guards() -> Iterator[None]:
    with other_noise(torch.zeros_like), patch.object(ReleaseGuard, "before", lambda self, bound: []):
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


GUARD, DRAWS, VERDICT = "guard of the release", "guard of the draws", "`check_private`"
REFUSAL, AUDIT = "refusal", "`fsdp_dp.audit`"
NOISE = "is not what is accounted for"
TOO_LITTLE = "less than is accounted for"
TOO_LONG = "longer than max_grad_norm"
NO_DRAW = "no draw that the accountant assumes"

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
        name="noise of one parameter only", check=GUARD, releases="1", told=NOISE, use=training,
        broken=noise_of_one_parameter_only,
    ),
    Fault(
        name="noise missing inside a shard", check=GUARD, releases="1", told=NOISE, use=lambda: training(width=512),
        broken=noise_at_looked_at_elements,
    ),
    Fault(
        name="noise of the release before", check=GUARD, releases="1", told=NOISE, use=training,
        broken=number_of_the_last_release,
    ),
    Fault(
        name="noise in the first release only", check=GUARD, releases="10", told=NOISE, use=lambda: training(steps=10),
        broken=noise_in_the_first_release_only,
    ),
    Fault(
        name="half of the accounted noise", check=GUARD, releases="0", told=TOO_LITTLE, use=training,
        broken=lambda: other_split(0.5, 1.0),
    ),
    Fault(
        name="counts of adaptive bounds without noise", check=GUARD, releases="0", told=TOO_LITTLE,
        use=lambda: training(adaptive_bounds=AdaptiveBounds()), broken=lambda: other_split(1.0, 0.0),
    ),
    Fault(
        name="noise for the bound of one group of several", check=GUARD, releases="1", told="less noise than is accounted",
        use=lambda: training(clipping="layer"), broken=noise_for_one_group,
    ),
    Fault(
        name="each of K groups as long as R", check=AUDIT, releases="0", told=TOO_LONG, use=lambda: auditing("layer"),
        broken=groups_bounded_by_the_whole,
    ),
    Fault(
        name="sums published in place of the release", check=AUDIT, releases="1, with 400 canaries", told="BROKEN",
        use=auditing, broken=sums_published,
    ),
    Fault(
        name="sums kept by a discard", check=GUARD, releases="1", told=TOO_LONG, use=lambda: discarding(ROWS),
        broken=sums_that_stay,
    ),
    Fault(
        name="rows drawn twice as often", check=DRAWS, releases="0, of 200 rows", told=NO_DRAW, use=drawing,
        broken=lambda: other_draws(lambda drawn, key, step, rows, rate: drawn(key, step, rows, 2 * rate)),
    ),
    Fault(
        name="the same draw again", check=DRAWS, releases="1, of 200 rows", told=NO_DRAW, use=drawing,
        broken=lambda: other_draws(lambda drawn, key, step, rows, rate: drawn(key, 0, rows, rate)),
    ),
    Fault(
        name="a row twice in a draw", check=DRAWS, releases="0", told=NO_DRAW, use=drawing,
        broken=lambda: other_draws(lambda drawn, *args: drawn(*args).repeat_interleave(2)),
    ),
    Fault(
        name="an optimizer that steps twice", check=REFUSAL, releases="1", told="there is nothing to release",
        use=stepping_twice,
    ),
    Fault(
        name="a parameter that becomes trainable later", check=REFUSAL, releases="0", told="became trainable after",
        use=thawing,
    ),
    Fault(
        name="the whole draw on every rank", check=GUARD, releases="1, of 200 rows", told="more or fewer than a draw has",
        use=drawing, broken=whole_draws_on_every_rank, ranks=2,
    ),
    Fault(
        name="norms of partial gradients summed under TP", check=REFUSAL, releases="0: the first backward",
        told="are parts of a row's gradient", use=sequence_parallel, broken=parts_as_wholes, ranks=2,
    ),
]  # fmt: skip
