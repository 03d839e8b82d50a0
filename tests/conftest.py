"""GPU tests are skipped, visibly, where the machine has too few devices. The markers are declared in pyproject.toml.

No test sees what another one's engine left on, and Triton interprets its kernels where no GPU is: it reads its flag when it
is imported, which any test may do first.
"""

import os
from collections.abc import Iterator

import pytest
import torch
from torch.overrides import _len_torch_function_stack, _pop_mode
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils._python_dispatch import _pop_mode as _pop_dispatch_mode

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def nothing_stays_on() -> Iterator[None]:
    """An engine that a test leaves between forward and backward still watches all that torch does, and compiles nothing."""
    yield
    while _len_torch_function_stack():
        _pop_mode()
    while _get_current_dispatch_mode_stack():
        _pop_dispatch_mode()
    torch.compiler.set_stance("default")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip each `gpu(count)` test for which there are fewer than `count` CUDA devices."""
    gpu_items = [(item, mark) for item in items if (mark := item.get_closest_marker("gpu"))]
    present = torch.cuda.device_count()
    for item, mark in gpu_items:
        needed = mark.args[0] if mark.args else mark.kwargs.get("count", 1)
        if present < needed:
            item.add_marker(pytest.mark.skip(reason=f"needs {needed} CUDA devices, found {present}"))
