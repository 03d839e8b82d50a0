"""Whether the run directory is one and the same for all ranks: each writes its part of a checkpoint there."""

from __future__ import annotations

import os
import secrets
import socket
import time
from pathlib import Path

import torch.distributed as dist

from fsdp_dp.training.world import World

# A network file system may show a new file on other hosts only after so long.
SECONDS = 60.0


def check_shared(folder: Path, world: World, seconds: float = SECONDS) -> None:
    """Raise ValueError on all ranks unless each of them sees rank 0's `folder`; every rank calls it.

    Without this, a job on nodes with disks of their own would train, and lose its run at the first requeue.
    """
    if world.size == 1:
        return
    name = f".seen_by_all_{secrets.token_hex(8)}"
    if world.is_main:
        (folder / name).touch()
    name = world.from_main(name)
    hosts: list[str | None] = [None] * world.size
    dist.all_gather_object(hosts, None if appears(folder, name, seconds) else socket.gethostname())
    if world.is_main:
        (folder / name).unlink()
    blind = sorted({host for host in hosts if host is not None})
    if blind:
        raise ValueError(
            f"the run directory {folder} is not the same for all ranks: those on {', '.join(blind)} do not see what rank 0 "
            f"wrote there {seconds:.0f} s ago. Choose an output_dir on a file system that every node sees"
        )


def appears(folder: Path, name: str, seconds: float) -> bool:
    """Whether a file is listed in a folder within so many seconds."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            if name in os.listdir(folder):
                return True
        except FileNotFoundError:
            pass
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
