"""Floating point, said once: in which format sums are kept, and how far rounding can move them.

Everything here serves GUARANTEE "certified clipping": a clip factor is computed from a norm *plus* a bound on what
rounding may have hidden, so the bounds below are worst cases, valid for any order of summation, never averages.

Source of the bounds: N. Higham, "Accuracy and Stability of Numerical Algorithms", 2nd ed., section 3.1: a sum or dot
product of ``n`` terms evaluated in arithmetic of unit roundoff ``u`` is off by at most
``gamma(n) * sum_k |x_k y_k|`` with ``gamma(n) = n u / (1 - n u)``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

TENSOR_CORE_ROUNDOFF = 2.0**-22
"""Bound on one accumulation step of a half-precision tensor-core product on any device: float32 that truncates and aligns
to the largest term of a block (Fasi, Higham, Mikaitis, Pranesh 2021, "Numerical behavior of NVIDIA tensor cores")."""

_MEASURED_ROUNDOFF = {(8, 0): 2.0**-23, (9, 0): 2.0**-24}
"""Devices whose blocks are longer, by compute capability: 0.69 and 0.33 times 2^-23 a step (docs/numerics.md)."""

SPLIT_ROUNDOFF = 2.0**-16
"""A float32 number is the sum of two bfloat16 numbers up to this, relative: twice 8 bits."""

UN_NOISED_MARGIN = {torch.float64: 2.0**-42, torch.float32: 2.0**-14}
"""Share of ``max_grad_norm`` kept back for the rounding of sums over rows, microbatches and ranks (rule 3).

A row changes not only its own term of ``sum_i c_i G_i`` but also how the others round. This is no worst case: that,
``gamma(rows * T) * sum_i |w_i| S_i``, would be far larger. Measured in fp32 the change is one to two times ``2^-24`` of
the norm of the sum (docs/numerics.md), so the margin covers sums of norm up to about ``2^9 R``.
"""

TENSOR_CORE_MARGIN = 2.0**-11
"""The same on a GPU for float32 sums: tensor cores truncate, so every row added later takes a little off the others. The
change points inwards (it shortens the row's own contribution), at most ``1.1e-8 R`` for each token of the microbatch."""


def un_noised_margin(dtype: torch.dtype, device: torch.device) -> float:
    """The share of ``max_grad_norm`` that is kept back for sums in ``dtype`` made on ``device``."""
    return TENSOR_CORE_MARGIN if device.type == "cuda" and dtype == torch.float32 else UN_NOISED_MARGIN[dtype]


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The format that un-noised sums live in: float64 for float64 tensors, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def unit_roundoff(dtype: torch.dtype) -> float:
    """Largest relative error of one correctly rounded operation in ``dtype``."""
    return torch.finfo(dtype).eps / 2


def gamma(terms: int, rounding: torch.dtype | float) -> float:
    """Relative error bound of a sum of ``terms`` products, given a dtype or a unit roundoff (infinite if useless)."""
    spread = terms * (rounding if isinstance(rounding, float) else unit_roundoff(rounding))
    return spread / (1 - spread) if spread < 0.5 else float("inf")


def underflow(terms: int, dtype: torch.dtype) -> float:
    """Absolute error of a sum of ``terms`` products in ``dtype`` that `gamma` leaves out: results flushed to zero.

    Each product and each partial sum may lose up to the smallest normal number; twice that covers later growth.
    """
    return 4 * terms * torch.finfo(dtype).tiny


def on_tensor_cores(*factors: Tensor) -> bool:
    """Whether a product of these is formed from bfloat16 by tensor cores, with float32 accumulation and result."""
    return all(x.is_cuda and x.dtype == torch.bfloat16 for x in factors)


@functools.cache
def tensor_core_roundoff(device: torch.device) -> float:
    """Unit roundoff of the accumulation in half-precision products on this device's tensor cores."""
    if device.type != "cuda":
        return TENSOR_CORE_ROUNDOFF
    return _MEASURED_ROUNDOFF.get(torch.cuda.get_device_capability(device), TENSOR_CORE_ROUNDOFF)


def product_roundoff(*factors: Tensor) -> float:
    """Unit roundoff of `product`'s accumulation."""
    if on_tensor_cores(*factors):
        return tensor_core_roundoff(factors[0].device)
    return unit_roundoff(accumulate_dtype(functools.reduce(torch.promote_types, (x.dtype for x in factors))))


def product(x: Tensor, y: Tensor) -> Tensor:
    """``x @ y`` for ``[m, k] [k, n]`` or batches of these, in float32 (float64 for float64 factors).

    Products of two bfloat16 numbers are exact in float32, so both ways differ only in how they accumulate.
    """
    if on_tensor_cores(x, y):
        return (torch.mm if x.ndim == 2 else torch.bmm)(x, y, out_dtype=torch.float32)  # type: ignore[call-overload, no-any-return]
    dtype = accumulate_dtype(torch.promote_types(x.dtype, y.dtype))
    return x.to(dtype) @ y.to(dtype)


def split_bfloat16(x: Tensor) -> tuple[Tensor, Tensor]:
    """float32 ``x`` as a sum of two bfloat16 tensors, off by at most ``SPLIT_ROUNDOFF * |x|`` (underflow aside)."""
    high = x.to(torch.bfloat16)
    return high, torch.sub(x, high, out=torch.empty_like(high))


_precision = torch._C._get_fp32_precision_getter
"""What ``torch.backends.cuda.matmul.fp32_precision`` reads, and mkldnn's, without the modules in front of it."""

_IEEE = ("ieee", "none")
"""What a flag reads where products are IEEE. "none": neither it nor those that it inherits from say anything."""


def exact_arithmetic(device: torch.device) -> AbstractContextManager[None]:
    """No autograd, no autocast, IEEE fp32 matrix products, whatever flags the user's program has set.

    Entered for every layer of every backward, so there is nothing to enter where all is as it should be.
    """
    is_exact = (
        _precision("cuda", "matmul") in _IEEE
        and _precision("mkldnn", "matmul") in _IEEE
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled(device.type)
    )
    return _NOTHING if is_exact else _ExactArithmetic(device.type)


_NOTHING = nullcontext()


class _ExactArithmetic(AbstractContextManager[None]):
    """Touches only what is not as it should be, and puts it back."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._restore: list[Callable[[], None]] = []

    def __enter__(self) -> None:
        try:
            backends: list[Any] = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]  # type: ignore[attr-defined]
            precisions = [backend.fp32_precision for backend in backends]
            if any(before not in _IEEE for before in precisions):
                for backend, before in zip(backends, precisions, strict=True):
                    if before != "ieee":
                        backend.fp32_precision = "ieee"
                        self._restore.append(functools.partial(_set_precision, backend, before))
            for context in self._contexts():
                context.__enter__()
                self._restore.append(functools.partial(context.__exit__, None, None, None))
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *error: object) -> None:
        while self._restore:
            self._restore.pop()()

    def _contexts(self) -> list[Any]:
        autograd = [torch.no_grad()] if torch.is_grad_enabled() else []
        kind = self._kind
        return autograd + ([torch.autocast(kind, enabled=False)] if torch.is_autocast_enabled(kind) else [])


def _set_precision(backend: Any, precision: str) -> None:
    backend.fp32_precision = "none"  # inherit again, unless that is not what the flag said before
    if backend.fp32_precision != precision:
        backend.fp32_precision = precision
