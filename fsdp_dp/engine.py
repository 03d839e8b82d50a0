"""One private step, from the recorded microbatch to the released gradient. This page is the heart of the library.

    forward    the freeze window closes, layers are tapped                                       [taps]
    backward   each tap turns (a, g) into a per-sample gradient in factored form                 [layers, gradients]
    its end    norms -> (summed over ranks that split a row) -> weights -> weighted sums,
               unit by unit, reduce-scattered into float32 accumulators on the local shard       [clipping, sharding]
    step       the release number grows, lattice noise is added, ``p.grad`` is published         [noise]

States of a logical batch: nothing pending -> (forward, backward)* -> pending -> released -> consumed by optimizers.
An exception in between poisons it: it can only be discarded.
"""

from __future__ import annotations

import dataclasses
import math
import struct
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import Optimizer
from torch.utils._pytree import tree_leaves

from fsdp_dp import accounting, noise
from fsdp_dp.adaptive_bounds import next_bounds, split_noise
from fsdp_dp.clipped_sum import ClippedSum, ClippingPlan, MeasuredNorms
from fsdp_dp.clipping import RowWeights, row_weights
from fsdp_dp.config import PrivacyConfig
from fsdp_dp.coverage import (
    RowLayouts,
    mark_attached,
    refuse_attached,
    refuse_strangers,
    refuse_training_batch_norm,
    tapped_layers,
    unmark_attached,
)
from fsdp_dp.errors import BudgetExceededError, NoEpsilonWarning, PrivacyError, UnsupportedModelError
from fsdp_dp.gradients import Materialized, NormTerms, PerSampleGradient
from fsdp_dp.groups import Place, blocks_of_units, clipping_groups
from fsdp_dp.independence import FirstMicrobatch
from fsdp_dp.intake import Intake
from fsdp_dp.kernels.release import Segment, Verdict, privatize_all_
from fsdp_dp.label_watch import LabelWatch
from fsdp_dp.layers import keeps, per_sample_gradients
from fsdp_dp.methods import Measured
from fsdp_dp.numerics import accumulate_dtype, exact_arithmetic, un_noised_margin
from fsdp_dp.optimizer_gate import OptimizerGate
from fsdp_dp.records import NO_CALL, Call, Record
from fsdp_dp.sampling import LogicalBatchLoader
from fsdp_dp.sharding import open_model
from fsdp_dp.shared_values import Meetings, SharedValue, is_marked
from fsdp_dp.side_stream import to_device
from fsdp_dp.summary import describe
from fsdp_dp.taps import (
    FreezeWindow,
    Report,
    SharedParameters,
    Taps,
    at_end_of_backward,
    recomputing,
    with_boundary,
)
from fsdp_dp.watch import ConstantDivisor, FirstForward, Uncompiled, buffer_versions

_MECHANISM = (
    "noise_multiplier", "max_grad_norm", "expected_batch_size", "dataset_size", "sampling", "max_batch_size", "clipping",
    "group_bounds", "clip_function", "clip_stability", "adaptive_bounds", "numerics",
)  # fmt: skip
_SEED_WARNING = "seed fixed: no privacy guarantee. Leave seed=None outside tests"


@dataclasses.dataclass(eq=False)
class _Microbatch:
    """One forward and its backward.

    ``sums`` is given the per-sample gradients, ``norms`` the norm of every parameter where that is asked for. A
    rehearsal (see `independence`) has the latter alone: it is measured and never summed. ``taps`` counts the calls of each
    layer; ``norm_sq_B`` adds up over clipping groups, ``dropped_B`` says which rows had no finite norm in some group.
    """

    rows: int
    mask_B: Tensor
    vouched: bool
    sums: ClippedSum | None = None
    norms: MeasuredNorms | None = None
    norm_sq_B: Tensor | None = None
    dropped_B: Tensor | None = None
    narrowest: torch.dtype = torch.float64
    taps: Counter[str] = dataclasses.field(default_factory=Counter)
    entered: bool = False
    recording: bool = False
    done: bool = False

    @property
    def rehearsal(self) -> bool:
        return self.sums is None

    @property
    def takers(self) -> list[ClippedSum | MeasuredNorms]:
        return [taker for taker in (self.norms, self.sums) if taker is not None]


class PrivacyEngine:
    """Differentially private gradients for one model; made by `make_private`.

    **Formal guarantee.** With ``numerics="certified"``, every release is ``sum_i w_i G_i + sigma R xi`` over the rows
    of one logical batch, divided by ``expected_batch_size``, where every ``|w_i G_i| <= R`` as rounded, ``xi`` is
    standard normal on a public lattice, drawn once per release from a key that is never stored, and R is
    ``max_grad_norm``. In groups, w_i is a weight for each group, whose part of ``w_i G_i`` is within its own R_k, and
    ``sqrt(sum R_k^2) <= R``. Adding or removing one row moves the sum by at most R. With ``adaptive_bounds``, sigma_g in
    place of sigma, and counts beside the sum, cost what sigma alone would (see `adaptive_bounds`). `epsilon` composes
    the releases as sampled by `loader`.

    Attributes:
        privacy: the configuration.
        noise_multiplier: sigma, given or calibrated; what is accounted.
        groups: the clipping groups.
        bounds: the bound of each group, R_k; ``max_grad_norm`` is R, of all together.
        steps: releases so far.
        seeded: some of them drew their noise from a fixed seed, so that there is no guarantee.
        nonfinite_rows: int64 scalar, rows of this rank zeroed because their gradient was not finite. Not private.
        measured: parameter -> how its gradients were measured, in the first microbatch. Not private.
    """

    def __init__(self, model: nn.Module, privacy: PrivacyConfig, optimizer: Optimizer | None = None) -> None:
        self.privacy = privacy
        refuse_attached(model)
        self.model = open_model(model)
        self.layers, bare = tapped_layers(self.model)
        self.bare_parameters = [p.name for p in bare]
        self._batch_norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self.dtype = self.model.parameters[0].accumulator.dtype
        self.noise_multiplier = self._agree_on_noise_multiplier()
        self.groups = clipping_groups(
            self._places(),
            clipping=privacy.clipping,
            bounds=privacy.group_bounds,
            max_grad_norm=privacy.max_grad_norm,
        )
        self._plan = ClippingPlan(self.model, self.groups)
        if self._plan.streams:
            self.model.dedicate_groups()
        self.gradient_noise_multiplier, self._count_noise = split_noise(
            self.noise_multiplier, len(self.groups), privacy.adaptive_bounds
        )
        self._set_bounds([group.bound for group in self.groups])
        self._excess = torch.zeros(len(self.groups), dtype=torch.float64, device=self.model.device)
        self.steps = 0
        self.seeded = privacy.seed is not None
        self._new_keys()

        self._parameters = {p.name: p for p in self.model.parameters}
        self._attributes: dict[nn.Module, dict[str, str]] = {layer: {} for layer in self.layers.values()}
        for (module, attribute), name in self.model.names.items():
            if module in self._attributes:
                self._attributes[module][attribute] = name
        handles = {p.name: p.parameter for p in self.model.parameters}
        self._intake = Intake()
        self._current: _Microbatch | None = None
        self._in_forward = False
        self._pending = 0
        self._poisoned: str | None = None
        self._vouched, self._warned = True, False
        self._draws_of_loaders: list[int] = []
        self._drawn_epoch: tuple[int, int] | None = None
        self._released_epochs: set[tuple[int, int]] = set()
        self._earlier_epochs = 0
        self._norm_B: Tensor | None = None
        self._last_release = Verdict()
        self.measured: dict[str, Measured] = {}
        self.nonfinite_rows = torch.zeros((), dtype=torch.int64, device=self.model.device)

        self._window = FreezeWindow(handles, self._refusals_poison)
        self._taps = Taps(self.layers, keeps, self._start_record, self._share_output, lambda: self._meetings.rows)
        self._shared_parameters = SharedParameters(bare, self._is_sharing, self._share_parameter)
        self._meetings = Meetings()
        self._same_for_all_rows: set[str] = set()
        self._layouts = RowLayouts(self.layers)
        self._watch: FirstForward | None = None
        self._uncompiled = Uncompiled()
        self._divisor = ConstantDivisor()
        self._labels = LabelWatch(self.model.device)
        self._watched: set[tuple[bool, ...]] = set()
        self._buffer_versions: dict[str, tuple[int, int]] = {}
        self._first_microbatch: FirstMicrobatch | None = None
        self._checked = False
        self._gate = OptimizerGate(handles, self._release, self._discard_pending)
        self._gate.adopt_zero_grad(model)
        if optimizer is not None:
            self._gate.adopt(optimizer)
        self._hooks = [
            model.register_forward_pre_hook(self._before_forward, prepend=True, with_kwargs=True),
            model.register_forward_hook(self._after_forward, with_kwargs=True, always_call=True),
        ]
        if hasattr(model, "privacy_engine"):
            model.privacy_engine = self  # type: ignore[assignment]
        mark_attached(self.layers.values())
        if self.model.narrow_reduction:
            warnings.warn(
                f"reduce_dtype={self.model.narrow_reduction} is overridden: un-noised gradients are summed in {self.dtype} "
                "instead, since rounding them would break the sensitivity bound",
                stacklevel=3,
            )

    # ------------------------------------------------------------------------------------------------ public surface

    def epsilon(self, delta: float | None = None) -> float:
        """Upper bound on epsilon at ``delta`` (default ``target_delta``) for the releases so far.

        Raises:
            PrivacyError: a batch was released that the accountant's sampling assumption does not cover.
        """
        if not self._vouched:
            raise PrivacyError(
                f"epsilon: sampling='{self.privacy.sampling}' assumes that every microbatch comes from "
                "engine.loader(...), but some did not, so no epsilon holds. Use engine.loader, or set "
                "sampling='external_poisson' if your own loader draws every row independently with probability "
                f"{self.privacy.sample_rate:g}"
            )
        if self.seeded:
            warnings.warn(_SEED_WARNING, stacklevel=2)
        delta = self.privacy.target_delta if delta is None else delta
        return accounting.epsilon_for(self.privacy, self.noise_multiplier, self._accounted_steps(), delta).upper

    @property
    def per_sample_norms(self) -> Tensor:
        """``[B]`` float64: gradient norms of the last microbatch's rows on this rank. Not private: do not publish."""
        if self._norm_B is None:
            raise PrivacyError("per_sample_norms: no microbatch has been run backward yet")
        return self._norm_B

    def loader(
        self, dataset: Any, microbatch_size: int, steps: int | None = None, **dataloader_kwargs: Any
    ) -> LogicalBatchLoader:
        """Logical batches drawn as the accountant assumes; each iterates over equal-shape, masked microbatches.

        Args:
            dataset: map-style, of length ``privacy.dataset_size``.
            microbatch_size: rows of a microbatch on one rank, padding included.
            steps: logical batches; default ``privacy.steps``, endless if that is None.
            dataloader_kwargs: for torch's ``DataLoader`` (``num_workers``, ``collate_fn``, ...).
        """
        number = len(self._draws_of_loaders)
        self._draws_of_loaders.append(0)
        return LogicalBatchLoader(
            dataset,
            privacy=self.privacy,
            key=noise.derive_key(self._master_key, f"sampling {number}"),
            microbatch_size=microbatch_size,
            steps=self.privacy.steps if steps is None else steps,
            rank=self.model.data_rank,
            world_size=self.model.data_size,
            on_logical_batch=lambda: self._start_logical_batch(number),
            on_microbatch=lambda mask_B: self._intake.take(mask_B, number),
            on_logical_batch_end=lambda: self._intake.end_logical_batch(number),
            dataloader_kwargs=dataloader_kwargs,
        )

    @contextmanager
    def microbatch(self, mask: Tensor) -> Iterator[None]:
        """Run one forward and backward of your own loader's microbatch; ``mask`` ``[B]`` is False for padding rows."""
        self._raise_if_poisoned()
        self._intake.open_block(mask)
        try:
            yield
            self._intake.close_block()
        except BaseException:
            self._poisoned = self._poisoned or "an exception ended a microbatch"
            raise

    def discard(self) -> None:
        """Drop everything since the last release: sums, records and released gradients that no step has used.

        To be called on all ranks alike.
        """
        self._window.open()
        self._gate.clear()
        self.model.zero_accumulators()
        self._forget_first_microbatch()
        self._intake.discard()
        self._excess.zero_()
        self._current, self._pending, self._poisoned, self._in_forward = None, 0, None, False
        self._uncompiled.stop()
        self._labels.forget()

    def privatize(self) -> None:
        """Release now: every managed ``.grad`` becomes its private gradient, which the next step uses as it is."""
        self._release()

    def summary(self) -> str:
        """A readable account of the mechanism, the model's layers and what is communicated."""
        return describe(self)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: counts and the mechanism. Nothing secret, and nothing un-noised."""
        self._last_release.check()
        mechanism = {k: v for k, v in dataclasses.asdict(self.privacy).items() if k != "seed"}
        return {
            **mechanism,
            "steps": self.steps,
            "epochs": self._epochs(),
            "noise_multiplier": self.noise_multiplier,
            "vouched": self._vouched,
            "seeded": self.seeded,
            "bounds": list(self.bounds),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue counting where ``state`` ended. Draws fresh keys, so no noise repeats. Call on all ranks.

        The larger of both counts is kept, which is right for an earlier or later state of the *same* run; states of
        separate runs on one dataset do not add up here: account those together, as one run with all their releases.

        Raises:
            PrivacyError: the mechanism differs, so that the releases could not be accounted together.
        """
        now = self.state_dict()
        missing = sorted(now.keys() - state.keys())
        if missing:
            raise PrivacyError(
                f"load_state_dict: this is not the state of a privacy engine (no {missing[0]!r} in it); pass what "
                "engine.state_dict() returned"
            )
        for name in _MECHANISM:
            if state[name] != now[name]:
                raise PrivacyError(
                    f"load_state_dict: {name} was {state[name]!r} when the state was saved and is {now[name]!r} now; "
                    "releases of two mechanisms are not accounted together. Use the saved value"
                )
        if len(state["bounds"]) != len(self.groups):
            raise PrivacyError(
                f"load_state_dict: the state has bounds of {len(state['bounds'])} clipping groups, this model has "
                f"{len(self.groups)}; load the state of a run of the same model, with the same parameters trainable"
            )
        self.discard()
        self._earlier_epochs = max(self._epochs(), int(state["epochs"]))
        self._released_epochs.clear()
        self.steps = max(self.steps, int(state["steps"]))
        self._vouched = self._vouched and bool(state["vouched"])
        self.seeded = self.seeded or bool(state["seeded"])
        self._agree_on_bounds(state["bounds"])
        self._new_keys()

    def detach(self) -> None:
        """Give the model back as it was. Un-released sums are dropped; the engine cannot be used any more."""
        self.discard()
        self._poisoned = "the engine was detached from its model"
        self._taps.remove()
        self._shared_parameters.remove()
        self._window.remove()
        self._gate.remove()
        unmark_attached(self.layers.values())
        for hook in self._hooks:
            hook.remove()
        if getattr(self.model.root, "privacy_engine", None) is self:
            self.model.root.privacy_engine = None  # type: ignore[assignment]

    def __deepcopy__(self, memo: Any) -> NoReturn:
        raise PrivacyError(
            "A privacy engine cannot be copied: two copies would draw the same noise. Copy the model before "
            "make_private, or call engine.detach() first"
        )

    def __copy__(self) -> NoReturn:
        self.__deepcopy__(None)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise PrivacyError(
            "A privacy engine cannot be pickled: it holds keys that must reach no disk. Save model.state_dict() and "
            "engine.state_dict()"
        )

    @property
    def vouched(self) -> bool:
        """Whether all rows released so far were sampled as the accountant assumes, so that `epsilon` holds."""
        return self._vouched

    @property
    def rows_are_independent(self) -> bool:
        """Whether the check before the first release saw that no row's gradient depends on another (see `independence`)."""
        return self._checked

    # ------------------------------------------------------------------------------------------------- attachment

    def _agree_on_noise_multiplier(self) -> float:
        """Calibrated on rank 0 only, so that ranks cannot differ in the last digit; a failure there ends all ranks."""
        value, failure = 0.0, ""
        if self.model.is_first_rank:
            try:
                value = accounting.calibrate_for(self.privacy)
            except (ValueError, RuntimeError) as error:
                kind = "" if isinstance(error, accounting.AccountingError) else f"{type(error).__name__}: "
                failure = f"{kind}{error}"
        payload = self.model.agree(struct.pack("<d1024s", value, failure.encode()[:1024]))
        value, message = struct.unpack("<d1024s", payload)
        if message.strip(b"\0"):
            raise accounting.AccountingError(message.strip(b"\0").decode(errors="replace"))
        return float(value)

    def _new_keys(self) -> None:
        """Keys for an attachment or a load: from system entropy on rank 0, or from the seed (tests only)."""
        if self.privacy.seed is None:
            self._master_key = self.model.agree(noise.new_key())
        else:
            warnings.warn(_SEED_WARNING, stacklevel=5)
            self._master_key = noise.key_from_seed(self.privacy.seed)
            if self.steps:
                self._master_key = noise.derive_key(self._master_key, f"after release {self.steps}")
        self._noise_key = noise.derive_key(self._master_key, "noise")
        self._bounds_key = noise.derive_key(self._master_key, "adaptive bounds")

    def _places(self) -> list[Place]:
        """The managed parameters in the order in which the model registers them, with their blocks."""
        attributes: dict[nn.Module, list[str]] = {}
        for module, attribute in self.model.names:
            attributes.setdefault(module, []).append(attribute)
        sites = [self.model.names[m, a] for m in self.model.root.modules() for a in attributes.get(m, [])]
        parameters = {p.name: p for p in self.model.parameters}
        block_of = blocks_of_units({p.name: p.unit for p in self.model.parameters})
        return [Place(name=n, block=block_of[n], numel=parameters[n].numel) for n in dict.fromkeys(sites)]

    def _set_bounds(self, bounds: Sequence[float]) -> None:
        """Bounds of the groups for the logical batches from here on, and what follows from them."""
        self.bounds = tuple(float(bound) for bound in bounds)
        # Up by a hair, since the R_k^2 of several groups add up to R^2 only up to rounding.
        self.max_grad_norm = self.bounds[0] if len(bounds) == 1 else math.hypot(*bounds) * (1 + 2.0**-48)
        self._lattice = noise.Lattice.for_release(
            max_grad_norm=self.max_grad_norm,
            noise_multiplier=self.gradient_noise_multiplier,
            expected_batch_size=self.privacy.expected_batch_size,
        )
        self.row_bound = self._sensitivity_left_for_a_row()

    def _sensitivity_left_for_a_row(self) -> float:
        """``max_grad_norm`` less what rounding of sums and the noise lattice may add (rules 2 to 4)."""
        bound = self.max_grad_norm
        if self.privacy.numerics == "certified":
            bound -= self.max_grad_norm * un_noised_margin(self.dtype, self.model.device)
        if self.noise_multiplier > 0:
            bound -= self._lattice.sensitivity_charge(self.model.global_numel)
        if bound <= 0:
            raise UnsupportedModelError(
                f"The noise lattice (spacing {self._lattice.spacing:.2e}) is too coarse for {self.model.global_numel} "
                "parameters at this expected_batch_size; lower expected_batch_size or noise_multiplier"
            )
        return bound

    def _epochs(self) -> int:
        """Epochs of shuffling with a release, over all loaders: no row was in more releases than that."""
        return self._earlier_epochs + len(self._released_epochs)

    @property
    def _steps_per_epoch(self) -> int:
        return self.privacy.dataset_size // self.privacy.expected_batch_size

    def _accounted_steps(self) -> int:
        """Releases as the accountant counts them: for shuffling, whole epochs."""
        return self._epochs() * self._steps_per_epoch if self.privacy.sampling == "shuffle" else self.steps

    # --------------------------------------------------------------------------------------------- forward, backward

    def _start_logical_batch(self, loader: int) -> None:
        if self._pending:
            raise PrivacyError(
                "A new logical batch starts while the sums of the last one are not released: call optimizer.step() "
                "after every logical batch, or engine.discard() on all ranks to drop it"
            )
        self._drawn_epoch = (loader, self._draws_of_loaders[loader] // self._steps_per_epoch)
        self._draws_of_loaders[loader] += 1
        self._intake.start_logical_batch(loader)

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled() and not recomputing():
            with self._refusals_poison():
                self._begin_forward(module, args, kwargs)

    @contextmanager
    def _refusals_poison(self) -> Iterator[None]:
        """A refused microbatch is missing from the sums, so they cannot be released (rule 1)."""
        try:
            yield
        except BaseException:
            if self._pending or self._intake.source != "free":
                self._poisoned = self._poisoned or "a microbatch was refused"
            raise

    def _begin_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.model.prepare_forward()
        rehearsal = self._current is not None and self._current.rehearsal and not self._current.entered
        if not rehearsal:
            self._check_before_forward()
            self._divisor.check(kwargs)
            self._current = self._next_microbatch(args, kwargs)
        assert self._current is not None
        self._window.close()
        self._taps.of_forward.clear()
        self._in_forward = True
        if not rehearsal and not self._checked and not self._pending:
            self._forget_first_microbatch()
            self._current.norms = MeasuredNorms()
            self._first_microbatch = FirstMicrobatch(
                module,
                self._current.rows,
                args,
                kwargs,
                self.model.device,
                frozenset(id(p.parameter) for p in self.model.parameters),
                self.model.data_rank,
            )
        modes = tuple(m.training for m in module.modules())
        if modes not in self._watched or self._buffers_moved():
            self._uncompiled.start()
            self._watch = FirstForward(module, self.model.names, self._taps.running, (args, kwargs), self._current.rows)
            self._watch.__enter__()
        self._meetings.rows, self._meetings.learning = self._current.rows, self._watch is not None

    def _check_before_forward(self) -> None:
        self._raise_if_poisoned()
        refuse_training_batch_norm(self._batch_norms)
        refuse_strangers(self.model)
        if self._gate.waiting:
            raise PrivacyError(
                "A new forward starts while a released gradient waits for its optimizer.step(); call step() (or "
                "engine.discard() on all ranks) first"
            )
        self._gate.clear()

    def _next_microbatch(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Microbatch:
        """Pair the mask that travels with the microbatch with the rows that the model is given."""
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.ndim]
        rows = tensors[0].shape[0] if tensors else 0
        if rows == 0:
            raise PrivacyError(
                "The model was called without a row (no tensor input, or a first dimension of 0). Pad an empty "
                "microbatch with one row and mask it: with engine.microbatch(torch.tensor([False]))"
            )
        longest = max(x.shape[0] for x in tensors)
        if longest > rows and self._intake.source == "free":
            raise PrivacyError(
                f"The model's first input has {rows} rows and another one {longest}, so how many rows there are cannot be "
                "told: give the input that has the rows first, or run this in a `with engine.microbatch(mask)` block"
            )
        mask, from_loader = self._intake.next_mask(rows, pending=self._pending > 0)
        vouched = from_loader or self.privacy.sampling == "external_poisson"
        microbatch = _Microbatch(rows, to_device(mask.to(torch.bool), self.model.device), vouched)
        microbatch.sums = ClippedSum(self._plan, rows, lambda group, terms: self._weigh(microbatch, group, terms))
        return microbatch

    def _after_forward(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if not self._in_forward or recomputing():
            return None
        self._in_forward = self._meetings.learning = False
        self._taps.running.clear()
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.__exit__(None, None, None)
        if output is None:
            self._window.open()
            self._uncompiled.stop()
            self._poisoned = "a forward raised an exception"
            return None
        if watch is not None:
            self._verify(watch)
            if watch.settled:
                self._watched.add(tuple(m.training for m in module.modules()))
        return self._bounded(output)

    def _buffers_moved(self) -> bool:
        """Whether a buffer was written since the last training forward began; the next one is then watched again."""
        before, self._buffer_versions = self._buffer_versions, buffer_versions(self.model.root)
        return before != self._buffer_versions

    def _verify(self, watch: FirstForward) -> None:
        try:
            watch.verify()
        except UnsupportedModelError:
            self._window.open()
            self._poisoned = "the model is not supported"
            raise

    def _bounded(self, output: Any) -> Any:
        """The outputs with a boundary behind which the freeze window is open until backward comes back."""
        microbatch, recorded = self._current, self._first_microbatch
        assert microbatch is not None
        if recorded is not None and (microbatch.rehearsal or self._pending):
            recorded = None

        def entered(index: int, grad: Tensor) -> None:
            self._enter_backward(microbatch)
            if recorded is not None:
                recorded.saw_output_grad(index, grad)

        bounded, found = with_boundary(output, entered)
        if not found:
            self._window.open()
            raise UnsupportedModelError(
                f"The model's output ({type(output).__name__}) holds no tensor that requires grad: return a tensor, or a "
                "tuple, list or dict of tensors, or register its class with torch.utils._pytree.register_dataclass"
            )
        self._window.open()
        if recorded is not None:
            recorded.saw_outputs(bounded)
        elif not microbatch.rehearsal:
            self._labels.start(microbatch.rows)
        return bounded

    def _start_record(self, layer: str) -> Report:
        """A tap's report function, made at each call of a layer in forward."""
        microbatch = self._current
        if recomputing():
            return self._recomputed(microbatch, layer)
        self._require_forward(layer)
        assert microbatch is not None
        microbatch.taps[layer] += 1
        for name in self._attributes[self.layers[layer]].values():
            for taker in microbatch.takers:
                taker.expect(name)
        return lambda call, inputs, grads: self._record(microbatch, layer, Record(call, inputs, grads))

    def _require_forward(self, layer: str) -> None:
        if self._in_forward and self._current is not None:
            return
        with self._refusals_poison():
            raise PrivacyError(
                f"Layer '{layer}' was called outside the model's own forward, where its gradient cannot be clipped "
                "with the rest of the row; call it inside model.forward, or under torch.no_grad()"
            )

    def _share_output(self, layer: str, inputs: Sequence[Tensor]) -> Callable[[Tensor], SharedValue] | None:
        """How to carry a layer's output if its inputs are the same for all rows, such as position ids without a batch.

        Found out in the first forward, where tensors that descend from the rows are marked. Ids that the program expanded
        to the batch itself have rows already.
        """
        if any(isinstance(x, SharedValue) for x in inputs):
            return self._sharing(layer)
        if any(isinstance(x, DTensor) for x in inputs):
            return None  # under tensor parallelism every input needs the batch, or its layout is refused
        if self._meetings.learning and not any(map(is_marked, inputs)) and not self._has_equal_rows(inputs):
            self._same_for_all_rows.add(layer)
        return self._sharing(layer) if layer in self._same_for_all_rows else None

    def _has_equal_rows(self, inputs: Sequence[Tensor]) -> bool:
        rows = self._meetings.rows
        if rows < 2 or not inputs:
            return False
        return all(x.ndim > 1 and x.shape[0] == rows and bool((x == x[:1]).all()) for x in inputs)

    def _sharing(self, owner: str) -> Callable[[Tensor], SharedValue]:
        rows = self._meetings.rows
        return lambda x: SharedValue(x.expand(rows, *x.shape), owner, self._meetings)

    def _is_sharing(self) -> bool:
        """Whether the program that reads a bare parameter now is the model's training forward, or a part run again."""
        return torch.is_grad_enabled() and (self._in_forward or recomputing())

    def _share_parameter(self, name: str, parameter: Tensor) -> SharedValue:
        """A bare parameter, carried once a row behind a tap."""
        if isinstance(parameter, DTensor):
            raise UnsupportedModelError(
                f"Parameter '{name}' on a module with children is a DTensor in forward (tensor parallelism); move it into "
                "a layer of its own"
            )
        microbatch = self._current
        if recomputing():
            report = self._recomputed(microbatch, name)
        else:
            self._require_forward(name)
            assert microbatch is not None
            microbatch.taps[name] += 1
            for taker in microbatch.takers:
                taker.expect(name)
            report = self._shared_report(microbatch, name)
        with torch._C.DisableTorchFunction():  # no use of the parameter that the watch should look at
            expanded = parameter.detach().expand(self._meetings.rows, *parameter.shape)
        (per_row,) = self._taps.through(NO_CALL, report, [expanded], [])
        return SharedValue(per_row, name, self._meetings)

    def _shared_report(self, microbatch: _Microbatch, name: str) -> Report:
        def report(call: Call, inputs: tuple[Tensor, ...], grads: tuple[Tensor | None, ...]) -> None:
            self._start_recording(microbatch)
            gradient = None
            with exact_arithmetic(self.model.device):
                if grads[0] is not None:
                    self._note_dtypes(microbatch, grads)
                    g_B = grads[0].reshape(microbatch.rows, *(grads[0].shape[1:] or (1,)))
                    gradient = Materialized(g_B.to(accumulate_dtype(g_B.dtype)))
                for taker in microbatch.takers:
                    taker.report(name, gradient)

        return report

    def _recomputed(self, microbatch: _Microbatch | None, layer: str) -> Report:
        """Activation checkpointing calls a layer again: the tap of the first call reports, this one is idle."""
        if microbatch is None or microbatch.taps[layer] == 0:
            raise UnsupportedModelError(
                f"Layer '{layer}' is recomputed in backward, but its forward ran without a graph: reentrant activation "
                "checkpointing hides its gradient from the engine. Use checkpoint(..., use_reentrant=False)"
            )
        return lambda call, inputs, grads: None

    def _enter_backward(self, microbatch: _Microbatch) -> None:
        with self._refusals_poison():
            if microbatch.done:
                raise PrivacyError(
                    "A second backward on one microbatch: its rows would contribute twice. Add the losses and call "
                    "backward once"
                )
            if microbatch is not self._current:
                raise PrivacyError(
                    "backward through an earlier forward: the model was run again since. Run one forward, then its "
                    "backward; use torch.no_grad() for forwards without backward"
                )
        if not microbatch.entered:
            microbatch.entered = True
            self._labels.stop()
            self._poisoned = "the last backward did not finish"
            self._window.close()

    def _start_recording(self, microbatch: _Microbatch) -> None:
        if microbatch.recording and not microbatch.done and microbatch is self._current:
            return
        self._enter_backward(microbatch)
        if not microbatch.recording:
            microbatch.recording = True
            at_end_of_backward(self._finish_backward)
            for report in self._taps.unreached():  # or their groups would wait for the end, longer than on other ranks
                report(NO_CALL, (), (None,))

    @staticmethod
    def _note_dtypes(microbatch: _Microbatch, grads: Sequence[Tensor | None]) -> None:
        dtypes = [grad.dtype for grad in grads if grad is not None]
        microbatch.narrowest = min(microbatch.narrowest, *dtypes, key=lambda dtype: dtype.itemsize)

    def _record(self, microbatch: _Microbatch, layer: str, record: Record) -> None:
        self._start_recording(microbatch)
        module = self.layers[layer]
        names = self._attributes[module]
        gradients: dict[str, PerSampleGradient] = {}
        with exact_arithmetic(self.model.device):
            if any(grad is not None for grad in record.grads):
                record, complete = self.model.localize(layer, module, record)
                layout = self._layouts.of(layer, record, microbatch.rows)
                self._note_dtypes(microbatch, record.grads)
                gradients = per_sample_gradients(module, record.arranged(layout, microbatch.rows), frozenset(names))
                if layout == "merged":
                    gradients = {name: gradient.regroup(microbatch.rows) for name, gradient in gradients.items()}
                gradients = {name: gradient.settle() for name, gradient in complete(gradients).items()}
            for attribute, name in names.items():
                for taker in microbatch.takers:
                    taker.report(name, gradients.get(attribute))

    def _finish_backward(self) -> None:
        microbatch = self._current
        assert microbatch is not None
        with exact_arithmetic(self.model.device):
            if microbatch.norms is not None and self._first_microbatch is not None:
                measured = microbatch.norms.finish()
                self._first_microbatch.measured({name: m.terms.norm_sq for name, m in measured.items()})
                if not microbatch.rehearsal:
                    self.measured = measured
            if microbatch.sums is not None:
                microbatch.sums.finish()
                self._account_rows(microbatch)
        self.model.after_backward()
        microbatch.norms = None  # it holds every record until the garbage collector finds it
        microbatch.done, self._poisoned = True, None
        self._intake.finished()
        self._window.open()
        self._uncompiled.stop()

    def _weigh(self, microbatch: _Microbatch, group: int, terms: NormTerms) -> RowWeights:
        """Clip weights of a group's rows, from their norms."""
        bound = self.bounds[group] * (self.row_bound / self.max_grad_norm)
        rows = row_weights(
            terms,
            microbatch.mask_B,
            bound=bound,
            loss_factor=microbatch.rows if self.privacy.loss_reduction == "mean" else 1,
            numerics=self.privacy.numerics,
            dtype=self.dtype,
            clip_function=self.privacy.clip_function,
            stability=self.privacy.clip_stability,
        )
        dropped_B, norm_sq_B = ~rows.keep_B, rows.norm_B.square()
        if self.privacy.adaptive_bounds is not None:
            within_B = torch.where(rows.keep_B & (rows.norm_B <= bound), 0.5, -0.5)
            self._excess[group] += torch.where(microbatch.mask_B, within_B, 0.0).sum()
        if microbatch.norm_sq_B is not None and microbatch.dropped_B is not None:
            dropped_B, norm_sq_B = dropped_B | microbatch.dropped_B, norm_sq_B + microbatch.norm_sq_B
        microbatch.dropped_B, microbatch.norm_sq_B = dropped_B, norm_sq_B
        return rows

    def _account_rows(self, microbatch: _Microbatch) -> None:
        """What a finished microbatch leaves behind besides its sum."""
        assert microbatch.norm_sq_B is not None and microbatch.dropped_B is not None
        self._norm_B = microbatch.norm_sq_B.sqrt()
        self.nonfinite_rows += (microbatch.mask_B & microbatch.dropped_B).sum()
        self._pending += 1
        self._vouched &= microbatch.vouched

    # -------------------------------------------------------------------------------------------------------- release

    def _release(self) -> None:
        """Noise what is pending and publish it. The counter grows before the first draw and is never taken back."""
        self._check_before_release()
        if not self._checked:
            self._check_independence()
        self.model.finish_accumulate()
        self.steps += 1
        if self._drawn_epoch is not None:
            self._released_epochs.add(self._drawn_epoch)
        try:
            gradients = self._private_gradients()
            for parameter in self.model.parameters:
                self.model.publish(parameter, gradients[parameter.name])
            self._adapt_bounds()
        except BaseException:
            self._poisoned = "a release failed halfway"
            for parameter in self.model.parameters:
                parameter.parameter.grad = None
            raise
        self._pending = 0
        self._intake.released()
        self._warn_unless_vouched()
        grads = {name: p.parameter.grad for name, p in self._parameters.items()}
        self._gate.published({name: grad for name, grad in grads.items() if grad is not None})

    def _adapt_bounds(self) -> None:
        """Move the bounds by the noised shares of rows within them: a part of the release that was just made."""
        options, groups = self.privacy.adaptive_bounds, len(self.groups)
        if options is None:
            return
        excess = self.model.sum_over_data(self._excess).tolist()
        normals = noise.standard_normal(self._bounds_key, release=self.steps, parameter=0, start=0, count=groups)
        first = [group.bound for group in self.groups]
        counts = [self._count_noise * x for x in normals.tolist()]
        self._agree_on_bounds(
            next_bounds(self.bounds, first, excess, counts, self.privacy.expected_batch_size, options)
        )
        self._excess.zero_()

    def _agree_on_bounds(self, bounds: Sequence[float]) -> None:
        """Rank 0's, to the last digit: noise is made for the bounds that every rank clips to."""
        form = f"<{len(self.groups)}d"
        self._set_bounds(struct.unpack(form, self.model.agree(struct.pack(form, *bounds))))

    def _warn_unless_vouched(self) -> None:
        if not self._vouched and not self._warned:
            self._warned = True
            warnings.warn(
                f"No epsilon holds for this run: a release held rows that did not come from engine.loader, as "
                f"sampling='{self.privacy.sampling}' assumes. Use engine.loader, or say with sampling='external_poisson' "
                "that your own loader draws every row independently",
                NoEpsilonWarning,
                stacklevel=5,
            )

    def _check_labels(self) -> None:
        try:
            self._labels.check()
        except PrivacyError:
            self._poisoned = "a loss couples rows"
            raise

    def _check_before_release(self) -> None:
        self._last_release.check()
        self._raise_if_poisoned()
        self._check_labels()
        if self._gate.waiting:
            raise PrivacyError("privatize: a released gradient already waits for its optimizer.step()")
        if not self._pending:
            raise PrivacyError(
                "optimizer.step() without a backward since the last release: there is nothing to release. Run at least "
                "one microbatch (an empty draw still gives one, all padding, from engine.loader)"
            )
        self._intake.check_release()
        if self._budget_is_spent():
            self.discard()
            raise BudgetExceededError(
                f"The budget was fixed at {self.privacy.steps} releases for epsilon={self.privacy.target_epsilon:g}; another "
                "one would exceed it. The sums were discarded; end training here"
            )

    def _budget_is_spent(self) -> bool:
        """Whether one more release would be more than sigma was calibrated for; shuffling counts whole epochs."""
        limit = self.privacy.steps
        if self.privacy.target_epsilon is None or limit is None:
            return False
        if self.privacy.sampling == "shuffle" and self._drawn_epoch not in self._released_epochs:
            return self.steps >= limit or self._epochs() >= -(-limit // self._steps_per_epoch)
        return self.steps >= limit

    def _check_independence(self) -> None:
        """Rerun the first microbatch with some rows exchanged, before anything is released (see `independence`)."""
        first, current = self._first_microbatch, self._current
        if first is None or not first.was_measured:
            return
        if first.loss.asked is False:
            self.discard()
            raise PrivacyError(
                "The loss was not run backward by loss.backward(), so whether it couples rows could not be examined before "
                "the first release; call loss.backward() instead of torch.autograd.backward"
            )
        first.loss.stop()
        rehearsal = _Microbatch(first.rows, torch.ones(first.rows, dtype=torch.bool), False, norms=MeasuredNorms())
        self._current = rehearsal
        self._uncompiled.start()
        try:
            first.run_exchanged()
            told = first.compare(rehearsal.narrowest)
        except BaseException:
            self.discard()
            raise
        self._checked = self._layouts.verified = self.model.any_rank(told)
        self._forget_first_microbatch()
        self._current = current

    def _forget_first_microbatch(self) -> None:
        if self._first_microbatch is not None:
            self._first_microbatch.loss.stop()
            self._first_microbatch = None

    def _private_gradients(self) -> dict[str, Tensor]:
        """``(sum_i w_i G_i + sigma R xi) / expected_batch_size`` of every local shard, flat, in place of the sums.

        The sums' memory goes with the gradients: whoever keeps one of these never sees an un-noised sum in it later.
        """
        out = {
            p.name: p.accumulator.view(-1)
            if p.accumulator.dtype == p.parameter.dtype
            else torch.empty_like(p.accumulator, dtype=p.parameter.dtype)
            for p in self.model.parameters
        }
        segments = [
            Segment(
                accumulator=p.accumulator,
                out=out[p.name],
                parameter=p.index,
                start=p.region.start,
                count=p.region.count,
                columns=p.region.columns,
            )
            for p in self.model.parameters
        ]
        self._last_release = privatize_all_(
            segments,
            key=self._noise_key,
            release=self.steps,
            lattice=self._lattice,
            noise_std=self.gradient_noise_multiplier * self.max_grad_norm,
            divisor=self.privacy.expected_batch_size,
        )
        self.model.give_accumulators_away()
        return out

    def _discard_pending(self) -> None:
        """What ``zero_grad`` does: drop what is pending, if anything is."""
        self._intake.zero_grad()
        if self._pending or self._poisoned or self._gate.waiting:
            self.discard()

    def _raise_if_poisoned(self) -> None:
        if self._poisoned is not None:
            raise PrivacyError(
                f"Nothing was released: {self._poisoned}, so the sums of this logical batch are incomplete. Call "
                "optimizer.zero_grad() or engine.discard() on all ranks and go on with the next logical batch"
            )


def make_private(model: nn.Module, privacy: PrivacyConfig, optimizer: Optimizer | None = None) -> PrivacyEngine:
    """Attach a privacy engine to a model. From here on its gradients are private, whatever ``torch.optim`` steps.

    Args:
        model: on one device; or wrapped by ``FullyShardedDataParallel`` (``use_orig_params=True``); or sharded with
            ``fully_shard`` on a 1-D mesh; or parallelised with ``ColwiseParallel``/``RowwiseParallel`` Linears and
            then sharded with ``fully_shard`` on a 2-D mesh (data, tensor).
        privacy: the mechanism and its budget.
        optimizer: known from the start, its ``zero_grad`` discards a pending batch and its parameters are checked now;
            otherwise both happen at its first step.

    Raises:
        UnsupportedModelError: a trainable parameter is outside every supported layer; all such modules are named.
        ValueError: the way the model is sharded is not supported.
    """
    if not isinstance(privacy, PrivacyConfig):
        raise TypeError(f"make_private: privacy must be a PrivacyConfig, found {type(privacy).__name__}")
    return PrivacyEngine(model, privacy, optimizer)
