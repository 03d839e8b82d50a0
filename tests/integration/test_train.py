"""The shipped command, as people start it: real processes, a real corpus, and what a run leaves behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from fsdp_dp.export import find_checkpoint, model_weights
from fsdp_dp.ledger import read
from fsdp_dp.models.config import GPTConfig
from fsdp_dp.models.gpt import GPT

ROOT = Path(__file__).resolve().parents[2]
ALONE = [sys.executable, "-m", "fsdp_dp.train"]
TWO_RANKS = [
    sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "fsdp_dp.train"
]  # fmt: skip
FOUR_RANKS = [part.replace("=2", "=4") for part in TWO_RANKS]
# Small enough for seconds, with a ragged last microbatch and an evaluation on the way.
SMALL = [
    "device=cpu",
    "steps=3",
    "batch_size=12",
    "microbatch_size=4",
    "evaluate_every=2",
    "evaluate_rows=10",
    "model.layers=1",
    "model.width=16",
    "model.mlp_width=24",
    "model.heads=2",
    "model.block_size=24",
]
SHARDINGS = ["full_shard", "shard_grad_op", "fully_shard", "tensor_parallel", "zero1"]
OTHER_SHARDINGS = ["no_shard", "ddp", "hybrid_shard", "hybrid_shard_zero2", "hybrid_shard_fsdp2"]
# Without the engine, shard_grad_op differs from full_shard in torch's code alone.
PLAIN_SHARDINGS = ["full_shard", "fully_shard", "tensor_parallel"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides that read a few small files of this project."""
    folder = tmp_path_factory.mktemp("corpus")
    for source in sorted((ROOT / "fsdp_dp").glob("*.py")):
        (folder / f"{source.stem}.txt").write_bytes(source.read_bytes())
    return ["data=text_files", f"data.path={folder}/*.txt"]


def start(command: list[str], *overrides: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen([*command, *overrides], cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)


def finish(process: subprocess.Popen[str], seconds: float = 150) -> tuple[int, str, str]:
    """(exit code, stdout, stderr)."""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, out, err


def train(command: list[str], *overrides: str) -> str:
    """Standard output of a run that must succeed."""
    code, out, err = finish(start(command, *SMALL, *overrides))
    assert code == 0, err
    return out


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def saved(folder: Path, tmp_path: Path) -> dict:
    """The checkpoint as one file."""
    (newest,) = (folder / "checkpoints").iterdir()
    assert json.loads((newest / "state.json").read_text())["privacy"]["steps"] == 3
    dcp_to_torch_save(newest, tmp_path / "whole.pt")
    return torch.load(tmp_path / "whole.pt", weights_only=False)


def check_run_folder(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} - {"ledger.jsonl"} == {
        "config.yaml", "metrics.jsonl", "tensorboard", "checkpoints", "ledger.jsonl.lock", "report.md", "loss_epsilon.png"
    }  # fmt: skip
    assert list((folder / "tensorboard").glob("events.out.tfevents.*"))
    assert (folder / "loss_epsilon.png").read_bytes().startswith(b"\x89PNG")
    steps = [record["step"] for record in records(folder) if "learning_rate" in record]
    assert steps == [1, 2, 3]
    evaluations = [record["step"] for record in records(folder) if "rows" in record]
    assert evaluations == [2, 3]


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_a_private_run_on_two_ranks(sharding, corpus, tmp_path):
    check_private_run(TWO_RANKS, f"sharding={sharding}", corpus, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", OTHER_SHARDINGS)
def test_a_private_run_on_four_ranks(sharding, corpus, tmp_path):
    check_private_run(FOUR_RANKS, f"sharding={sharding}", corpus, tmp_path)


def check_private_run(command, sharding, corpus, tmp_path):
    folder = tmp_path / "run"
    out = train(command, *corpus, sharding, f"output_dir={folder}")
    check_run_folder(folder)

    report = (folder / "report.md").read_text()
    epsilon = records(folder)[-1]["epsilon"]
    assert 7.9 < epsilon <= 8.0
    assert f"epsilon = {epsilon:.4g} at delta = 1e-06" in report
    assert f"epsilon = {epsilon:.4g} at delta = 1e-06" in out
    assert "3 of 3" in report and "one packed row of 25 bytes" in report
    assert out.count("held-out bits per byte") == 1

    assert "epsilon cross-checked: prv" in out
    assert read(folder / "ledger.jsonl").standing().counted == 3
    state = saved(folder, tmp_path)
    model = GPT(GPTConfig(**yaml.safe_load((folder / "config.yaml").read_text())["model"]))
    fresh = {name: weight.clone() for name, weight in model.state_dict().items()}
    model.load_state_dict(state["model"])
    assert all(not torch.equal(weight, fresh[name]) for name, weight in model.state_dict().items())


def test_plain_runs_do_not_depend_on_the_sharding(corpus, tmp_path):
    """Same rows, same mean gradient, same held-out rows: two ranks train, in each way, what one process trains."""
    results = {}
    for name, command in (("alone", ALONE), *((sharding, TWO_RANKS) for sharding in PLAIN_SHARDINGS)):
        folder = tmp_path / name
        sharding = [] if name == "alone" else [f"sharding={name}"]
        out = train(command, *corpus, "privacy=none", *sharding, f"output_dir={folder}")
        check_run_folder(folder)
        assert "NOT PRIVATE" in out and "NOT PRIVATE" in (folder / "report.md").read_text()
        assert all(record["epsilon"] is None for record in records(folder))
        results[name] = records(folder)[-1]["outside_the_guarantee"]["held_out_bits_per_byte"]
    assert list(results.values()) == pytest.approx([results["alone"]] * len(results), rel=1e-4)


def test_one_process_in_bf16_from_any_folder(corpus, tmp_path):
    """Without torchrun; the default folder is made under the working directory."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [*ALONE, *SMALL, *corpus, "precision=bf16", "optimizer=sgd", "optimizer.momentum=0"]
    command += ["optimizer.average_decay=0.9"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "outputs").iterdir()
    check_run_folder(folder)
    assert "trained model, averaged weights" in (folder / "report.md").read_text()
    last, average = (model_weights(find_checkpoint(folder), averaged=averaged) for averaged in (False, True))
    assert last.keys() == average.keys() and any(not torch.equal(last[name], average[name]) for name in last)
    assert str(folder) in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["outputs"]


def test_a_sweep_on_two_ranks(corpus, tmp_path):
    """Several jobs in the same processes, each with a process group and a folder of its own."""
    folders = [f"hydra.sweep.dir={tmp_path}", f"output_dir={tmp_path}/run_${{hydra:job.num}}"]
    train(TWO_RANKS, *corpus, "hydra.mode=MULTIRUN", "steps=1,2", "privacy=none", *folders)
    assert [records(tmp_path / name)[-1]["step"] for name in ("run_0", "run_1")] == [1, 2]


def test_a_run_without_noise_says_so(corpus, tmp_path):
    overrides = ["privacy.noise_multiplier=0", "privacy.target_epsilon=null", "privacy.seed=1"]
    out = train(ALONE, *corpus, *overrides, f"output_dir={tmp_path / 'run'}")
    assert "NO PRIVACY GUARANTEE" in out
    assert "NO PRIVACY GUARANTEE" in (tmp_path / "run" / "report.md").read_text()
    assert records(tmp_path / "run")[-1]["epsilon"] == "inf"


def test_a_bad_option_ends_all_ranks_before_they_meet(tmp_path):
    code, _, err = finish(start(TWO_RANKS, "privacy.clip=3", f"output_dir={tmp_path / 'run'}"), seconds=60)
    assert code != 0
    assert "privacy.clip: no such option; expected one of privacy.mechanism" in err
    assert not (tmp_path / "run").exists()


def test_an_exception_on_one_rank_ends_all_with_its_message(corpus, tmp_path):
    """Rank 0 cannot make the run directory, while rank 1 waits for its name."""
    (tmp_path / "file").touch()
    started = time.monotonic()
    code, _, err = finish(start(TWO_RANKS, *SMALL, *corpus, f"output_dir={tmp_path}/file/run"), seconds=120)
    assert code != 0
    assert "fsdp_dp.train: rank 0 ended: NotADirectoryError" in err
    assert time.monotonic() - started < 60  # includes starting; the end itself has 30 s


def test_ctrl_c_ends_a_run_with_its_checkpoint_and_report(corpus, tmp_path):
    folder = tmp_path / "run"
    process = start(ALONE, *SMALL, *corpus, "steps=5000", "privacy=none", f"output_dir={folder}")
    try:
        for _ in range(600):
            if (folder / "metrics.jsonl").exists() and len(records(folder)) > 2:
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        code, _, err = finish(process, seconds=60)
    finally:
        process.kill()
    assert code == 0, err
    last = [record["step"] for record in records(folder)][-1]
    assert last < 5000
    assert f"{last} of 5000 steps" in (folder / "report.md").read_text()
    assert (folder / "checkpoints" / f"step-{last:08d}" / ".metadata").exists()


def test_the_shipped_command_says_what_is_wrong_once_and_shows_its_help_once():
    """Seen to bury the message under a traceback of torchrun's, and to show the help as often as there are ranks."""
    shipped = [part.replace("torch.distributed.run", "fsdp_dp.launch") for part in TWO_RANKS]
    assert "-m fsdp_dp.launch --standalone --nproc-per-node=" in (ROOT / "scripts" / "train.sh").read_text()
    wrong, helped = start(shipped, "expriment=quickstart"), start(shipped, "--help")
    _, said = wrong.communicate(timeout=150)
    page, _ = helped.communicate(timeout=150)
    assert (wrong.returncode, helped.returncode) == (2, 0)
    assert said.count("expriment: no such option") == 1 and "Traceback" not in said
    assert page.count("Ten options that matter") == 1
