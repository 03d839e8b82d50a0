"""Small kernels around the functions of `fsdp_dp.kernels`, for `test_box_muller`; imported under the interpreter."""

# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl
from torch import Tensor

from fsdp_dp.kernels.box_muller import bits, coefficients, normal_pair, number
from fsdp_dp.kernels.chacha_normal import _clamped


@triton.jit
def _normals(words, out, n, one, radius, cosine, sine, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    a, b = tl.load(words + i, mask=i < n, other=0), tl.load(words + n + i, mask=i < n, other=0)
    c, d = tl.load(words + 2 * n + i, mask=i < n, other=0), tl.load(words + 3 * n + i, mask=i < n, other=0)
    words = (
        a.to(tl.uint32, bitcast=True), b.to(tl.uint32, bitcast=True), c.to(tl.uint32, bitcast=True),
        d.to(tl.uint32, bitcast=True),
    )  # fmt: skip
    length, cosine, sine = normal_pair(words, 0, (one.to(tl.uint32), radius, cosine, sine))
    tl.store(out + i, length, mask=i < n)
    tl.store(out + n + i, cosine, mask=i < n)
    tl.store(out + 2 * n + i, sine, mask=i < n)


@triton.jit
def _clamp(sums, out, clamp, n, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(out + i, _clamped(tl.load(sums + i, mask=i < n, other=0.0), number(clamp)), mask=i < n)


def run(words: Tensor, out: Tensor, scale: float) -> None:
    """int32 [4, n] to float64 [3, n]."""
    n = words.shape[1]
    _normals[(1,)](words, out, n, 1, *coefficients(scale), SIZE=triton.next_power_of_2(n))


def run_clamp(sums: Tensor, out: Tensor, bound: float) -> None:
    _clamp[(1,)](sums, out, bits(bound), len(sums), SIZE=triton.next_power_of_2(len(sums)))
