"""GUARANTEE.md where ranks matter: float32 sums, one noise field, fixed order of collectives, tensor-parallel norms.

One spawn of two ranks and one of four; a sub-case is a function that every rank runs, and answers on each.
"""

from __future__ import annotations

import copy
import itertools
import math
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as TorchFSDP
from torch.distributed.fsdp import MixedPrecision, MixedPrecisionPolicy, ShardingStrategy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode

from fsdp_dp import FullyShardedDataParallel, PrivacyConfig, PrivacyEngine, make_private
from tests.distributed.harness import run

CPU = torch.device("cpu")
KINDS = ("fsdp1", "fsdp2")
INPUTS, WIDTH, OUTPUTS, ROWS = 3, 5, 2, 4
EXPECTED_BATCH_SIZE = 8


def config(**changes: Any) -> PrivacyConfig:
    options: dict[str, Any] = {
        "max_grad_norm": 1.0,
        "noise_multiplier": 0.0,
        "expected_batch_size": EXPECTED_BATCH_SIZE,
        "dataset_size": 64,
        "target_delta": 1e-3,
        "sampling": "external_poisson",
    }
    return PrivacyConfig(**(options | changes))


class Block(nn.Module):
    """An FSDP unit of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(INPUTS, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x).tanh()


class Branches(nn.Module):
    """Two units and two layers of the root. An odd ``branch`` cuts the second unit's gradient, and uses another layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = Block(), Block()
        self.even, self.odd, self.head = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.branch = 0
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.first(x), self.second(x)
        if self.branch:
            return self.head(self.odd(first + second.detach()))
        return self.head(self.even(first + second))


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).sub(1).square().sum(-1).mean()


def rows(rank: int, count: int = ROWS) -> Tensor:
    return torch.randn(count, INPUTS, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)


# ------------------------------------------------------------------------------------------------------- attachment


def attach(
    kind: str, model: nn.Module, *, reshard: bool = True, reduce_dtype: torch.dtype | None = None, **changes: Any
) -> tuple[nn.Module, PrivacyEngine]:
    """`model` sharded by its blocks and its root, and private."""
    if kind == "fsdp1":
        strategy = ShardingStrategy.FULL_SHARD if reshard else ShardingStrategy.SHARD_GRAD_OP
        wrapped = FullyShardedDataParallel(
            model,
            privacy=config(**changes),
            auto_wrap_policy=ModuleWrapPolicy({Block}),
            sharding_strategy=strategy,
            device_id=CPU,
            mixed_precision=None if reduce_dtype is None else MixedPrecision(reduce_dtype=reduce_dtype),
        )
        assert wrapped.privacy_engine is not None
        return wrapped, wrapped.privacy_engine
    mesh, policy = init_device_mesh("cpu", (dist.get_world_size(),)), MixedPrecisionPolicy(reduce_dtype=reduce_dtype)
    for module in list(model.modules()):
        if isinstance(module, Block):
            fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    return model, make_private(model, config(**changes))


def inner(model: nn.Module) -> Any:
    """The user's module inside FSDP1's wrapper."""
    return model.module if isinstance(model, TorchFSDP) else model


def whole(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter, unsharded, by the plain model's name."""
    if isinstance(model, TorchFSDP):
        with TorchFSDP.summon_full_params(model, writeback=False):
            return {n.replace("_fsdp_wrapped_module.", ""): p.detach().clone() for n, p in model.named_parameters()}
    return {n: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for n, p in model.named_parameters()}


def step(model: nn.Module) -> dict[str, Tensor]:
    """Released gradients times the expected batch size, seen as what SGD(lr=1) subtracts."""
    before = whole(model)
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    after = whole(model)
    return {name: (before[name] - after[name]) * EXPECTED_BATCH_SIZE for name in before}


def flat(tensors: dict[str, Tensor], names: list[str] | None = None) -> Tensor:
    return torch.cat([tensors[name].flatten() for name in names or sorted(tensors)])


def oracle(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient norms of rows, and their clipped sum, by one plain backward a row; parameters in order of name."""
    plain, gradients = copy.deepcopy(model), []
    for row in x:
        plain.zero_grad()
        loss(plain, row[None]).backward()
        parts = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in plain.named_parameters()}
        gradients.append(flat(parts))
    stacked = torch.stack(gradients)
    norms = stacked.norm(dim=1)
    return norms, (stacked * (1 / norms).clamp(max=1)[:, None]).sum(0)


def raised(function: Callable[[], Any]) -> str:
    """What a rank was told, or an empty string."""
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


class Collectives(TorchDispatchMode):
    """The dtypes and sizes of reductions between ranks, in the order in which this rank issues them."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, torch.dtype, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name.startswith("c10d::") and "reduce" in name:
            tensors = [x for x in torch.utils._pytree.tree_leaves(args) if isinstance(x, Tensor)]
            self.seen += [(name, x.dtype, x.numel()) for x in tensors]
        return func(*args, **(kwargs or {}))


# ------------------------------------------------------------------------------------------------- two ranks, on each


class Tally(nn.Module):
    """Counts rows: the gradient of a row is minus its unit vector."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.lin = nn.Linear(size, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return -self.lin(x)


def bf16_reduce(kind: str, rank: int) -> dict[str, Any]:
    """300 rows on rank 0 and one on rank 1: in bf16 that is 300 or 302."""
    torch.manual_seed(0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model, _ = attach(kind, Tally(4), reduce_dtype=torch.bfloat16, loss_reduction="sum", expected_batch_size=8)
    with Collectives() as collectives:
        model(torch.eye(4)[torch.zeros(300 if rank == 0 else 1, dtype=torch.long)]).sum().backward()
    total = -step(model)["lin.weight"][0, 0]
    return {"total": float(total), "notices": [str(w.message) for w in caught], "collectives": collectives.seen}


def unused_branch(kind: str, rank: int) -> dict[str, Any]:
    plain = Branches()
    expected = torch.zeros(())
    for other in range(2):
        plain.branch = other
        expected = expected + oracle(plain, rows(other))[1]
    model, engine = attach(kind, Branches(), reshard=False)
    inner(model).branch = rank
    with Collectives() as collectives:
        for _ in range(2):
            loss(model, rows(rank)).backward()
            engine.discard()
        loss(model, rows(rank)).backward()
    return {"off": float((flat(step(model)) - expected).abs().max()), "collectives": collectives.seen}


class Layers(nn.Module):
    """Layers that can each be a unit: ids in, ``[B, T]``."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.lin = nn.Embedding(7, 4), nn.Linear(4, 3)
        self.norm, self.head = nn.LayerNorm(3), nn.Linear(3, 2)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.lin(self.table(x)))).sum(1)


def layers_as_units(kind: str, rank: int) -> dict[str, Any]:
    """Each layer wrapped directly, with FSDP2 the last two as one unit."""
    ids = [torch.arange(8).view(4, 2) * (other + 1) % 7 for other in range(2)]
    _, expected = oracle(Layers(), torch.cat(ids))
    model: nn.Module = Layers()
    if kind == "fsdp1":
        policy = ModuleWrapPolicy({nn.Embedding, nn.Linear, nn.LayerNorm})
        model = FullyShardedDataParallel(model, privacy=config(), auto_wrap_policy=policy, device_id=CPU)
    else:
        for unit in (model.table, model.lin, [model.norm, model.head]):
            fully_shard(unit)
        make_private(fully_shard(model), config())
    loss(model, ids[rank]).backward()
    return {"off": float((flat(step(model)) - expected).abs().max())}


def weight_penalty(kind: str, rank: int) -> dict[str, str]:
    """On parameters of which every rank holds a part: a rank that holds none cannot see what is wrong."""
    told = {}
    for place in ("root", "unit"):
        model, engine = attach(kind, Branches())
        modules = [inner(model).even, inner(model).odd, inner(model).head]
        modules = modules if place == "root" else [inner(inner(model).first).lin]

        def penalized(m: nn.Module = model, modules: list[nn.Module] = modules) -> None:
            out = loss(m, rows(rank))
            squares = [p.square().sum() for module in modules for p in module.parameters()]
            (out + sum(x.full_tensor() if isinstance(x, DTensor) else x for x in squares)).backward()

        told[place] = raised(penalized)
        told[f"{place} step"] = raised(lambda m=model: step(m))
        told[f"{place} steps"] = str(engine.steps)
    return told


def noise_field(kind: str, rank: int) -> dict[str, Any]:
    model, engine = attach(kind, Branches(), noise_multiplier=1.0)
    releases = []
    for _ in range(3):
        with engine.microbatch(torch.zeros(2, dtype=torch.bool)):
            loss(model, rows(rank, 2)).backward()
        releases.append(flat(step(model)))
    return {"field": torch.stack(releases)}


def empty_rank(kind: str, rank: int) -> dict[str, Any]:
    _, expected = oracle(Branches(), rows(0))
    model, engine = attach(kind, Branches())
    with engine.microbatch(torch.full((ROWS,), rank == 0)):
        loss(model, rows(rank)).backward()
    return {"off": float((flat(step(model)) - expected).abs().max())}


def global_draw(kind: str, rank: int) -> dict[str, Any]:
    size = 64
    torch.manual_seed(0)
    model, engine = attach(kind, Tally(size).double(), sampling="poisson")
    drawn, counted, microbatches = [], [], []
    for logical_batch in engine.loader(list(torch.eye(size).double()), microbatch_size=3, steps=4):
        seen = [torch.zeros(size, dtype=torch.float64)]
        for x in logical_batch:
            seen.append(x.sum(0))
            model(x).mean().backward()
        drawn.append(torch.stack(seen).sum(0))
        microbatches.append(len(seen) - 1)
        counted.append(-flat(step(model)))
    return {"drawn": torch.stack(drawn), "counted": torch.stack(counted), "microbatches": microbatches}


def agreed_noise(kind: str, rank: int) -> dict[str, Any]:
    _, engine = attach(kind, Branches(), noise_multiplier=None, target_epsilon=2.0, steps=3, dataset_size=8)
    return {"sigma": engine.noise_multiplier, "epsilon": engine.epsilon()}


def impossible_budget(kind: str, rank: int) -> str:
    """Calibration fails on rank 0; the others hear of it instead of waiting."""
    options = {"noise_multiplier": None, "target_epsilon": 1e-300, "steps": 3, "dataset_size": 8}
    return raised(lambda: attach(kind, Branches(), **options))


def refused_wrapping(kind: str, rank: int) -> dict[str, str]:
    """What cannot be attached, or does not run."""
    if kind == "fsdp2":
        alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())][rank]
        part = nn.Sequential(fully_shard(nn.Linear(INPUTS, WIDTH)), nn.Linear(WIDTH, OUTPUTS))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "FSDP is switching to use `NO_SHARD`")
            whole = TorchFSDP(nn.Linear(INPUTS, WIDTH), process_group=alone, device_id=CPU, use_orig_params=True)
        return {
            "parts without a root": raised(lambda: make_private(part, config())),
            "not sharded": raised(lambda: make_private(nn.Linear(INPUTS, WIDTH), config())),
            "smaller group": raised(lambda: make_private(whole, config())),
        }
    flat_parameters = {"privacy": config(), "use_orig_params": False, "device_id": CPU}
    unwrapped = nn.Sequential(FullyShardedDataParallel(nn.Linear(INPUTS, WIDTH), device_id=CPU))
    no_privacy = FullyShardedDataParallel(nn.Linear(INPUTS, WIDTH), device_id=CPU)
    parts = nn.Sequential(TorchFSDP(nn.Linear(INPUTS, WIDTH), device_id=CPU, use_orig_params=True))
    replicated = {"privacy": config(), "sharding_strategy": ShardingStrategy.NO_SHARD, "device_id": CPU}
    detached, engine = attach("fsdp1", Branches())
    engine.detach()
    x = torch.ones(2, INPUTS)
    return {
        "use_orig_params=False": raised(lambda: FullyShardedDataParallel(nn.Linear(3, 2), **flat_parameters)),
        "inner unit as root": raised(lambda: unwrapped(x)),
        "root without privacy": raised(lambda: no_privacy(x)),
        "root without privacy, no_grad": raised(lambda: torch.no_grad()(no_privacy)(x)),
        "parts without a root": raised(lambda: make_private(parts, config())),
        "NO_SHARD": raised(lambda: FullyShardedDataParallel(nn.Linear(3, 2), **replicated)),
        "detached root": raised(lambda: loss(detached, rows(rank))),
    }


CASES: list[Callable[[str, int], Any]] = [
    bf16_reduce,
    unused_branch,
    layers_as_units,
    weight_penalty,
    noise_field,
    empty_rank,
    global_draw,
    agreed_noise,
    impossible_budget,
    refused_wrapping,
]


class Trouble(str):
    """The traceback of a sub-case that did not come to its end."""


def on_two_ranks(rank: int, world_size: int) -> dict[str, Any]:
    answers = {}
    for case in CASES:
        for kind in KINDS:
            try:
                answers[f"{case.__name__} {kind}"] = case(kind, rank)
            except Exception:  # of every rank alike, or the others would hang; the other sub-cases go on
                answers[f"{case.__name__} {kind}"] = Trouble(traceback.format_exc())
    return answers


@pytest.fixture(scope="module")
def two() -> list[dict[str, Any]]:
    with warnings.catch_warnings():
        # What torch itself says of NO_SHARD, which one sub-case asks for.
        warnings.filterwarnings("ignore", ".*NO_SHARD.*", FutureWarning)
        return run(on_two_ranks, 2, timeout=120)


def of_case(two: list[dict[str, Any]], case: Callable[..., Any], kind: str) -> list[Any]:
    found = [answers[f"{case.__name__} {kind}"] for answers in two]
    for answer in found:
        if isinstance(answer, Trouble):
            pytest.fail(answer)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_rule_03_a_bf16_reduce_dtype_is_overridden(two: list[dict[str, Any]], kind: str) -> None:
    """Seen to fail when the bucket has the reduce_dtype that FSDP was given."""
    for answer in of_case(two, bf16_reduce, kind):
        assert answer["total"] == pytest.approx(301, abs=0.05)
        assert answer["collectives"]
        assert {dtype for _, dtype, _ in answer["collectives"]} == {torch.float32}


@pytest.mark.parametrize("kind", KINDS)
def test_rule_03_a_bf16_reduce_dtype_is_overridden_with_a_notice(two: list[dict[str, Any]], kind: str) -> None:
    """Seen to fail when `make_private` says nothing of reduce_dtype."""
    for answer in of_case(two, bf16_reduce, kind):
        assert any("reduce_dtype" in notice and "float32" in notice for notice in answer["notices"])


@pytest.mark.parametrize("kind", KINDS)
def test_rule_05_ranks_draw_one_field_in_which_nothing_repeats(two: list[dict[str, Any]], kind: str) -> None:
    """Seen to fail when a rank draws its shard from the start of the field."""
    fields = [answer["field"] for answer in of_case(two, noise_field, kind)]
    assert torch.equal(*fields)
    field = fields[0]
    assert field.flatten().abs().unique().numel() == field.numel()
    assert float(field.std()) == pytest.approx(1, abs=5 / math.sqrt(2 * field.numel()))


@pytest.mark.parametrize("kind", KINDS)
def test_rule_07_ranks_share_one_global_draw(two: list[dict[str, Any]], kind: str) -> None:
    """Seen to fail when every rank draws for itself, and when the world size divides the sum."""
    first, second = of_case(two, global_draw, kind)
    assert first["microbatches"] == second["microbatches"]
    drawn = first["drawn"] + second["drawn"]
    assert drawn.max() == 1
    for answer in (first, second):
        torch.testing.assert_close(answer["counted"], drawn, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_rule_07_a_rank_without_rows_takes_part(two: list[dict[str, Any]], kind: str) -> None:
    """Seen to fail when the mask is ignored."""
    assert all(answer["off"] < 1e-9 for answer in of_case(two, empty_rank, kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", ["root", "unit"])
def test_rule_09_weight_penalty_is_refused(two: list[dict[str, Any]], kind: str, place: str) -> None:
    """Seen to fail when the freeze window stays closed from forward to backward: the penalty is silently dropped."""
    for told in of_case(two, weight_penalty, kind):
        assert told[place].startswith("UnsupportedModelError: ")
        assert "weight_decay" in told[place]
        assert told[f"{place} step"].startswith("PrivacyError: ")
        assert told[f"{place} steps"] == "0"


def test_rule_09_wrapping_that_cannot_be_private_is_refused(two: list[dict[str, Any]]) -> None:
    """Seen to fail when the wrapper's forward does not ask for an engine."""
    for told in of_case(two, refused_wrapping, "fsdp1"):
        assert told["use_orig_params=False"].startswith("ValueError: ") and "True" in told["use_orig_params=False"]
        for case in ("inner unit as root", "root without privacy", "detached root"):
            assert told[case].startswith("PrivacyError: "), (case, told[case])
            assert "Pass privacy to the outermost wrapper" in told[case]
        assert "ValueError: " in told["parts without a root"] and "wrap the root" in told["parts without a root"]
        assert told["NO_SHARD"] == ""  # exact since there is an all-reduce for it (test_strategies)
    for told in of_case(two, refused_wrapping, "fsdp2"):
        assert "ValueError: " in told["parts without a root"] and "fully_shard(model)" in told["parts without a root"]
        for case in ("not sharded", "smaller group"):
            assert told[case].startswith("ValueError: ") and "spans 1 of 2 processes" in told[case]


@pytest.mark.parametrize("kind", KINDS)
def test_rule_10_noise_is_calibrated_once_for_all_ranks(two: list[dict[str, Any]], kind: str) -> None:
    """Seen to fail when rank 0's noise multiplier is not broadcast."""
    first, second = of_case(two, agreed_noise, kind)
    assert first == second
    assert first["sigma"] > 0


@pytest.mark.parametrize("kind", KINDS)
def test_rule_12_a_failure_on_rank_0_at_attachment_is_heard_by_all(two: list[dict[str, Any]], kind: str) -> None:
    """Seen to fail (with a hang) when rank 0 raises before it has told the others."""
    first, second = of_case(two, impossible_budget, kind)
    assert first == second
    assert "target_epsilon" in first


@pytest.mark.parametrize("kind", KINDS)
def test_rule_12_collectives_keep_their_order_when_a_branch_is_unused(two: list[dict[str, Any]], kind: str) -> None:
    """Seen to fail when units are reduced in the order in which their gradients are complete."""
    first, second = of_case(two, unused_branch, kind)
    assert first["collectives"] == second["collectives"]
    assert len(first["collectives"]) >= 9
    assert first["off"] < 1e-9 and second["off"] < 1e-9


@pytest.mark.parametrize("kind", KINDS)
def test_layers_may_be_units_of_their_own(two: list[dict[str, Any]], kind: str) -> None:
    """Seen to fail when the class that `fully_shard` gives a layer is looked up in the registry."""
    assert all(answer["off"] < 1e-9 for answer in of_case(two, layers_as_units, kind))


# ---------------------------------------------------------------------------------------------------- four ranks: 2 x 2


class Split(nn.Module):
    """A layer split by columns, one by rows with a replicated bias, and replicated layers around them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.up, self.down = nn.LayerNorm(INPUTS), nn.Linear(INPUTS, 8), nn.Linear(8, 4)
        self.head = nn.Linear(4, OUTPUTS)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.down(self.up(self.norm(x)).tanh()))


REPLICATED = ["down.bias", "head.bias", "head.weight", "norm.bias", "norm.weight"]


def on_four_ranks(rank: int, world_size: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    model = Split()
    norm_B, _ = oracle(model, rows(rank // 2))
    expected = oracle(model, torch.cat([rows(0), rows(1)]))[1]
    parallelize_module(model, mesh["tensor"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    fully_shard(model, mesh=mesh["data"])
    engine = make_private(model, config())
    loss(model, rows(rank // 2)).backward()
    answer = {"norm_B": engine.per_sample_norms, "oracle_B": norm_B}
    answer["off"] = float((flat(step(model)) - expected).abs().max())
    engine.detach()

    engine = make_private(model, config(noise_multiplier=1.0))
    with engine.microbatch(torch.zeros(2, dtype=torch.bool)):
        loss(model, rows(rank // 2, 2)).backward()
    engine.privatize()
    grads = {n: p.grad for n, p in model.named_parameters()}
    answer["replicated"] = torch.cat([grads[n].to_local().flatten() for n in REPLICATED])
    answer["field"] = flat({n: g.full_tensor() for n, g in grads.items()})
    return answer


@pytest.fixture(scope="module")
def four() -> list[dict[str, Any]]:
    return run(on_four_ranks, 4, timeout=100)


def test_rule_14_norms_count_split_gradients_by_their_parts_and_replicated_ones_once(
    four: list[dict[str, Any]],
) -> None:
    """Seen to fail when replicated norms are summed over tensor ranks too, and when split ones are not."""
    for answer in four:
        torch.testing.assert_close(answer["norm_B"], answer["oracle_B"], rtol=1e-10, atol=0)
        assert answer["off"] < 1e-9


def test_rule_14_tensor_peers_have_one_and_the_same_norm(four: list[dict[str, Any]]) -> None:
    """To the bit, or their clip factors would differ. Seen to fail when norms are not summed over tensor ranks."""
    for first, second in (four[:2], four[2:]):
        assert torch.equal(first["norm_B"], second["norm_B"])


def test_rule_05_replicas_draw_the_same_noise_and_shards_do_not(four: list[dict[str, Any]]) -> None:
    """Seen to fail when a rank's number takes part in the noise."""
    for first, second in (four[:2], four[2:]):
        assert torch.equal(first["replicated"], second["replicated"])
    assert all(torch.equal(a["field"], b["field"]) for a, b in itertools.pairwise(four))
    field = four[0]["field"].abs()
    assert field.unique().numel() == field.numel()
