"""GPU tests are skipped, visibly, where the machine has too few devices. The markers are declared in pyproject.toml."""

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip each `gpu(count)` test for which there are fewer than `count` CUDA devices."""
    gpu_items = [(item, mark) for item in items if (mark := item.get_closest_marker("gpu"))]
    if not gpu_items:
        return
    import torch  # here, so that a run without GPU tests does not pay for it

    present = torch.cuda.device_count()
    for item, mark in gpu_items:
        needed = mark.args[0] if mark.args else mark.kwargs.get("count", 1)
        if present < needed:
            item.add_marker(pytest.mark.skip(reason=f"needs {needed} CUDA devices, found {present}"))
