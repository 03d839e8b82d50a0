"""The shipped command `python -m fsdp_dp.audit`, as people start it, and the script of attacks of docs/trust.md."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
TINY = [
    "device=cpu", "audit.canaries=64", "audit.rows=3", "steps=2", "batch_size=67", "microbatch_size=8", "model.layers=2",
    "model.heads=2", "model.width=8", "model.mlp_width=8", "model.block_size=8", "privacy.target_delta=1e-9",
]  # fmt: skip


def audit(ranks: int, *overrides: str) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *launcher, "-m", "fsdp_dp.audit", *TINY, *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)


def found(tmp_path: Path, ranks: int, *overrides: str) -> dict[str, Any]:
    """What `audit.json` says, which must be what the page says and what the exit code says."""
    ended = audit(ranks, f"output_dir={tmp_path}", *overrides)
    assert ended.returncode == 0, ended.stderr
    assert "audit: consistent" in ended.stdout and "of max_grad_norm at most" in ended.stdout
    return json.loads((tmp_path / "audit.json").read_text(encoding="utf-8"))


def test_two_ranks(tmp_path: Path) -> None:
    result = found(tmp_path, 2)
    assert result["consistent"] and result["lower_bound"]["canaries"] == 64
    assert result["lower_bound"]["epsilon"] <= result["epsilon_claimed_at_most"] <= 8
    assert result["mechanism"]["sharding"] == "full_shard, 2 ranks"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        (1, "audit.kind=data"),
        (2, "audit.kind=data clipping=block"),
        (2, "sharding=fully_shard precision=bf16"),
        (2, "sharding=tensor_parallel sharding.tensor_parallel_size=2"),
        (2, "sharding=zero1 clipping=adaptive"),
        (2, "sharding=no_shard clipping=automatic"),
        (4, "sharding=hybrid_shard sharding.replicate_size=2 batch_size=40"),
        (4, "sharding=tensor_parallel sharding.tensor_parallel_size=2 model=llama_350m model.layers=1 model.width=8 "
            "model.heads=2 model.mlp_width=8 model.block_size=8"),
    ],
)  # fmt: skip
def test_everything_that_can_be_trained_can_be_audited(tmp_path: Path, ranks: int, overrides: str) -> None:
    assert found(tmp_path, ranks, *overrides.split())["consistent"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("audit.kind=loss", "audit.kind must be one of 'gradient', 'data', found 'loss'"),
        ("privacy=none", "privacy=none claims no epsilon, so there is nothing to audit"),
    ],
)
def test_a_bad_configuration_is_refused(override: str, message: str) -> None:
    ended = audit(1, override)
    assert ended.returncode == 2 and message in ended.stderr


def test_the_attacks_succeed_on_the_usual_practice_alone() -> None:
    spec = importlib.util.spec_from_file_location("demonstrate_attacks", ROOT / "scripts" / "demonstrate_attacks.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    folded, ours = script.folded_clip_factors()
    assert folded > 4.6 and ours <= 1
    negative, longest, ours = script.negative_norms()
    assert negative > 0.1 and longest > 10 and ours <= 1
    impossible, of_lattice = script.impossible_outputs()
    assert impossible > 0.25 and of_lattice == 0
