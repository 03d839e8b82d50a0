"""One private step, from the recorded microbatch to the released gradient. This page is the heart of the library.

    forward    the freeze window closes, layers are tapped                                       [recorder, taps]
    backward   each tap turns (a, g) into a per-sample gradient in factored form                 [recorder, layers, gradients]
    its end    norms -> (summed over ranks that split a row) -> weights -> weighted sums,
               unit by unit, reduce-scattered into float32 accumulators on the local shard       [clipped_sum, sharding]
    step       the release number grows, lattice noise is added, ``p.grad`` is published         [noise]

The engine decides what is released, and when; `logical_batch` says what is pending, `bounds` what a row may weigh,
`releases` what epsilon is, and `examination` refuses models and losses that couple rows.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer
from torch.utils._pytree import tree_leaves

from fsdp_dp.agreement import noise_multiplier, what_ranks_share
from fsdp_dp.bounds import Bounds
from fsdp_dp.clipped_sum import ClippedSum, ClippingPlan
from fsdp_dp.clipping import RowWeights, row_weights
from fsdp_dp.compiled import as_written
from fsdp_dp.config import PrivacyConfig, require_number
from fsdp_dp.coverage import (
    mark_attached,
    refuse_attached,
    refuse_strangers,
    refuse_trainable_inputs,
    refuse_training_batch_norm,
    tapped_layers,
    unmark_attached,
)
from fsdp_dp.errors import BudgetExceededError, PrivacyError, UnsupportedModelError
from fsdp_dp.examination import Examination
from fsdp_dp.groups import Place, blocks_of_units, clipping_groups
from fsdp_dp.guards import Mechanism, ReleaseGuard
from fsdp_dp.kernels.release import Segment, Verdict, privatize_all_
from fsdp_dp.keys import Keys
from fsdp_dp.logical_batch import LogicalBatch, Microbatch
from fsdp_dp.methods import Measured
from fsdp_dp.norm_terms import TermsOfGroups
from fsdp_dp.optimizer_gate import OptimizerGate
from fsdp_dp.recorder import Recorder
from fsdp_dp.releases import Releases
from fsdp_dp.sampling import LogicalBatchLoader
from fsdp_dp.sharding import open_model
from fsdp_dp.side_stream import to_device
from fsdp_dp.summary import describe
from fsdp_dp.taps import recomputing


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
        layers: canonical name -> module, of the layers that are tapped.
        groups: the clipping groups.
        guard: looks at releases before they are published (see `guards`).
        nonfinite_rows: int64 scalar, rows of this rank zeroed because their gradient was not finite. Not private.
    """

    def __init__(
        self, model: nn.Module, privacy: PrivacyConfig, optimizer: Optimizer | None = None, *, alone: bool = False
    ) -> None:
        self._privacy = privacy
        refuse_attached(model)
        self.model = open_model(model, alone=alone)
        self.model.refuse_differences("make_private", what_ranks_share(self.model, privacy))
        self.layers, bare = tapped_layers(self.model)
        self.bare_parameters = [p.name for p in bare]
        self._batch_norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self.dtype = self.model.parameters[0].accumulator.dtype
        self._noise_multiplier = noise_multiplier(self.model, privacy)
        self.groups = clipping_groups(
            self._places(),
            clipping=privacy.clipping,
            bounds=privacy.group_bounds,
            max_grad_norm=privacy.max_grad_norm,
        )
        self._plan = ClippingPlan(self.model, self.groups)
        if self._plan.streams:
            self.model.dedicate_groups()
        self._bounds = Bounds(self.model, self.groups, privacy, self.noise_multiplier, self.dtype)
        self._releases = Releases(privacy, self.noise_multiplier, model)
        self.guard = ReleaseGuard(self.model, privacy, self.noise_multiplier)
        self._new_keys()

        self._handles = {p.name: p.parameter for p in self.model.parameters}
        self._batch = LogicalBatch()
        self._norm_B: Tensor | None = None
        self._last_release = Verdict()
        self.nonfinite_rows = torch.zeros((), dtype=torch.int64, device=self.model.device)

        self._recorder = Recorder(
            self.model, self.layers, bare, self._plan.brief, self._batch, self._enter_backward, self._finish_backward
        )
        self._examination = Examination(self.model, self._batch, self._recorder)
        self._gate = OptimizerGate(self._handles, self._release, self._discard_pending)
        self._gate.adopt_zero_grad(model)
        if optimizer is not None:
            self._gate.adopt(optimizer)
        self._hooks = [
            model.register_forward_pre_hook(self._as_written(self._before_forward), prepend=True, with_kwargs=True),
            model.register_forward_hook(self._as_written(self._after_forward), with_kwargs=True, always_call=True),
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
        return self._releases.epsilon(delta)

    @property
    def privacy(self) -> PrivacyConfig:
        """The configuration, which stays what noise was calibrated for."""
        return self._privacy

    @property
    def noise_multiplier(self) -> float:
        """sigma, given or calibrated; what is accounted."""
        return self._noise_multiplier

    @property
    def steps(self) -> int:
        """Releases so far."""
        return self._releases.number

    @property
    def seeded(self) -> bool:
        """Whether some releases drew their noise from a fixed seed, so that there is no guarantee."""
        return self._releases.seeded

    @property
    def bounds(self) -> tuple[float, ...]:
        """R_k: the bound of each clipping group, now."""
        return self._bounds.of_groups

    @property
    def max_grad_norm(self) -> float:
        """R: the bound of all groups together, now."""
        return self._bounds.max_grad_norm

    @property
    def row_bound(self) -> float:
        """What a row's gradient may weigh as computed: R less what rounding may add."""
        return self._bounds.for_a_row

    @property
    def gradient_noise_multiplier(self) -> float:
        """sigma_g: sigma, or more where adaptive bounds have a share in the release."""
        return self._bounds.gradient_noise_multiplier

    @property
    def measured(self) -> dict[str, Measured]:
        """Parameter -> how its gradients were measured, in the first microbatch. Not private."""
        return self._examination.measured

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

        To be called on all ranks alike; where ranks differ in an option, all raise ValueError.

        Args:
            dataset: map-style, of length ``privacy.dataset_size``.
            microbatch_size: rows of a microbatch on one rank, padding included.
            steps: logical batches; default what was left of ``privacy.steps`` when the run was resumed, endless if that is
                None.
            dataloader_kwargs: for torch's ``DataLoader`` (``num_workers``, ``collate_fn``, ...).
        """
        number = self._releases.loaders
        if steps is None and self.privacy.steps is not None:
            steps = max(0, self.privacy.steps - self._releases.before_load)
        given = {"the number of loaders so far": number, "microbatch_size": microbatch_size, "steps": steps}
        self.model.refuse_differences("engine.loader", given)
        self._releases.add_loader()
        return LogicalBatchLoader(
            dataset,
            privacy=self.privacy,
            key=self._keys.of_loader(number),
            microbatch_size=microbatch_size,
            steps=steps,
            rank=self.model.data_rank,
            world_size=self.model.data_size,
            on_logical_batch=lambda: self._start_logical_batch(number),
            on_microbatch=lambda mask_B: self._batch.intake.take(mask_B, number),
            on_logical_batch_end=lambda: self._batch.intake.end_logical_batch(number),
            dataloader_kwargs=dataloader_kwargs,
        )

    @contextmanager
    def microbatch(self, mask: Tensor) -> Iterator[None]:
        """Run one forward and backward of your own loader's microbatch; ``mask`` ``[B]`` is False for padding rows."""
        self._batch.raise_if_poisoned()
        self._batch.intake.open_block(mask)
        try:
            yield
            self._batch.intake.close_block()
        except BaseException:
            self._batch.poison("an exception ended a microbatch")
            raise

    def discard(self) -> None:
        """Drop everything since the last release: sums, records and released gradients that no step has used.

        To be called on all ranks alike.
        """
        self._recorder.discard()
        self._examination.discard()
        self._gate.clear()
        self.model.zero_accumulators()
        self._batch.discard()
        self._bounds.discard_counts()
        self.guard.rows.zero_()

    def set_max_grad_norm(self, max_grad_norm: float) -> None:
        """Bound rows by another R from the next logical batch on; groups keep their shares, and the noise is sigma R.

        Epsilon knows sigma alone, and stays. R must come from what is public: the number of the release, a released weight.
        For one that follows the norms there is ``adaptive_bounds``. It is no part of `state_dict`: set it again after a load.
        To be called on all ranks alike.

        Raises:
            ValueError: it is not a finite number above 0, or ranks differ.
            PrivacyError: some rows of a logical batch are clipped already, or bounds are adaptive.
            UnsupportedModelError: the noise lattice is too coarse for it.
        """
        require_number("max_grad_norm", max_grad_norm, above=0.0)
        self.model.refuse_differences("engine.set_max_grad_norm", {"max_grad_norm": float(max_grad_norm)})
        if self.privacy.adaptive_bounds is not None:
            raise PrivacyError(
                "set_max_grad_norm: adaptive_bounds move the bounds by themselves; leave one of the two out"
            )
        current = self._recorder.current
        if self._batch.pending or (current is not None and current.entered and not current.done):
            raise PrivacyError(
                "set_max_grad_norm within a logical batch, some of whose rows are clipped to the bound so far: call it "
                "before the first microbatch, or after the release"
            )
        self._bounds.scale(float(max_grad_norm))
        self.guard.asked_bound = float(max_grad_norm)

    def privatize(self) -> None:
        """Release now: every managed ``.grad`` becomes its private gradient, which the next step uses as it is."""
        self._release()

    def summary(self) -> str:
        """A readable account of the mechanism, the model's layers and what is communicated."""
        return describe(self)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: counts and the mechanism. Nothing secret, and nothing un-noised."""
        self._last_release.check()
        bounds = {group.name: bound for group, bound in zip(self.groups, self.bounds, strict=True)}
        return {**self._releases.state(), "bounds": bounds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue counting where ``state`` ended. Draws fresh keys, so no noise repeats. Call on all ranks.

        The larger of both counts is kept, which is right for an earlier or later state of the *same* run; states of
        separate runs on one dataset do not add up here: account those together, as one run with all their releases.

        Raises:
            PrivacyError: the mechanism differs, so that the releases could not be accounted together.
        """
        missing = sorted(self.state_dict().keys() - state.keys())
        if missing:
            raise PrivacyError(
                f"load_state_dict: this is not the state of a privacy engine (no {missing[0]!r} in it); pass what "
                "engine.state_dict() returned"
            )
        self._releases.check(state)
        bounds = self._bounds.saved(state["bounds"], [group.name for group in self.groups])
        self.discard()
        self._releases.load(state)
        self._bounds.agree_on(bounds)
        self._new_keys()

    def detach(self) -> None:
        """Give the model back as it was. Un-released sums are dropped; the engine cannot be used any more."""
        self.discard()
        self._releases.leave()
        self._batch.poison("the engine was detached from its model")
        self._recorder.remove()
        self._gate.remove()
        unmark_attached(self.layers.values())
        for hook in self._hooks:
            hook.remove()
        if getattr(self.model.root, "privacy_engine", None) is self:
            self.model.root.privacy_engine = None  # type: ignore[assignment]

    def _as_written(self, method: Any) -> MethodType:
        """Left alone by the compiler, and still a method: a copy of what it hooks on leads to a copy of the engine."""
        return MethodType(as_written(method.__func__), self)

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
        return self._releases.vouched

    @property
    def rows_are_independent(self) -> bool:
        """Whether the check before the first release saw that no row's gradient depends on another (see `independence`)."""
        return self._examination.passed

    # ------------------------------------------------------------------------------------------------- attachment

    def _new_keys(self) -> None:
        """For an attachment or a load."""
        self._keys = Keys(self.model, self.privacy.seed, after=self.steps)
        self.guard.restart(self._keys.noise, self.seeded)

    def _places(self) -> list[Place]:
        """The managed parameters in the order in which the model registers them, with their blocks."""
        attributes: dict[nn.Module, list[str]] = {}
        for module, attribute in self.model.names:
            attributes.setdefault(module, []).append(attribute)
        sites = [self.model.names[m, a] for m in self.model.root.modules() for a in attributes.get(m, [])]
        parameters = {p.name: p for p in self.model.parameters}
        block_of = blocks_of_units({p.name: p.unit for p in self.model.parameters})
        return [Place(name=n, block=block_of[n], numel=parameters[n].numel) for n in dict.fromkeys(sites)]

    # --------------------------------------------------------------------------------------------- forward, backward

    def _start_logical_batch(self, loader: int) -> None:
        if self._batch.pending:
            raise PrivacyError(
                "A new logical batch starts while the sums of the last one are not released: call optimizer.step() "
                "after every logical batch, or engine.discard() on all ranks to drop it"
            )
        self._releases.draw(loader)
        self._batch.intake.start_logical_batch(loader)

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.is_grad_enabled() or recomputing():
            return
        with self._batch.refusals_poison():
            self.model.prepare_forward()
            microbatch = self._recorder.current
            if microbatch is None or not microbatch.rehearsal or microbatch.entered:
                self._check_before_forward()
                self._examination.check_arguments(kwargs)
                microbatch = self._next_microbatch(args, kwargs)
            self._recorder.start_forward(microbatch)
            self._examination.start_forward(microbatch, args, kwargs)

    def _check_before_forward(self) -> None:
        self._batch.raise_if_poisoned()
        refuse_training_batch_norm(self._batch_norms)
        refuse_strangers(self.model)
        if self._gate.waiting:
            raise PrivacyError(
                "A new forward starts while a released gradient waits for its optimizer.step(); call step() (or "
                "engine.discard() on all ranks) first"
            )
        self._gate.clear()

    def _next_microbatch(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Microbatch:
        """Pair the mask that travels with the microbatch with the rows that the model is given."""
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        refuse_trainable_inputs(given)
        tensors = [x for x in given if x.ndim]
        rows = tensors[0].shape[0] if tensors else 0
        if rows == 0:
            raise PrivacyError(
                "The model was called without a row (no tensor input, or a first dimension of 0). Pad an empty "
                "microbatch with one row and mask it: with engine.microbatch(torch.tensor([False]))"
            )
        intake = self._batch.intake
        longest = max(x.shape[0] for x in tensors)
        if longest > rows == 1 and intake.source == "free":
            raise PrivacyError(
                f"The model's first input has one row and another one {longest}, so how many rows there are cannot be "
                "told: give the input that has the rows first, or run this in a `with engine.microbatch(mask)` block"
            )
        mask, from_loader = intake.next_mask(rows, pending=self._batch.pending > 0)
        vouched = from_loader or self.privacy.sampling == "external_poisson"
        microbatch = Microbatch(rows, to_device(mask.to(torch.bool), self.model.device), vouched)
        microbatch.sums = ClippedSum(self._plan, rows, lambda groups, terms: self._weigh(microbatch, groups, terms))
        return microbatch

    def _after_forward(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """The outputs behind a boundary; the freeze window is open until backward comes back there."""
        recorder, failed = self._recorder, output is None
        if not recorder.in_forward or recomputing():
            return None
        try:
            self._examination.end_forward(failed=failed)
            if not failed:
                recorder.window.refuse_written("forward")
        except UnsupportedModelError:
            self._batch.poison("the model is not supported")
            raise
        finally:
            recorder.end_forward()
        if failed:
            self._batch.poison("a forward raised an exception")
            return None
        assert recorder.current is not None
        self.model.after_forward()
        return self._examination.bounded(recorder.current, output)

    def _enter_backward(self) -> None:
        self._examination.entered_backward()

    def _finish_backward(self, microbatch: Microbatch) -> None:
        self._examination.finished_backward(microbatch)
        if microbatch.sums is not None:
            microbatch.sums.finish()
            self._account_rows(microbatch)

    def _weigh(self, microbatch: Microbatch, groups: Sequence[int], terms: TermsOfGroups) -> RowWeights:
        """Clip weights ``[K, B]`` of some groups' rows, from their norms."""
        bounds = [self._bounds.of_row_in(group) for group in groups]
        rows = row_weights(
            terms,
            microbatch.mask_B,
            bound=bounds,
            loss_factor=microbatch.rows if self.privacy.loss_reduction == "mean" else 1,
            numerics=self.privacy.numerics,
            dtype=self.dtype,
            clip_function=self.privacy.clip_function,
            stability=self.privacy.clip_stability,
            totals=microbatch.totals,
        )
        self._bounds.count(groups, rows, microbatch.mask_B, bounds)
        return rows

    def _account_rows(self, microbatch: Microbatch) -> None:
        """What a finished microbatch leaves behind besides its sum."""
        totals = microbatch.totals
        self._norm_B = totals.norm_sq_B.sqrt()
        self.nonfinite_rows += (microbatch.mask_B & totals.dropped_B).sum()
        self._batch.pending += 1
        self.guard.count(microbatch.mask_B, microbatch.vouched)
        self._releases.vouched &= microbatch.vouched

    # -------------------------------------------------------------------------------------------------------- release

    def _release(self) -> None:
        """Noise what is pending and publish it. The counter grows before the first draw and is never taken back."""
        self._check_before_release()
        self._examine_first_microbatch()
        number = self._releases.begin()
        try:
            gradients = self._private_gradients(number)
            for parameter in self.model.parameters:
                self.model.publish(parameter, gradients[parameter.name])
            self._bounds.adapt(self._keys.bounds, number)
        except BaseException:
            self._batch.poison("a release failed halfway")
            for parameter in self.model.parameters:
                parameter.parameter.grad = None
            raise
        self._batch.released()
        self._examination.released()
        self._releases.warn_unless_vouched(stacklevel=5)
        grads = {name: parameter.grad for name, parameter in self._handles.items()}
        self._gate.published({name: grad for name, grad in grads.items() if grad is not None})

    def _check_before_release(self) -> None:
        self._keys.refuse_fork()
        self._last_release.check()
        self._batch.raise_if_poisoned()
        self._recorder.window.refuse_hooks()
        self.model.prepare_forward()
        refuse_strangers(self.model)
        self._examination.check_labels()
        if self._gate.waiting:
            raise PrivacyError("privatize: a released gradient already waits for its optimizer.step()")
        if not self._batch.pending:
            raise PrivacyError(
                "optimizer.step() without a backward since the last release: there is nothing to release. Run at least "
                "one microbatch (an empty draw still gives one, all padding, from engine.loader)"
            )
        self._batch.intake.check_release()
        if self._releases.is_budget_spent():
            self.discard()
            raise BudgetExceededError(
                f"The budget was fixed at {self.privacy.steps} releases for epsilon={self.privacy.target_epsilon:g}; another "
                "one would exceed it. The sums were discarded; end training here"
            )

    def _examine_first_microbatch(self) -> None:
        if self._examination.passed:
            return
        try:
            self._examination.check_first_microbatch()
        except BaseException:
            self.discard()
            raise

    def _private_gradients(self, release: int) -> dict[str, Tensor]:
        """``(sum_i w_i G_i + sigma R xi) / expected_batch_size`` of every local shard, flat, in place of the sums.

        The sums' memory goes with the gradients: whoever keeps one of these never sees an un-noised sum in it later.
        """
        mechanism = Mechanism(
            key=self._keys.noise,
            release=release,
            lattice=self._bounds.lattice,
            noise_std=self.gradient_noise_multiplier * self.max_grad_norm,
            divisor=self.privacy.expected_batch_size,
        )
        certified = self.privacy.numerics == "certified"
        watched = self.guard.before(self.max_grad_norm if certified else math.inf)
        segments: dict[str, Segment] = {}
        parts = self._segments(segments)
        self._last_release = privatize_all_(next(parts), **vars(mechanism), later=parts)
        self.guard.after([segments[p.name] for p in self.model.parameters], watched, mechanism)
        self.model.give_accumulators_away()
        return {name: segment.out for name, segment in segments.items()}

    def _segments(self, made: dict[str, Segment]) -> Iterator[list[Segment]]:
        """What is released of every parameter, also put into ``made``; in parts, as their sums are complete."""
        for parameters in self.model.accumulated():
            for p in parameters:
                whole = p.accumulator.dtype == p.parameter.dtype
                made[p.name] = Segment(
                    accumulator=p.accumulator,
                    out=p.accumulator.view(-1) if whole else torch.empty_like(p.accumulator, dtype=p.parameter.dtype),
                    parameter=p.index,
                    start=p.region.start,
                    count=p.region.count,
                    columns=p.region.columns,
                )
            yield [made[p.name] for p in parameters]

    def _discard_pending(self) -> None:
        """What ``zero_grad`` does: drop what is pending, if anything is."""
        self._batch.intake.zero_grad()
        interrupted = self._recorder.in_forward  # no hook was called at its end
        if self._batch.pending or self._batch.poisoned or self._gate.waiting or interrupted:
            self.discard()


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
        ValueError: the way the model is sharded is not supported, or ranks differ in an option or in what is trainable.
    """
    if not isinstance(privacy, PrivacyConfig):
        raise TypeError(f"make_private: privacy must be a PrivacyConfig, found {type(privacy).__name__}")
    return PrivacyEngine(model, privacy, optimizer)
