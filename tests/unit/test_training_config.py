"""The command line: every choice composes, and what is wrong is named, with what is allowed, before anything starts."""

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir

from fsdp_dp import train
from fsdp_dp.training.schema import TrainConfig, check_world

ROOT = Path(__file__).resolve().parents[2]
GROUPS = ("sharding", "model", "data", "privacy", "clipping", "optimizer", "precision")
CHOICES = [
    (group, path.stem) for group in GROUPS for path in sorted((ROOT / "conf" / group).glob("*.yaml"))
]  # fmt: skip
# What a choice leaves to the user, and the model that goes with it.
NEEDED = {
    "text_files": ["data.path=x"],
    "hf_text": ["data.path=x"],
    "hf_image": ["data.path=x", "model=resnet"],
    "torchvision": ["data.path=x", "data.name=CIFAR10", "model=resnet"],
    "digits": ["model=resnet"],
}


def composed(*overrides: str) -> TrainConfig:
    train.store_schema()
    with initialize_config_dir(version_base="1.3", config_dir=train.config_folder()):
        return train.checked(compose("config", list(overrides)))


def refusal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], overrides: Sequence[str]) -> str:
    """What the command says when it refuses these overrides."""
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr(sys, "argv", ["train", *overrides])
    # Hydra's logging closes the handlers it finds; absl's (of dp-accounting) would take pytest's own stream with it.
    if "absl.logging" in sys.modules:
        monkeypatch.setattr(sys.modules["absl.logging"].get_absl_handler().python_handler, "stream", sys.stderr)
    with pytest.raises(SystemExit) as ended:
        train.main()
    assert ended.value.code == train.EXIT_BAD_CONFIGURATION
    return capsys.readouterr().err


def test_the_default_configuration():
    config = composed()
    assert config.privacy.private and config.privacy.target_epsilon == 8.0 and config.privacy.target_delta == 1e-6
    assert config.sharding.strategy == "full_shard"
    assert config.data.source == "python_source"


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_choice_composes_into_dataclasses(group, choice, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = composed(f"{group}={choice}", *NEEDED.get(choice, []))
    assert isinstance(config, TrainConfig)
    stored = yaml.safe_load((ROOT / "conf" / group / f"{choice}.yaml").read_text())
    stored.pop("defaults", None)  # another choice that this one changes
    found = asdict(getattr(config, group)) | ({"path": None, "name": None} if group == "data" else {})
    assert {key: found[key] for key in stored} == stored


def test_overrides_that_people_use():
    config = composed("steps=20", "sharding=fully_shard", "privacy.target_epsilon=3", "model=gpt_small", "output_dir=o")
    assert (config.steps, config.sharding.strategy, config.output_dir) == (20, "fully_shard", "o")
    assert (config.privacy.target_epsilon, config.model.layers) == (3.0, 12)


def test_noise_instead_of_a_budget():
    config = composed("privacy.noise_multiplier=0", "privacy.target_epsilon=null")
    assert config.privacy.noise_multiplier == 0.0


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["stesp=3"], ["stesp: no such option", "steps", "batch_size"]),
        (["model.widht=3"], ["model.widht: no such option", "model.width"]),
        (["+model.extra=3"], ["model.extra: no such option", "model.width"]),
        (["nothing.at.all=1"], ["nothing", "no such option", "sharding"]),
        (["steps=many"], ["steps", "'many'", "Integer"]),
        (["steps=0"], ["steps must be an integer of at least 1", "0"]),
        (
            ["model=resnet", "data=digits", "model.widht=3"],
            ["model.widht: no such option", "model.width", "model.stages"],
        ),
        (
            ["model=resnet"],
            ["data=python_source gives rows for language", "choose data=hf_image or torchvision or digits"],
        ),
        (["model=hugging_face"], ["Exactly one of model.pretrained", "model.model_type=gpt2"]),
        (
            ["model=resnet", "data=digits", "sharding.strategy=tensor_parallel", "sharding.tensor_parallel_size=2"],
            ["sharding=tensor_parallel splits model.architecture=gpt and llama, found resnet"],
        ),
        (["model.architecture=gtp"], ["model.architecture must be one of 'gpt', 'llama', 'resnet', 'hugging_face'"]),
        (["experiment=quick"], ["experiment/quick", "quickstart", "resnet_digits"]),
        (["experiment=resnet_digits", "batch_size=5000"], ["batch_size must be at most the 14", "5000"]),
        (["data=hf_text"], ["data=hf_text needs exactly one of data.name (on the Hub) and data.path (your files)"]),
        (["model=gpt_huge"], ["model/gpt_huge", "gpt_small", "gpt_tiny"]),
        (["sharding=zero3"], ["sharding/zero3", "full_shard", "fully_shard", "shard_grad_op", "tensor_parallel"]),
        (["privacy=eps9"], ["privacy/eps9", "eps1", "eps3", "eps8", "none"]),
        (["sharding.strategy=zero3"], ["sharding.strategy must be one of", "'full_shard'", "'zero3'"]),
        (["sharding.tensor_parallel_size=2"], ["sharding.tensor_parallel_size", "sharding.strategy=full_shard"]),
        (["sharding=tensor_parallel"], ["sharding.tensor_parallel_size", "number of processes, which is 1"]),
        (["optimizer.average_decay=1"], ["optimizer.average_decay must be"]),
        (
            ["optimizer.average_decay=0.9", "privacy=none"],
            ["optimizer.average_decay averages the weights of private releases"],
        ),
        (["optimizer.name=lion"], ["optimizer.name must be one of", "'adamw'"]),
        (["optimizer.schedule=step"], ["optimizer.schedule must be one of", "'cosine'"]),
        (["precision.compute=fp16"], ["precision.compute must be one of", "'bf16'"]),
        (["device=tpu"], ["device must be one of", "'auto'"]),
        (["privacy.target_epsilon=-1"], ["privacy.target_epsilon must be", "-1.0"]),
        (["privacy.noise_multiplier=1"], ["Exactly one of", "privacy.target_epsilon=null"]),
        (["privacy=none", "privacy.target_epsilon=3"], ["privacy.target_epsilon has no effect", "privacy=eps8"]),
        (["privacy.accountant=gdp"], ["privacy.accountant must be one of", "'prv'"]),
        (["privacy.sampling=external_poisson"], ["privacy.sampling must be one of", "'poisson'"]),
        (["privacy.target_delta=1"], ["privacy.target_delta must be"]),
        (["data=text_files"], ["data.path is not set"]),
        (["data=text_files", "data.path=/nowhere/*.txt"], ["data.path: no file matches '/nowhere/*.txt'"]),
        (["batch_size=10000000"], ["batch_size must be at most", "10000000"]),
        (["model=null"], ["Config group override"]),
        (["clipping.groups=layers"], ["clipping.groups must be one of 'flat', 'block'", "'layers'"]),
        (["clipping.groups={*: 3}"], ["clipping.groups must be a word, or a mapping from patterns"]),
        (["clipping.bounds=even"], ["clipping.bounds must be one of 'uniform', 'dimension', found 'even'"]),
        (["clipping.bounds={all: x}"], ["clipping.bounds['all'] must be a finite number above 0.0, found 'x'"]),
        (["clipping=layer", "clipping.groups=[]"], ["clipping.groups must be one of"]),
        (["clipping.adaptive.floor=0.1"], ["clipping.adaptive.floor: no such option", "with clipping=adaptive"]),
        (["clipping=adaptive", "clipping.adaptive.flor=1"], ["expected one of clipping.adaptive.target_quantile"]),
        (["clipping=adaptive", "clipping.adaptive.floor=2"], ["clipping.adaptive.floor must be a finite number above"]),
        (["clipping=adaptive", "clipping.clip_function=normalized"], ["needs clipping.clip_function=abadi"]),
    ],
)
def test_what_is_wrong_is_named_with_what_is_allowed(overrides, expected, monkeypatch, capsys):
    message = refusal(monkeypatch, capsys, overrides)
    for part in expected:
        assert part in message
    assert "Traceback" not in message


def test_a_run_directory_is_not_used_twice(tmp_path, monkeypatch, capsys):
    (tmp_path / "metrics.jsonl").touch()
    message = refusal(monkeypatch, capsys, [f"output_dir={tmp_path}"])
    assert f"output_dir={tmp_path} already holds a run" in message


def test_the_number_of_processes_must_fit():
    check_world(composed(), 3)
    with pytest.raises(ValueError, match=r"batch_size must be at least one row for each of 4 data-parallel ranks"):
        check_world(composed("batch_size=3"), 4)


def in_a_process(*overrides: str) -> subprocess.CompletedProcess[str]:
    code = (
        "import sys\n"
        "from fsdp_dp import train\n"
        "try:\n"
        "    train.main()\n"
        "finally:\n"
        "    print('torch is loaded' if 'torch' in sys.modules else 'torch is not loaded')\n"
    )
    command = [sys.executable, "-c", code, *overrides]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_a_wrong_option_is_refused_before_torch_is_loaded():
    done = in_a_process("privacy.target_epsilon=0")
    assert done.returncode == train.EXIT_BAD_CONFIGURATION
    assert "privacy.target_epsilon must be a finite number above 0.0" in done.stderr
    assert "torch is not loaded" in done.stdout


def test_help_is_quick_and_complete():
    done = in_a_process("--help")
    assert done.returncode == 0
    assert "torch is not loaded" in done.stdout
    for group, choice in CHOICES:
        assert any(line.startswith(f"{group}:") and choice in line for line in done.stdout.splitlines())
    assert done.stdout.count("torchrun --standalone") == 3
    for option in ("steps=", "batch_size=", "privacy.target_epsilon=", "privacy.max_grad_norm=", "output_dir="):
        assert option in done.stdout


def test_the_checkouts_configuration_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Path(train.config_folder()) == ROOT / "conf"
