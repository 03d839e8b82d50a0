"""LoRA on a quantized base, as DP-ZeRO (arXiv 2311.11822) asks in its third open question: exact, and at what cost?

    python -m scripts.reproduce.quantized_base

The encoder of `lora`, its Linears quantized and frozen, its adapters private. One release without noise is compared with a
float64 loop over rows, in plain autograd, on the same model with its weights as they are after quantization
(`relative_error`: of the whole update; `norm_error`: of the rows' norms, the largest). Then a microbatch of 32
rows of 16 tokens is timed, plain and private: processor time of the fastest of `--steps`, on one core.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fsdp_dp import PrivacyConfig, make_private
from scripts.reproduce import lora
from scripts.reproduce.rows import Experiment, Row
from tests.oracle import clipped_sum, norm, row_gradients, trainable

CHECKED, TIMED, BOUND = 8, 32, 0.5


def float32(encoder: nn.Module) -> None:
    """As it was trained."""


def torchao_int8(encoder: nn.Module) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(encoder.encoder, Int8WeightOnlyConfig())


def torchao_int4(encoder: nn.Module) -> None:
    """In groups of 32; on a CPU each 4-bit number is kept in a byte (`Int4WeightOnlyConfig` wants a GPU)."""
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_

    quantize_(encoder.encoder, IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)))


def bitsandbytes_nf4(encoder: nn.Module) -> None:
    from bitsandbytes.nn import Linear4bit, Params4bit

    for parent in list(encoder.encoder.modules()):
        for name, old in list(parent.named_children()):
            if type(old) is nn.Linear:
                new = Linear4bit(old.in_features, old.out_features, compute_dtype=torch.float32, quant_type="nf4")
                new.weight = Params4bit(old.weight.data, requires_grad=False, quant_type="nf4", module=new)
                new.bias = old.bias
                setattr(parent, name, new.to("cpu"))  # quantizes


BASES = {
    "float32": float32,
    "torchao int8": torchao_int8,
    "torchao int4": torchao_int4,
    "bitsandbytes nf4": bitsandbytes_nf4,
}


def dequantized(linear: nn.Module) -> Tensor:
    """The weight that its forward multiplies by, float32."""
    weight = linear.weight
    if hasattr(weight, "quant_state"):
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state)
    return weight.dequantize() if hasattr(weight, "dequantize") else weight.detach()


def encoder_with(base: Callable[[nn.Module], None]) -> tuple[nn.Module, nn.Module]:
    """(quantized, the same with its weights dequantized), frozen: torchao would otherwise keep a graph of its own making."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the packages that quantize
        quantized, plain = (lora.pretrained().requires_grad_(False) for _ in range(2))
        base(quantized)
        for name, linear in plain.named_modules():
            if isinstance(linear, nn.Linear):
                linear.weight.data = dequantized(quantized.get_submodule(name)).clone()
    return quantized, plain


def adapted(encoder: nn.Module, seed: int) -> nn.Module:
    """With adapters that are not zero, so that both factors have gradients."""
    torch.manual_seed(seed)
    model = lora.adapted(encoder)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model


def bytes_of(encoder: nn.Module) -> int:
    """Of what its parameters are kept in, embeddings apart."""
    return sum(size for parameter in encoder.encoder.parameters() for size in _bytes(parameter))


def _bytes(tensor: Tensor) -> Iterator[int]:
    state = getattr(tensor, "quant_state", None)
    if state is not None:
        yield from (part.nbytes for part in (tensor.data, state.absmax, state.code))
    elif hasattr(tensor, "__tensor_flatten__"):
        yield from (getattr(tensor, name).nbytes for name in tensor.__tensor_flatten__()[0])
    else:
        yield tensor.nbytes


def losses(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="none")


def milliseconds(step: Callable[[], object], times: int) -> float:
    """Of the processor, for the fastest, after one to warm up."""
    taken = []
    for _ in range(times + 1):
        began = time.process_time()
        step()
        taken.append(1000 * (time.process_time() - began))
    return round(min(taken[1:]), 1)


def measure(base: Callable[[nn.Module], None], seed: int, times: int) -> Row:
    (inputs, labels), _ = lora.rows()
    checked, timed = (inputs[:CHECKED], labels[:CHECKED]), (inputs[-TIMED:], labels[-TIMED:])
    quantized, plain = encoder_with(base)
    figures: Row = {"base_MiB": round(bytes_of(quantized) / 2**20, 2)}
    gradients = list(row_gradients(adapted(plain, seed).double(), checked, losses))
    expected, norms = clipped_sum(iter(gradients), BOUND), torch.tensor([norm(g) for g in gradients]).double()

    model = adapted(quantized, seed)

    def backward() -> None:
        losses(model(timed[0]), timed[1]).sum().backward()

    figures["plain_ms"] = milliseconds(backward, times)
    model.zero_grad()
    privacy = PrivacyConfig(
        max_grad_norm=BOUND,
        noise_multiplier=0.0,
        expected_batch_size=1,
        dataset_size=lora.TRAIN,
        target_delta=lora.DELTA,
        sampling="external_poisson",
        loss_reduction="sum",
    )
    engine = make_private(model, privacy)
    losses(model(checked[0]), checked[1]).sum().backward()
    engine.privatize()
    found = {name: p.grad.double() for name, p in trainable(model).items()}
    error = norm({name: found[name] - e for name, e in expected.items()}) / norm(expected)
    figures["relative_error"] = float(f"{error:.2e}")
    figures["norm_error"] = float(f"{(engine.per_sample_norms / norms - 1).abs().max():.2e}")
    figures["clipped_rows"] = int((engine.per_sample_norms > BOUND).sum())
    engine.discard()

    def private() -> None:
        backward()
        engine.privatize()
        engine.discard()

    figures["private_ms"] = milliseconds(private, times)
    return figures


def main(arguments: Sequence[str] | None = None) -> None:
    sides = {name: lambda seed, steps, base=base: measure(base, seed, steps) for name, base in BASES.items()}
    Experiment("quantized_base", __doc__, seeds=1, steps=10).main(sides, arguments)


if __name__ == "__main__":
    main()
