"""Writes docs/reproductions.md out of docs/reproductions.jsonl and docs/benchmarks.jsonl: a line an experiment.

python -m scripts.reproduce.page
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence

from scripts.reproduce.rows import ROOT, Row, read
from scripts.reproduce.speed import Speed, measured

PAGE = ROOT / "docs" / "reproductions.md"
HEADER = ("experiment", "ours", "paper's", "peer's or plain", "what differs", "date, commit", "command")

ACCURACY = {"test_accuracy": "{} % test accuracy"}
PRIVATE_ACCURACY = {**ACCURACY, "epsilon": "ε ≤ {}"}
BITS = {"test_bits_per_byte": "{} bits per byte", "lost_rows": "rows lost: {} of those expected", "epsilon": "ε ≤ {}"}
BASE = {
    "relative_error": "error of an update {}",
    "norm_error": "of a norm {}",
    "base_MiB": "base of {} MiB",
    "private_ms": "{} ms of one core a microbatch",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """One line of the table.

    Args:
        title: what is tried.
        experiment, ours: the script, and its side that is ours.
        figures: what is shown of ours, with words around the number.
        other, other_figures: the side to set beside it, and what is shown of that; `named`: what it is called.
        compared: the figure of which the difference is given, with its interval.
        paper, differs: what the paper reports, and in what this is another experiment.
    """

    title: str
    experiment: str
    ours: str
    figures: Mapping[str, str]
    other: str = ""
    other_figures: Mapping[str, str] = dataclasses.field(default_factory=dict)
    named: str = ""
    compared: str = ""
    paper: str = ""
    differs: str = ""


RESNET = "[DP-ZeRO](https://arxiv.org/abs/2311.11822), experiment 1: ResNet (GroupNorm) on digits"
PRECISION = "DP-ZeRO, experiment 3: small GPT in half precision"
QUANTIZED = "DP-ZeRO, open question 3: LoRA on a quantized base"
LORA = "LoRA on all-MiniLM-L6-v2: which library is a docstring from?"
LINES = (
    Line(
        title="MNIST, the tanh network of [Papernot et al.](https://arxiv.org/abs/2007.14191), FSDP",
        experiment="mnist",
        ours="fsdp_dp",
        figures=PRIVATE_ACCURACY,
        other="opacus",
        other_figures=PRIVATE_ACCURACY,
        named="Opacus 1.6.0",
        compared="test_accuracy",
        paper="98.1 % at ε < 3",
        differs="4000 training rows, not 60 000; 60 steps; the optimizer's options are ours, the same on both sides",
    ),
    Line(
        title=f"{RESNET}, ZeRO-1",
        experiment="resnet_digits",
        ours="zero1",
        figures=PRIVATE_ACCURACY,
        other="plain",
        other_figures=ACCURACY,
        named="plain FSDP",
        differs="1497 rows of 8 x 8 pixels, not CIFAR-10; 19 642 parameters; the paper suggests it and has no figure",
    ),
    Line(
        title=f"{RESNET}, FSDP",
        experiment="resnet_digits",
        ours="fsdp",
        figures=PRIVATE_ACCURACY,
        other="plain",
        other_figures=ACCURACY,
        named="plain FSDP",
        differs="the same",
    ),
    *(
        Line(
            title=f"{PRECISION}: {side}",
            experiment="half_precision",
            ours=side,
            figures=BITS,
            other="float32",
            other_figures={"test_bits_per_byte": "{} bits per byte"},
            named="float32",
            differs="34 560 parameters on bytes; scales are constants, a `GradScaler` is refused",
        )
        for side in ("bfloat16", "float16", "float16, loss x 2^16", "float16, loss x 2^22")
    ),
    *(
        Line(
            title=f"{LORA}, {words}",
            experiment="lora",
            ours=side,
            figures=PRIVATE_ACCURACY,
            other="plain",
            other_figures=ACCURACY,
            named="plain FSDP2",
            differs="five classes, 4000 rows of 16 tokens; no paper's figure",
        )
        for side, words in (("eps3", "ε ≤ 3"), ("eps8", "ε ≤ 8"))
    ),
    *(
        Line(
            title=f"{QUANTIZED}: {side}",
            experiment="quantized_base",
            ours=side,
            figures=BASE,
            other=side,
            other_figures={"plain_ms": "{} ms of one core a microbatch"},
            named="the same, plain",
            differs="an encoder of 10.6 M parameters beside its embeddings; one device",
        )
        for side in ("float32", "torchao int8", "torchao int4", "bitsandbytes nf4")
    ),
)
OURS = {"flat": "flat"}
OPACUS = {"opacus": "Opacus, ghost", "opacus-hooks": "Opacus, hooks"}
BK = "[Book-keeping](https://arxiv.org/abs/2210.00038), Fig. 4"
SPEEDS = (
    Speed(
        title="[DP-ZeRO](https://arxiv.org/abs/2311.11822), experiment 2: speed and memory of a mid-size model, 1.3B",
        case="llama-1.3b@16x1024",
        ours={"flat": "flat", "block": "block by block", "layer": "layer by layer"},
        peers={"opacus": "Opacus, ghost"},
        microbatches=4,
    ),
    *(
        Speed(
            title=f"{BK}: {model}",
            case=f"{name}@{size}",
            ours=OURS,
            peers=OPACUS,
            paper="0.83 of the speed of plain training (abstract)",
            differs="two GPUs, sharded; bf16; random ids" + also,
        )
        for model, name, size, also in (
            ("GPT-2 small", "gpt2-small", "100x100", ""),
            ("GPT-2 medium", "gpt2-medium", "50x100", ""),
            ("GPT-2 large", "gpt2-large", "20x100", ""),
            ("RoBERTa-large", "roberta-large", "20x256", "; one vector of classes from the mean over positions"),
        )
    ),
    Speed(
        title="[FlashDP](https://arxiv.org/abs/2507.01154): Llama-13B's width, layer by layer",
        case="llama-13b/10@2x1024",
        ours={"layer": "layer by layer", "flat": "flat"},
        paper="0.9 of the throughput of plain training, on four A100s (abstract)",
        differs="10 of the 40 layers; no rotary positions",
    ),
)


def shown(values: Sequence[float | str]) -> str:
    """The mean over seeds and their standard deviation; a word as it is."""
    if isinstance(values[0], str):
        return " / ".join(dict.fromkeys(map(str, values)))
    if len(set(values)) == 1:
        return f"{values[0]:g}"
    mean, deviation = statistics.mean(values), statistics.stdev(values)
    digits = max(0, 1 - math.floor(math.log10(deviation)))
    return f"{mean:.{digits}f} ± {deviation:.{digits}f}"


def cell(rows: Sequence[Row], figures: Mapping[str, str]) -> str:
    if not rows:
        return "not measured yet"
    words = ", ".join(form.format(shown([row[name] for row in rows])) for name, form in figures.items())
    return words + (f" ({len(rows)} seeds)" if len(rows) > 1 else "")


def difference(ours: Sequence[Row], others: Sequence[Row], figure: str) -> str:
    """Of the means, with Welch's interval of 95 %."""
    from scipy.stats import ttest_ind

    first, second = ([row[figure] for row in rows] for rows in (ours, others))
    interval = ttest_ind(first, second, equal_var=False).confidence_interval(0.95)
    mean = statistics.mean(first) - statistics.mean(second)
    return f"; ours less theirs {mean:+.1f} (95 %: {interval.low:+.1f} to {interval.high:+.1f})"


def cells(line: Line, rows: Sequence[Row]) -> Iterable[str]:
    of_experiment = [row for row in rows if row["experiment"] == line.experiment]
    steps = max((row["steps"] for row in of_experiment), default=0)
    whole = [row for row in of_experiment if row["steps"] == steps]
    ours, others = ([row for row in whole if row["side"] == side] for side in (line.ours, line.other))
    beside = f"{line.named}: {cell(others, line.other_figures)}" if others else ""
    if line.compared and min(len(ours), len(others)) > 1:
        beside += difference(ours, others, line.compared)
    stamps = dict.fromkeys(f"{row['date']}, `{row['commit']}`" for row in ours)
    commands = dict.fromkeys(row["command"] for row in ours)
    return (
        line.title,
        cell(ours, line.figures),
        line.paper,
        beside,
        line.differs,
        "; ".join(stamps),
        "; ".join(f"`{command}`" for command in commands),
    )


def page(rows: Sequence[Row], speeds: Sequence[Row]) -> str:
    """Of the rows of the experiments, and of the benchmark."""
    lines = [HEADER, ["---"] * len(HEADER), *(cells(line, rows) for line in LINES)]
    lines += [speed.cells(speeds) for speed in SPEEDS]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    devices = dict.fromkeys(f"{row['device']}, torch {row['torch']}, Python {row['python']}" for row in rows)
    return TEXT.format(table=table, devices="; ".join(devices))


TEXT = """\
# Papers' experiments, run again

What others report, tried with this library on data and weights that Python packages carry: nothing is downloaded but
packages. Every line is one command; its rows are in [reproductions.jsonl](reproductions.jsonl), of speed the newest of
[benchmarks.jsonl](benchmarks.jsonl), and `python -m scripts.reproduce.page` writes this page from both. What came out worse
stays in. All private rows but those of the quantized bases, which have no noise, drew fresh noise.

    pip install 'fsdp-dp[data,hf]'
    pip install --no-deps -r scripts/reproduce/requirements.txt

Mean ± standard deviation over seeds. Measured on {devices}, which other work shared. Speed and
memory are of the GPUs that the line names, beside plain FSDP2 of the same commit, device and number of microbatches.

{table}

**As runs of the application.** DP-ZeRO's first experiment is `torchrun --standalone --nproc-per-node=2 -m
fsdp_dp.train experiment=dp_zero_digits sharding=zero1` (or `full_shard`; six runs: 0.67 to 0.78 held-out accuracy,
with 359 rows held out and a learning rate that falls), and `experiment=dp_zero_cifar10` for people who have CIFAR-10
or a network. The others are scripts, since a run of the application is one private training: MNIST trains with Opacus
from the same first weights; half precision wants float16 and scales of the loss, which the application does not
offer; LoRA makes its rows out of installed packages and averages the encoder's outputs; with a quantized base nothing
is trained, updates are compared; and speed is `fsdp_dp.benchmark`'s.

**Reading.**

- Opacus and this library agree on MNIST within noise: with the same mechanism they train the same. Both are ten
  points under the paper's figure, which has fifteen times as many rows at the same ε. This library's ε is a little
  smaller, since its accountant allows itself a smaller error. Of the optimizer's options two were tried, on one seed.
- The ResNet pays most: 1497 rows are few for ε ≤ 3 (σ = 2.3), and options other than these (batches of 256 to 512, 60
  to 120 steps, learning rates of 3e-3 to 3e-2) were no better. ZeRO-1 and FSDP make the same update and differ by
  their noise. The same network as a recipe, at ε ≤ 8: `torchrun ... -m fsdp_dp.train experiment=resnet_digits
  sharding=zero1`.
- Private training in float16 without a scale is as good as in float32, as DP-ZeRO says. The scale at which
  `GradScaler` starts does no harm to this loss, which is a mean over positions; 2^22, to which it would double itself
  in some 12 000 steps if nothing overflowed before, makes nearly every row overflow, and the model learns from noise
  alone. A scale is neutral or worse. float16 is slow on a CPU.
- LoRA loses 10 to 13 points of accuracy to privacy; from ε ≤ 8 to ε ≤ 3 it is 2.
- Book-keeping's figure 4: the smaller the model, the more its step waits for the host, and the private one has more to
  launch. The paper's 0.83 is reached at GPT-2-medium and -large. Opacus' ghost clipping under FSDP gathers every layer a
  second time and takes 4.9 to 6.3 times as long as flat; its stored gradients, whole models on each GPU, 1.3 to 1.6 times,
  in 4 to 6.5 times the memory.
- Layer by layer at Llama-13B's width is 0.01 below FlashDP's figure, on other GPUs, and needs plain training's memory.
- A quantized base is exact: what is left of the error of an update is the margin by which certified clipping stays
  below R (7e-5, the same for every row), and norms agree to float32. Compared with the base *before* quantization,
  the same update is off by 0.026 (int8), 0.26 (int4) and 0.22 (nf4), so the comparison can tell. Frozen weights take
  no part in what the engine computes.
- What does not run without a GPU, with torchao 0.18 on torch 2.13: `Int4WeightOnlyConfig`, whose formats need the
  package mslk ("plain"), or refuse CPUs ("plain_int32"), or need CUDA ("tile_packed_to_4d");
  `IntxWeightOnlyConfig(torch.int4)` stands in, which keeps a byte for each number, so that its memory says nothing
  about int4. bitsandbytes' `Linear8bitLt` quantizes activations too, and was not tried. Sharding a quantized base was
  not tried.
"""


if __name__ == "__main__":
    PAGE.write_text(page(read(), measured()), encoding="utf-8")
