"""docs/port_your_script.md: both sides of each difference run, train, and the private ones state an ε that is right."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from fsdp_dp.accounting import epsilon

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("fsdp1", "fsdp2", "opacus")
# One pair of processes for all six scripts, since processes take seconds to start. Every script meets at a port of its own:
# gloo would find the addresses of the last script's group in a store that is used again. The Opacus ones run on one rank.
DRIVER = """
import os, runpy, sys
for script in sys.argv[1:]:
    path, os.environ["MASTER_PORT"] = script.split(":")
    if "opacus" not in path or os.environ["RANK"] == "0":
        print("script", path, flush=True)
        runpy.run_path(path)
"""


def sides(block: str) -> tuple[str, str]:
    """The script before and the one after, from a difference that shows all of both."""
    lines = block.splitlines()
    return tuple("\n".join(line[1:] for line in lines if not line.startswith(other)) + "\n" for other in "+-")  # type: ignore[return-value]


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What rank 0 printed, by script: "fsdp1_before", "fsdp1_after", ..."""
    folder = tmp_path_factory.mktemp("scripts")
    blocks = re.findall(r"```diff\n(.*?)```", (ROOT / "docs/port_your_script.md").read_text(), re.DOTALL)
    paths = []
    for name, block in zip(NAMES, blocks, strict=True):
        for side, source in zip(("before", "after"), sides(block), strict=True):
            paths.append(folder / f"{name}_{side}.py")
            paths[-1].write_text(source)
    (folder / "driver.py").write_text(DRIVER)
    scripts = [f"{path.name}:{port}" for path, port in zip(paths, free_ports(len(paths)), strict=True)]
    ranks = [start([sys.executable, "driver.py", *scripts], folder, rank) for rank in range(2)]
    try:
        (out, err), (_, err_of_1) = [rank.communicate(timeout=300) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert not any(rank.returncode for rank in ranks), err + err_of_1
    parts = re.split(r"script (\w+)\.py\n", out)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def start(command: list[str], folder: Path, rank: int) -> subprocess.Popen[str]:
    """One rank, as torchrun would start it."""
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    environment = {**os.environ, **place, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for opened in sockets:
        opened.bind(("localhost", 0))
    ports = [opened.getsockname()[1] for opened in sockets]
    for opened in sockets:
        opened.close()
    return ports


def value(text: str, name: str) -> float:
    return float(re.findall(rf"{name} ([\d.]+)", text)[0])


@pytest.mark.parametrize("side", ["before", "after"])
@pytest.mark.parametrize("name", NAMES)
def test_a_script_trains(printed, name, side):
    """Four classes: by chance 0.25."""
    assert value(printed[f"{name}_{side}"], "accuracy") > 0.5


def test_the_fsdp1_script_stays_within_its_budget(printed):
    assert 7.9 < value(printed["fsdp1_after"], "epsilon") <= 8


def test_the_opacus_script_keeps_its_epsilon(printed):
    bounds = epsilon(noise_multiplier=1.0, sample_rate=0.125, steps=40, delta=1e-5)
    for name in ("fsdp2", "opacus"):
        assert value(printed[f"{name}_after"], "epsilon") == pytest.approx(bounds.upper, abs=1e-3)
    assert bounds.lower - 1e-3 <= value(printed["opacus_before"], "epsilon") <= bounds.upper
