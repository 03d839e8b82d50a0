"""`nn.LSTM`, `nn.GRU` and `nn.RNN`: a loop over steps, so that the gradient of every product is seen.

The sequence's own product is one call for all steps, the state's is one call a step, and these add up as the calls of a
reused layer do. Gates, dropout between layers, both directions, projections and packed sequences are as in torch, to
rounding. Without gradients torch's own forward runs.

Legend: B rows, T steps, D inputs, H width of the state, G gates together.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from fsdp_dp.errors import UnsupportedModelError
from fsdp_dp.gradients import PerSampleGradient
from fsdp_dp.layers.linear import linear
from fsdp_dp.layers.registry import layer_rule
from fsdp_dp.parts import Part

State = tuple[Tensor, ...]  # h [B, H], and an LSTM's c


class Product(Part):
    """One product of a recurrent module: of the sequence, of the state, or the projection of the state."""

    documented_as = "RNNBase"


@layer_rule(Product)
def product(module: nn.Module, a: Tensor, g: Tensor, wanted: frozenset[str]) -> dict[str, PerSampleGradient]:
    """LSTM, GRU and RNN as a loop over steps, each product as a Linear; packed sequences too."""
    return linear(module, a, g, wanted)


def is_recurrent(module: nn.Module) -> bool:
    """Whether a module computes what torch's recurrent modules do."""
    return isinstance(module, nn.RNNBase) and type(module).forward in (nn.LSTM.forward, nn.GRU.forward, nn.RNN.forward)


def refusal_of_recurrence(module: nn.Module) -> str | None:
    assert isinstance(module, nn.RNNBase)
    known = {name for names in module._all_weights for name in names}
    if set(module._parameters) != known or module._forward_pre_hooks or "forward" in vars(module):
        return (
            f"{type(module).__name__} has other parameters than torch gives it, a forward pre-hook or a forward of its own "
            "(weight norm, dropped weights); use it as torch made it, or a loop over nn.LSTMCell, nn.GRUCell"
        )
    return None


def products(module: nn.Module) -> dict[str, Product]:
    """The parts of a recurrent module, by the names of their weights."""
    assert isinstance(module, nn.RNNBase)
    found = {}
    for names in module._all_weights:
        for name in names:
            if name.startswith("weight"):
                bias = name.replace("weight", "bias")
                found[name] = Product(module, name, bias if bias in names else None)
    return found


def _forward(self: Any, input: Any, hx: Any = None) -> Any:
    """As the forward of `nn.LSTM`, `nn.GRU` and `nn.RNN`."""
    whole = all(w is getattr(self, name) for w, name in zip(self._flat_weights, self._flat_weights_names, strict=True))
    if not torch.is_grad_enabled() and whole:  # FSDP puts gathered weights beside the list that torch reads
        kind: Any = {"LSTM": nn.LSTM, "GRU": nn.GRU}.get(self.mode, nn.RNN)
        return kind.forward(self, input, hx)
    packed = isinstance(input, PackedSequence)
    x, lengths = pad_packed_sequence(input, batch_first=True) if packed else (input, None)
    if x.dim() != 3:
        raise UnsupportedModelError(
            f"{self.mode} was given a sequence of shape {tuple(x.shape)}, without a batch; give it three dimensions"
        )
    x = x if packed or self.batch_first else x.transpose(0, 1)
    given = () if hx is None else tuple(hx) if isinstance(hx, tuple | list) else (hx,)
    keep = None if lengths is None else _keep(lengths, x)
    x, state = _layers(self, x, given, keep)
    final = state if self.mode == "LSTM" else state[0]
    if lengths is not None:
        y = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=input.sorted_indices is None)
        return PackedSequence(y.data, input.batch_sizes, input.sorted_indices, input.unsorted_indices), final
    return x if self.batch_first else x.transpose(0, 1), final


Product.forward_of_owner = _forward


def _keep(lengths: Tensor, x_BTD: Tensor) -> Tensor:
    """``[T, B, 1]``: whether a row has that step."""
    steps = torch.arange(x_BTD.shape[1], device=x_BTD.device)
    return (steps[:, None] < lengths.to(x_BTD.device)[None])[:, :, None]


def _layers(self: Any, x_BTD: Tensor, given: State, keep: Tensor | None) -> tuple[Tensor, State]:
    """All layers' output ``[B, T, H]``, and their last states ``[layers, B, H]``."""
    last: list[State] = []
    directions = ("", "_reverse") if self.bidirectional else ("",)
    for layer in range(self.num_layers):
        outputs = []
        for direction in directions:
            number = len(last)
            found, state = _scan(self, x_BTD, tuple(s[number] for s in given), keep, f"_l{layer}{direction}")
            outputs.append(found)
            last.append(state)
        x_BTD = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
        if self.dropout and layer < self.num_layers - 1:
            x_BTD = F.dropout(x_BTD, self.dropout, self.training)
    return x_BTD, tuple(torch.stack(s) for s in zip(*last, strict=True))


def _scan(self: Any, x_BTD: Tensor, state: State, keep: Tensor | None, suffix: str) -> tuple[Tensor, State]:
    """One layer in one direction."""
    gates_BTG = self._parts["weight_ih" + suffix](x_BTD)
    if not state:
        widths = (self.proj_size or self.hidden_size, self.hidden_size)[: 2 if self.mode == "LSTM" else 1]
        state = tuple(gates_BTG.new_zeros(len(gates_BTG), width) for width in widths)
    outputs: dict[int, Tensor] = {}
    for t in _steps(gates_BTG.shape[1], suffix):
        before, state = state, _step(self, gates_BTG[:, t], state, suffix)
        if keep is not None:
            state = tuple(torch.where(keep[t], new, old) for new, old in zip(state, before, strict=True))
            outputs[t] = state[0].masked_fill(~keep[t], 0.0)
        else:
            outputs[t] = state[0]
    return torch.stack([outputs[t] for t in range(len(outputs))], 1), state


def _steps(count: int, suffix: str) -> Iterator[int]:
    return reversed(range(count)) if suffix.endswith("_reverse") else iter(range(count))


def _step(self: Any, gates_BG: Tensor, state: State, suffix: str) -> State:
    h = state[0]
    of_state_BG = self._parts["weight_hh" + suffix](h.unsqueeze(1)).squeeze(1)
    if self.mode == "LSTM":
        i, f, g, o = (gates_BG + of_state_BG).chunk(4, -1)
        c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        if self.proj_size:
            h = self._parts["weight_hr" + suffix](h.unsqueeze(1)).squeeze(1)
        return h, c
    if self.mode == "GRU":
        (r, z, n), (r_h, z_h, n_h) = gates_BG.chunk(3, -1), of_state_BG.chunk(3, -1)
        z = torch.sigmoid(z + z_h)
        n = torch.tanh(n + torch.sigmoid(r + r_h) * n_h)
        return (n + z * (h - n),)
    activation = torch.relu if self.mode == "RNN_RELU" else torch.tanh
    return (activation(gates_BG + of_state_BG),)
