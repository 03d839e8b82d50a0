"""The benchmark without a GPU: cases, models, accounts of traces, and the page made from rows."""

import json
from pathlib import Path

import pytest
import torch

from fsdp_dp import PrivacyConfig, make_private
from fsdp_dp.benchmark import __main__ as command
from fsdp_dp.benchmark import cases, meshes, models, peers, profiling, report

ROOT = Path(__file__).resolve().parents[2]
ALL = meshes.parse("full_shard", 2)


def rows() -> list[dict[str, object]]:
    stamp = {
        "case": "llama-1.3b@16x1024",
        "device": "2 x GPU",
        "torch": "2.11",
        "commit": "abc",
        "command": "torchrun x",
        "sharding": "hsdp=2x1",
        "gpus": 2,
    }
    common = {**stamp, "ms_range": [1.0, 2.0], "tokens_per_s_per_gpu": 10.0, "model_TFLOPs_per_gpu": 5.0}
    sent = {"collectives": {"all-gather": 3}, "collectives_MB": {"all-gather": 7.0}}
    plain = {**common, **sent, "side": "plain-fsdp2", "ms": 90.0, "peak_GiB": 10.0}
    flat = {**common, **sent, "side": "flat", "ms": 100.0, "peak_GiB": 10.5}
    hooks = {**flat, "side": "opacus-hooks", "differs": "whole model on every GPU"}
    return [plain, flat, {**stamp, "side": "opacus", "failed": "CUDA out of memory"}, hooks]


def test_cases() -> None:
    plain, flat = cases.parse("llama-1.3b@2x8192:plain-fsdp1,flat", microbatches=4, checkpointing=True, sharding=ALL)
    assert (plain.shape.rows, plain.shape.tokens, plain.backend, flat.backend) == (2, 8192, "FSDP1", "FSDP2")
    assert plain.name == "llama-1.3b@2x8192 checkpointed 4 microbatch(es)"
    (few,) = cases.parse("llama-13b/8@1x512:layer", microbatches=1, checkpointing=False, sharding=ALL)
    assert (few.shape.layers, few.shape.width, few.shape.tokens) == (8, 5120, 512)
    assert few.name == "llama-13b/8@1x512 1 microbatch(es)"
    with pytest.raises(ValueError, match="no model 'llama-2b'"):
        cases.parse("llama-2b:flat", microbatches=1, checkpointing=False, sharding=ALL)
    with pytest.raises(ValueError, match="no side 'fast'"):
        cases.parse("llama-1.3b:fast", microbatches=1, checkpointing=False, sharding=ALL)


def test_shardings() -> None:
    assert meshes.parse("full_shard", 8).data_ranks == 8
    hybrid, split = meshes.parse("hsdp=2x4", 8), meshes.parse("tp=2", 8)
    assert (hybrid.replicate, hybrid.shard, hybrid.tensor, hybrid.data_ranks) == (2, 4, 1, 8)
    assert (split.replicate, split.shard, split.tensor, split.data_ranks) == (1, 4, 2, 4)
    for text, ranks, told in [
        ("hsdp=2x4", 4, "2 copies of 4 shards are not 4 ranks"),
        ("tp=3", 4, "4 ranks cannot be divided by 3"),
        ("tp=0", 4, "there are full_shard, hsdp=RxS"),
        ("ddp", 2, "there are full_shard, hsdp=RxS"),
    ]:
        with pytest.raises(ValueError, match=told):
            meshes.parse(text, ranks)
    with pytest.raises(ValueError, match="side 'opacus' is measured with --sharding full_shard, found tp=2"):
        cases.parse("llama-1.3b:flat,opacus", microbatches=1, checkpointing=False, sharding=split)


def test_rows_of_another_sharding_or_number_of_gpus_are_others(tmp_path: Path) -> None:
    """Rows from before shardings had names were of full_shard."""
    path = tmp_path / "rows.jsonl"
    old = {key: value for key, value in rows()[0].items() if key not in ("sharding", "gpus")}
    path.write_text(json.dumps(old) + "\n" + json.dumps(old | {"sharding": "hsdp=2x1", "gpus": 2}) + "\n")
    first, second = report.read(path)
    assert (first["sharding"], first["gpus"]) == ("full_shard", 2)
    assert report.key(first) != report.key(second)
    assert report.key(first) != report.key(first | {"gpus": 4})
    assert len(report.tables([first, second]).split("## llama")) == 3
    assert report.read(ROOT / "docs" / "benchmarks.jsonl")


@pytest.mark.parametrize("model", ["llama-tiny", "gpt2-tiny", "vit-tiny", "roberta-tiny"])
def test_models_can_be_private(model: str) -> None:
    shape = models.MODELS[model]
    module = models.Transformer(shape, tied=shape.tied, checkpointing=False)
    models.initialize(module)
    privacy = PrivacyConfig(
        max_grad_norm=1.0, noise_multiplier=1.0, expected_batch_size=3, dataset_size=100, target_delta=1e-3,
        sampling="external_poisson",
    )  # fmt: skip
    engine = make_private(module, privacy)
    losses = module(*models.batch(shape, shape.rows, 0, torch.device("cpu")))
    assert losses.shape == (shape.rows,)
    losses.mean().backward()
    engine.privatize()
    assert models.flops(shape) > 0


def test_sizes_of_the_models() -> None:
    for name, billions in [
        ("llama-350m", 0.368),
        ("llama-1.3b", 1.345),
        ("llama-6.7b", 6.74),
        ("gpt2-large", 0.774),
        ("llama-13b", 13.0),
        ("roberta-large", 0.355),
        ("vit-large", 0.304),
    ]:
        shape = models.MODELS[name]
        with torch.device("meta"):
            module = models.Transformer(shape, tied=shape.tied, checkpointing=False)
        assert sum(p.numel() for p in module.parameters()) / 1e9 == pytest.approx(billions, rel=0.02)


def test_what_a_side_does_otherwise_is_said() -> None:
    gpt2 = cases.parse(
        "gpt2-small:opacus,opacus-hooks,flat,plain-fsdp2", microbatches=1, checkpointing=False, sharding=ALL
    )
    roberta = cases.parse("roberta-large:opacus", microbatches=1, checkpointing=False, sharding=ALL)
    said = [peers.differs(case) or "" for case in (*gpt2, *roberta)]
    assert "not tied" in said[0] and "whole model on every GPU" in said[1] and said[2:] == ["", "", ""]


def test_account_of_a_trace() -> None:
    kernels = [
        {"name": "nvjet_gemm", "ts": 0.0, "dur": 4000.0},
        {"name": "ncclDevKernel_AllGather", "ts": 3000.0, "dur": 3000.0},
        {"name": "_sum_tiles", "ts": 8000.0, "dur": 1000.0},
    ]
    found = profiling.account_of_events(kernels)
    assert found["ms"] == {"matrix products": 4.0, "communication": 3.0, "norms": 1.0}
    assert (found["exposed communication"], found["idle"], found["whole"], found["launches"]) == (2.0, 2.0, 9.0, 3)


def test_length_of_a_union() -> None:
    assert profiling.covered([(5, 7), (0, 2), (1, 3), (6, 6.5)]) == 5


def test_page() -> None:
    text = report.page("before\n<!-- from rows: begin -->old<!-- from rows: end -->\nafter", rows())
    assert "| flat | 100.0 ms (1.0 to 2.0) | 0.900 | 10.50 GiB | 1.050 | 10 | 5.0 | 3 all-gather (7 MB) |" in text
    assert "| opacus | CUDA out of memory |" in text and "old" not in text
    assert "2 x GPU, hsdp=2x1, torch 2.11" in text
    assert "\n\nopacus-hooks: whole model on every GPU." in text
    assert text.startswith("before\n") and text.endswith("\nafter")
    with pytest.raises(ValueError, match="no '<!-- from rows"):
        report.page("nothing", rows())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name what to measure"),
        (["llama-2b:flat"], "no model 'llama-2b'; there are llama-tiny"),
        (["llama-tiny"], "no side '' after the colon; there are plain-fsdp1"),
        (["llama-tiny@2:flat"], "as in llama-tiny/2@8x128:flat"),
        (["llama-tiny/0:flat"], "as in llama-tiny/2@8x128:flat"),
        (["--report", "page.md"], "has none"),
        (["--report", "page.md", "--output", "nothing.jsonl"], "nothing.jsonl has none"),
    ],
)
def test_a_command_that_cannot_be_is_refused_before_anything_starts(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Seen to end in tracebacks of every rank, to do nothing without a word, and to empty the page of its tables."""
    with pytest.raises(SystemExit) as end:
        command.options_of(words)
    assert end.value.code == 2 and message in capsys.readouterr().err
