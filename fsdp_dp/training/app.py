"""One run from start to end: check, start the processes, train, save, evaluate, report; and the same run, going on."""

from __future__ import annotations

import os
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch.distributed.elastic.multiprocessing.errors import record

from fsdp_dp.averaging import WeightAverage
from fsdp_dp.checkpoint import Checkpoints
from fsdp_dp.config import PrivacyConfig
from fsdp_dp.data.corpus import Corpus, load_corpus
from fsdp_dp.engine import PrivacyEngine
from fsdp_dp.ledger import LEDGER_FILE, Ledger
from fsdp_dp.models.build import parameter_count
from fsdp_dp.second_opinion import cost_of_cap, cross_check
from fsdp_dp.standing import LedgerError, Standing
from fsdp_dp.training.budget import Budget, plan_budget
from fsdp_dp.training.building import build_engine, build_model, build_optimizer
from fsdp_dp.training.fellows import Fellows
from fsdp_dp.training.interrupt import StopRequest, stop_on_signals
from fsdp_dp.training.loop import Training, evaluate, train
from fsdp_dp.training.report import Outcome, summarize, write_report
from fsdp_dp.training.run_folder import CHECKPOINTS, METRICS_FILE, check_folder, last_step, make_folder, write_config
from fsdp_dp.training.schema import TrainConfig
from fsdp_dp.training.shared_folder import check_shared
from fsdp_dp.training.world import World, check_device, start_world

if TYPE_CHECKING:
    from fsdp_dp.training.metrics import RunLog

EXIT_FAILED, EXIT_INTERRUPTED = 1, 130
# "Saved; start me again": sysexits' EX_TEMPFAIL, for whoever sent SIGUSR1.
EXIT_REQUEUE = 75
# What gloo, NCCL and torch's store say when the other end is gone.
OF_LOST_RANKS = (
    "onnection closed by peer",
    "onnection reset by peer",
    "roken pipe",
    "onnection was likely closed",
    "remote process exited",
    "DistNetworkError",
)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A configuration that was checked against its data; `privacy` is None for plain training."""

    config: TrainConfig
    corpus: Corpus
    privacy: PrivacyConfig | None


def prepare(config: TrainConfig) -> Plan:
    """Read the data and settle the privacy mechanism, on each rank for itself, before any process group.

    Raises:
        ValueError: a GPU or the data is missing, the data too small, the run directory taken, or the mechanism unfit.
    """
    check_device(config.device)
    check_folder(config)
    corpus = load_corpus(config.data, config.model)
    if config.batch_size > len(corpus.train):
        raise ValueError(
            f"batch_size must be at most the {len(corpus.train)} training rows, found {config.batch_size}."
        )
    return Plan(config=config, corpus=corpus, privacy=privacy_config(config, len(corpus.train)))


def privacy_config(config: TrainConfig, dataset_size: int) -> PrivacyConfig | None:
    """The mechanism in the library's terms; None with privacy=none."""
    if not config.privacy.private:
        return None
    options = asdict(config.privacy)
    del options["mechanism"]
    clipping = config.clipping
    return PrivacyConfig(
        **options,
        clipping=clipping.groups,
        group_bounds=clipping.bounds,
        clip_function=clipping.clip_function,  # type: ignore[arg-type]
        clip_stability=clipping.stability,
        adaptive_bounds=clipping.adaptive_bounds,
        expected_batch_size=config.batch_size,
        dataset_size=dataset_size,
        steps=config.steps,
        loss_reduction="mean",
    )


def run(plan: Plan) -> int:
    """Train, save, evaluate and write the run directory; the exit code. Every rank calls it."""
    with start_world(plan.config) as world, stop_on_signals() as stop:
        fellows = Fellows(world.store, world.rank)
        with fellows.watched(lambda message: end(f"another rank failed first; {message}", EXIT_FAILED)):
            try:
                return work(plan, world, stop)
            except Exception as error:
                first = fellows.first_failure(explained(error))
                if first is None:
                    raise
                end(f"another rank failed first; {first}", EXIT_FAILED)


def work(plan: Plan, world: World, stop: StopRequest) -> int:
    """`run`, among the other ranks."""
    folder = Path(world.from_main(str(make_folder(plan.config)) if world.is_main else None))
    ledger = Ledger(folder / LEDGER_FILE) if world.is_main else None
    check_shared(folder, world)
    if ledger is not None and plan.privacy is not None:
        check_counted(ledger, last_step(folder))
    training = assemble(plan, world, folder, ledger, stop)
    started = time.perf_counter()
    steps = train(training)
    training.checkpoints.save(steps)
    training.checkpoints.wait()
    if ledger is not None and training.engine is not None:
        ledger.close(training.engine.steps)
    # Someone who stops a run will not wait for all of the held-out rows.
    value = evaluate(training, steps) if steps == plan.config.steps else None
    outcome = describe(plan, training, steps, value, time.perf_counter() - started)
    if training.log is not None:
        publish(outcome, training.log, folder)
    requeued = world.sum(torch.tensor([stop.requeue], dtype=torch.float64))[0]
    return EXIT_REQUEUE if requeued and steps < training.last else 0


def assemble(plan: Plan, world: World, folder: Path, ledger: Ledger | None, stop: StopRequest) -> Training:
    """Build what trains, and bring it to where the run in `folder` was left, if there is one."""
    config = plan.config
    privacy = world.from_main(continued(plan.privacy, ledger) if world.is_main else None)
    model = build_model(config, world)
    optimizer = build_optimizer(model, config.optimizer, config.sharding.strategy)
    engine = build_engine(model, optimizer, privacy)
    ledger = None if engine is None else ledger  # of a plain run, it is no more than the folder's lock
    # This first: on a full disk, what it removes makes room for the ledger's line.
    decay = config.optimizer.average_decay
    average = None if engine is None or decay is None else WeightAverage(engine, decay)
    checkpoints = Checkpoints(folder / CHECKPOINTS, model, optimizer, engine, ledger, average=average)
    budget = commit(plan, engine, ledger)
    saved = checkpoints.load()
    start, last = world.from_main(position(config, engine, ledger, saved))
    log = None
    if world.is_main:
        from fsdp_dp.training.metrics import RunLog

        write_config(config, folder)
        announce(saved, start, config.steps)
        log = RunLog(folder, config.steps, start, plan.corpus.score, config.diagnostics)
    return Training(
        config=config, corpus=plan.corpus, world=world, model=model, optimizer=optimizer, engine=engine, average=average,
        budget=budget, log=log, checkpoints=checkpoints, ledger=ledger, stop=stop, start=start, last=last,
    )  # fmt: skip


def commit(plan: Plan, engine: PrivacyEngine | None, ledger: Ledger | None) -> Budget | None:
    """On rank 0 of a private run: what it may cost, and the line in its ledger that this start begins with."""
    if plan.privacy is None or engine is None or ledger is None:
        return None
    budget = plan_budget(plan.privacy, engine.noise_multiplier, plan.config.steps)
    check_extension(plan.privacy, budget.cap, engine.noise_multiplier)
    ledger.begin(plan.privacy, engine.noise_multiplier, lease=lease(plan.config.checkpoint_every))
    if plan.privacy.max_batch_size is not None:
        print(cost_of_cap(plan.privacy, engine.noise_multiplier, plan.config.steps), flush=True)
    return budget


def check_counted(ledger: Ledger, made: int) -> None:
    """Raise LedgerError where the ledger counts fewer releases than the metrics tell of, which are written after each."""
    if made > ledger.counted:
        raise LedgerError(
            f"{ledger.path} counts {ledger.counted} releases, and {METRICS_FILE} beside it tells of step {made}: the ledger "
            "was cut or replaced. Bring back the ledger of this run; without it, count the whole budget as spent"
        )


def position(
    config: TrainConfig, engine: PrivacyEngine | None, ledger: Ledger | None, saved: dict[str, Any] | None
) -> tuple[int, int]:
    """How many steps count as made, and the last one that may be."""
    start = engine.steps if engine is not None else saved["step"] if saved is not None else 0
    limit = config.steps if ledger is None or ledger.standing is None else min(ledger.standing.limit, config.steps)
    return start, max(start, int(limit))


def continued(privacy: PrivacyConfig | None, ledger: Ledger | None) -> PrivacyConfig | None:
    """The mechanism of the run that the ledger tells of: its noise was calibrated once, for good.

    A noise multiplier that is asked for by number stays as it is: the ledger refuses another than the run's.
    """
    if privacy is None or privacy.noise_multiplier is not None or ledger is None or ledger.standing is None:
        return privacy
    return replace(privacy, noise_multiplier=ledger.standing.mechanism["noise_multiplier"], target_epsilon=None)


def check_extension(privacy: PrivacyConfig, cap: float, noise_multiplier: float) -> None:
    """Raise ValueError where more releases than the noise was calibrated for would cost more than the target says."""
    if privacy.target_epsilon is not None and cap > privacy.target_epsilon:
        raise ValueError(
            f"steps={privacy.steps} releases of this run's noise multiplier {noise_multiplier:.6g}, accounted as a whole, "
            f"cost epsilon {cap:.4g}, more than privacy.target_epsilon={privacy.target_epsilon:g}. To go on all the same, "
            "raise privacy.target_epsilon to that"
        )


def lease(checkpoint_every: int) -> int:
    """Releases reserved with a checkpoint: those up to the next one, and some for a disk that is slow with it."""
    return checkpoint_every + max(1, checkpoint_every // 4)


def announce(saved: dict[str, Any] | None, done: int, steps: int) -> None:
    """Say on the terminal that a run goes on, and from where."""
    if saved is not None or done:
        where = (
            f"the checkpoint of step {saved['step']}" if saved else "the initial weights: there was no checkpoint yet"
        )
        print(f"going on from {where}; {done} of {steps} steps count as made", flush=True)


def describe(plan: Plan, training: Training, steps: int, value: float | None, seconds: float) -> Outcome:
    """The run as the report tells it. Every rank calls it; the counts are sums over ranks."""
    world, engine = training.world, training.engine
    standing = None if training.ledger is None else training.ledger.standing
    nonfinite = 0 if engine is None else world.sum(engine.nonfinite_rows.view(1))[0] * world.data_size / world.size
    return Outcome(
        config=plan.config,
        privacy=as_reported(plan.privacy, standing),
        corpus=plan.corpus,
        noise_multiplier=None if engine is None else engine.noise_multiplier,
        budget=training.budget,
        standing=standing,
        steps=steps,
        nonfinite_rows=int(nonfinite),
        useful_rows=None if training.log is None else training.log.mean("useful_rows"),
        held_out=value,
        parameters=parameter_count(plan.config.model),
        ranks=world.size,
        device=str(world.device),
        seconds=seconds,
    )


def as_reported(privacy: PrivacyConfig | None, standing: Standing | None) -> PrivacyConfig | None:
    """With the seed that this start or an earlier one had: some of the noise is no secret. Which seed, is in no ledger."""
    if privacy is None or privacy.seed is not None or standing is None or not standing.seeded:
        return privacy
    return replace(privacy, seed=0)


def publish(outcome: Outcome, log: RunLog, folder: Path) -> None:
    """On rank 0: the figure, the report, and a few lines on the terminal; then the second opinion on ε.

    Raises:
        AccountingError: two accountants contradict each other. All is saved by then.
    """
    from fsdp_dp.training.figure import draw

    log.close()
    draw(log, outcome.corpus.baseline, folder / "loss_epsilon.png")
    write_report(outcome, folder / "report.md")
    print(summarize(outcome, folder), flush=True)
    if outcome.privacy is not None and outcome.noise_multiplier is not None and outcome.steps == outcome.config.steps:
        print(cross_check(outcome.privacy, outcome.noise_multiplier, outcome.config.steps), flush=True)


def run_or_end(plan: Plan) -> None:
    """`run`, or the end of this process with a message; torchrun then ends the other ranks.

    The process leaves without cleaning up, for that would wait for ranks which wait for this one.
    """
    try:
        code = record(run)(plan)
    except KeyboardInterrupt:
        end("interrupted", EXIT_INTERRUPTED)
    except Exception as error:
        with suppress(OSError):  # the disk that is full may be that of the log
            traceback.print_exc()
        end(explained(error), EXIT_FAILED)
    if code:
        end("saved, to be started again", code)


def explained(error: Exception) -> str:
    """An error in one line, with what was noted on the way and what to do where that is known."""
    text = "; ".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ())])
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in text:
        return f"{text}. Lower microbatch_size, which changes no release, and go on with resume=true"
    if isinstance(error, RuntimeError) and any(words in text for words in OF_LOST_RANKS):
        return f"lost another rank, which was killed or whose machine is gone ({text.splitlines()[0]})"
    return text


def end(message: str, code: int) -> NoReturn:
    """Say which rank ends and why, and leave at once."""
    with suppress(OSError):
        print(f"fsdp_dp.train: rank {os.environ.get('RANK', '0')} ended: {message}", file=sys.stderr, flush=True)
        sys.stdout.flush()
    os._exit(code)
