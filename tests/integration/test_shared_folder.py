"""A run directory that not every rank sees, as on nodes with disks of their own, is refused before the first release."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration import slurm
from tests.integration.slurm import ROOT, SMALL

HIDE = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs tmpfs "$0" && exec "$@"']


@pytest.mark.slow  # a minute of waiting for a file
@pytest.mark.skipif(
    subprocess.run([*HIDE, "/mnt", "true"], capture_output=True, check=False).returncode != 0,
    reason="a mount of one rank's own needs root, and the kernel's permission",
)
def test_a_folder_that_another_rank_does_not_see_is_refused(tmp_path: Path) -> None:
    disk, text = tmp_path / "disk", slurm.write_text(tmp_path / "text")
    disk.mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    train = [sys.executable, "-m", "fsdp_dp.train", *SMALL, *text, "steps=5", f"output_dir={disk}/run"]
    address = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(slurm.free_ports(1))}
    ranks = []
    for rank, hidden in enumerate(([], [*HIDE, str(disk)])):
        place = address | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        ranks.append(subprocess.Popen([*hidden, *train], env=environment | place, stderr=subprocess.PIPE, text=True))
    try:
        said = [rank.communicate(timeout=slurm.SECONDS)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [1, 1], said
    assert all(f"the run directory {disk}/run is not the same for all ranks" in text for text in said)
    assert {path.name for path in (disk / "run").iterdir()} == {"ledger.jsonl.lock"}
