"""One run from start to end: check, start the processes, train, evaluate, save, report."""

from __future__ import annotations

import os
import sys
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import yaml  # type: ignore[import-untyped]
from torch.distributed.elastic.multiprocessing.errors import record

from fsdp_dp.config import PrivacyConfig
from fsdp_dp.data.corpus import Corpus, load_corpus
from fsdp_dp.training import checkpoint
from fsdp_dp.training.budget import plan_budget
from fsdp_dp.training.building import build_engine, build_model, build_optimizer, parameter_count
from fsdp_dp.training.loop import Training, evaluate, train
from fsdp_dp.training.report import Outcome, summarize, write_report
from fsdp_dp.training.schema import TrainConfig
from fsdp_dp.training.world import World, start_world

if TYPE_CHECKING:
    from fsdp_dp.training.metrics import RunLog

EXIT_INTERRUPTED = 130


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A configuration that was checked against its data; `privacy` is None for plain training."""

    config: TrainConfig
    corpus: Corpus
    privacy: PrivacyConfig | None


def prepare(config: TrainConfig) -> Plan:
    """Read the data and settle the privacy mechanism, on each rank for itself, before any process group.

    Raises:
        ValueError: the data is missing or too small, the run directory is taken, or the mechanism does not fit.
    """
    if config.output_dir is not None and (Path(config.output_dir) / "metrics.jsonl").exists():
        raise ValueError(f"output_dir={config.output_dir} already holds a run: choose another, or remove it.")
    corpus = load_corpus(config.data, config.model.block_size)
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


def run(plan: Plan) -> None:
    """Train, evaluate and write the run directory. Every rank calls it."""
    config = plan.config
    with start_world(config) as world:
        folder = Path(world.from_main(make_run_folder(config) if world.is_main else None))
        training = assemble(plan, world, folder)
        started = time.perf_counter()
        steps = train(training)
        # Someone who presses Ctrl-C, or torchrun after it, will not wait for the whole of the held-out text.
        bits = evaluate(training, steps, plan.corpus.held_out.rows) if steps == config.steps else None
        outcome = describe(plan, training, steps, bits, time.perf_counter() - started)
        checkpoint.save(folder / "checkpoint", training.model, training.optimizer, training.engine)
        if training.log is not None:
            publish(outcome, training.log, folder)


def make_run_folder(config: TrainConfig) -> str:
    """Make the run directory, write the configuration into it, and return its absolute path."""
    folder = Path(config.output_dir) if config.output_dir is not None else unused_folder()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(asdict(config), sort_keys=False), encoding="utf-8")
    return str(folder.resolve())


def unused_folder() -> Path:
    """A folder under outputs/ named by the time, with a number where runs start in the same second."""
    name = Path("outputs") / time.strftime("%Y-%m-%d_%H-%M-%S")
    names = (name if i == 0 else name.with_name(f"{name.name}_{i}") for i in range(1000))
    return next(folder for folder in names if not folder.exists())


def assemble(plan: Plan, world: World, folder: Path) -> Training:
    """Build what trains; rank 0 also computes ε by step and opens the log."""
    config = plan.config
    model = build_model(config, world)
    optimizer = build_optimizer(model, config.optimizer)
    engine = build_engine(model, optimizer, plan.privacy)
    budget = log = None
    if world.is_main:
        from fsdp_dp.training.metrics import RunLog

        if plan.privacy is not None and engine is not None:
            budget = plan_budget(plan.privacy, engine.noise_multiplier, config.steps)
        log = RunLog(folder, config.steps)
    return Training(
        config=config, corpus=plan.corpus, world=world, model=model, optimizer=optimizer,
        engine=engine, budget=budget, log=log,
    )  # fmt: skip


def describe(plan: Plan, training: Training, steps: int, bits: float | None, seconds: float) -> Outcome:
    """The run as the report tells it. Every rank calls it; the counts are sums over ranks."""
    world, engine = training.world, training.engine
    nonfinite = 0 if engine is None else world.sum(engine.nonfinite_rows.view(1))[0] * world.data_size / world.size
    return Outcome(
        config=plan.config,
        privacy=plan.privacy,
        corpus=plan.corpus,
        noise_multiplier=None if engine is None else engine.noise_multiplier,
        budget=training.budget,
        steps=steps,
        nonfinite_rows=int(nonfinite),
        held_out_bits=bits,
        parameters=parameter_count(plan.config.model),
        ranks=world.size,
        device=str(world.device),
        seconds=seconds,
    )


def publish(outcome: Outcome, log: RunLog, folder: Path) -> None:
    """On rank 0: the figure, the report, and a few lines on the terminal."""
    from fsdp_dp.training.figure import draw

    log.close()
    draw(log, outcome.corpus.held_out_unigram_bits, folder / "loss_epsilon.png")
    write_report(outcome, folder / "report.md")
    print(summarize(outcome, folder), flush=True)


def run_or_end(plan: Plan) -> None:
    """`run`, or the end of this process with a message; torchrun then ends the other ranks.

    The process leaves without cleaning up, for that would wait for ranks which wait for this one.
    """
    try:
        record(run)(plan)
    except KeyboardInterrupt:
        end("interrupted", EXIT_INTERRUPTED)
    except Exception as error:
        traceback.print_exc()
        end(f"{type(error).__name__}: {error}", 1)


def end(message: str, code: int) -> NoReturn:
    """Say which rank ends and why, and leave at once."""
    print(f"fsdp_dp.train: rank {os.environ.get('RANK', '0')} ended: {message}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)
