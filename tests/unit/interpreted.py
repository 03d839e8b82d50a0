"""Triton's interpreter for tests of kernels on a CPU: a numpy program for every line of a kernel. Slow: keep shapes small."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch


@contextmanager
def interpreter() -> Iterator[None]:
    """Completes the interpreter, which tests/conftest.py turns on.

    Two things that it lacks are put in: bounds of loops under NumPy 2, and products of bfloat16, which it keeps as bits.
    Triton's own functions are interpreted as well, even if something imported Triton before.
    """
    if find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    if torch.cuda.is_available():
        pytest.skip("with a GPU the kernels are compiled, and tests/gpu runs them")
    with pytest.MonkeyPatch.context() as patch:
        from triton.runtime import interpreter as triton_interpreter

        patch_tensor = triton_interpreter._patch_lang_tensor

        def patch_lang_tensor(tensor: Any, scope: Any) -> None:
            patch_tensor(tensor, scope)
            scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

        patch.setattr(triton_interpreter, "_patch_lang_tensor", patch_lang_tensor)
        builder = triton_interpreter.InterpreterBuilder
        dot = builder.create_dot

        def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
            return dot(self, _widened(triton_interpreter, a), _widened(triton_interpreter, b), *rest)

        patch.setattr(builder, "create_dot", create_dot)
        _interpret_library(triton_interpreter, patch)
        yield


def _interpret_library(triton_interpreter: Any, patch: pytest.MonkeyPatch) -> None:
    """``tl.sum`` and its like are kernels' functions too, made when Triton is imported."""
    import triton.language as tl
    from triton.runtime.jit import JITFunction

    for module in (tl.standard, tl):
        for name, value in list(vars(module).items()):
            if isinstance(value, JITFunction):
                patch.setattr(module, name, triton_interpreter.InterpretedFunction(value.fn))


def _widened(triton_interpreter: Any, x: Any) -> Any:
    """A bfloat16 tensor, which the interpreter holds as uint16, in float32."""
    import triton.language as tl

    if x.dtype.scalar != tl.bfloat16:
        return x
    return triton_interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
