"""Which elements a rank holds, against torch's own cutting; and what is refused when a model is opened."""

import itertools

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from fsdp_dp import PrivacyConfig, make_private
from fsdp_dp.kernels.release import select
from fsdp_dp.sharding.layout import Cut, region
from fsdp_dp.sharding.whole import blocks

SHAPES = ((7,), (7, 5), (4, 6, 3), (2, 3, 4, 5), (3, 0), (1, 1))


def held(shape: tuple[int, ...], cuts: list[Cut]) -> torch.Tensor:
    """The numbers of the elements that torch leaves, flat."""
    x = torch.arange(torch.Size(shape).numel()).view(shape)
    for cut in cuts:
        pieces = x.chunk(cut.parts, cut.dim)
        empty = x.narrow(cut.dim, 0, 0)
        x = pieces[cut.index] if cut.index < len(pieces) else empty
    return x.flatten()


def regions() -> list[tuple[tuple[int, ...], list[Cut]]]:
    """One cut along any dimension; or tensor parallelism along one, then FSDP along the same or another."""
    found = []
    for shape in SHAPES:
        dims = range(len(shape))
        single = [[Cut(dim, parts, index)] for dim in dims for parts in (1, 2, 3) for index in range(parts)]
        double = [
            [Cut(first, 2, i), Cut(second, 3, j)]
            for first, second in itertools.product(dims, dims)
            if first == second or 0 in (first, second)
            for i, j in itertools.product(range(2), range(3))
        ]
        found += [(shape, cuts) for cuts in ([], *single, *double)]
    return found


def test_a_region_is_what_torch_cuts() -> None:
    for shape, cuts in regions():
        found = region(shape, cuts)
        run = torch.arange(found.start, found.start + found.count)
        expected = held(shape, cuts)
        assert found.numel == len(expected), (shape, cuts)
        assert torch.equal(select(run, found.columns), expected), (shape, cuts)


def test_two_inner_dimensions_are_refused() -> None:
    with pytest.raises(ValueError, match=r"split along dimensions \[1, 2\] is not supported"):
        region((2, 4, 6), [Cut(1, 2, 0), Cut(2, 2, 1)])


def test_blocks_are_elements_of_the_outermost_lists() -> None:
    block = nn.Sequential(nn.Linear(2, 2), nn.ModuleList([nn.Linear(2, 2)]))
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "layers": nn.ModuleList([block, nn.Linear(2, 2)])})
    root = nn.Module()
    root.head, root.trunk = nn.Linear(2, 2), nn.Module()
    root.trunk.layers = nn.ModuleList([block, nn.Linear(2, 2)])
    owners = {name: module for name, module in root.named_modules() if isinstance(module, nn.Linear)}
    units = blocks(owners, root)
    assert units["trunk.layers.0.0"] == units["trunk.layers.0.1.0"]
    assert len({units["head"], units["trunk.layers.0.0"], units["trunk.layers.1"]}) == 3
    assert blocks({"a": model["a"], "b": model["layers"][1]}, model) == {"a": 0, "b": 1}


def privacy() -> PrivacyConfig:
    return PrivacyConfig(
        max_grad_norm=1.0,
        noise_multiplier=0.0,
        expected_batch_size=4,
        dataset_size=100,
        target_delta=1e-4,
        sampling="external_poisson",
    )


@pytest.fixture(scope="module")
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_ddp_that_changes_gradients_on_its_own_is_refused() -> None:
    with pytest.raises(ValueError, match="static_graph=True is not supported"):
        make_private(DistributedDataParallel(nn.Linear(2, 1), static_graph=True), privacy())
    with pytest.raises(ValueError, match="the model itself is not; wrap the root"):
        make_private(nn.Sequential(DistributedDataParallel(nn.Linear(2, 1))), privacy())


@pytest.mark.usefixtures("one_rank")
def test_ddp_synchronizes_again_after_backward() -> None:
    """Seen to fail when its flags are not put back: plain training with it would then drift apart."""
    model = DistributedDataParallel(nn.Linear(2, 1))
    engine = make_private(model, privacy())
    model(torch.ones(4, 2)).mean().backward()
    assert model.require_backward_grad_sync
    engine.discard()
    engine.detach()
    model(torch.ones(4, 2)).mean().backward()
    assert model.module.weight.grad is not None


def test_a_model_on_the_meta_device_is_refused() -> None:
    with torch.device("meta"):
        model = nn.Linear(2, 1)
    with pytest.raises(ValueError, match="parameter 'weight' is still on the meta device"):
        make_private(model, privacy())


@pytest.mark.usefixtures("one_rank")
def test_the_summary_names_what_is_sent_over_each_dimension() -> None:
    model = parallelize_module(nn.Linear(2, 2), init_device_mesh("cpu", (1,)), ColwiseParallel())
    engine = make_private(model, privacy())
    assert "tensor (1 ranks): all-reduces of norms" in engine.summary()
    engine.detach()
