"""What a run needs on a machine that one does not have: `python -m fsdp_dp.plan`; a plan needs no GPU and one process.

    python -m fsdp_dp.plan model=llama_100b precision=bf16 plan.world_size=512 microbatch_size=1 batch_size=4096

The configuration is the tree of `fsdp_dp.train`, with the machine as `plan` (`--help` lists its options).
"""

from __future__ import annotations

import functools
import math
import os
import sys
from dataclasses import replace

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fsdp_dp.planning.options import PlanConfig
from fsdp_dp.train import EXIT_BAD_CONFIGURATION, config_folder, writable_schema
from fsdp_dp.training.config_errors import explain
from fsdp_dp.training.schema import check_world


def checked(config: DictConfig) -> PlanConfig:
    """The configuration as the dataclasses of the schema, for the planned number of ranks; raises as `train.checked`."""
    known = OmegaConf.merge(writable_schema(PlanConfig), OmegaConf.to_container(config))
    plan_config = OmegaConf.to_object(known)
    assert isinstance(plan_config, PlanConfig)
    check_world(plan_config, plan_config.plan.world_size)
    return plan_config


def plan(config: PlanConfig) -> str:
    """The plan as a page of text."""
    # Imported late: torch takes seconds, and --help or a wrong option should not.
    from fsdp_dp.planning.depth import predict
    from fsdp_dp.planning.report import Answer, table
    from fsdp_dp.planning.search import largest, most_layers
    from fsdp_dp.planning.trace import Step
    from fsdp_dp.training.building import parameter_count

    options = config.plan
    rows_of_a_rank = math.ceil(config.batch_size / (options.world_size // config.sharding.tensor_parallel_size))
    config = replace(config, microbatch_size=min(config.microbatch_size, rows_of_a_rank))
    answers = {}
    for side in options.sides:
        step = Step(
            config=config,
            world_size=options.world_size,
            side=side,
            microbatch_size=config.microbatch_size,
            accumulates=config.microbatch_size < rows_of_a_rank,
            activation_checkpointing=options.activation_checkpointing,
        )
        of_rows = functools.cache(lambda rows, step=step: predict(step.with_rows(rows, rows < rows_of_a_rank)))
        found = None
        if options.search == "microbatch":
            used = lambda rows, of_rows=of_rows: of_rows(rows).peak.total()  # noqa: E731
            found = largest(used, config.microbatch_size, options.usable_bytes, rows_of_a_rank)
        elif options.search == "model":
            found = most_layers(step, options.usable_bytes)
        answers[side] = Answer(trace=of_rows(config.microbatch_size), largest=found)
    return table(config, parameter_count(config.model), rows_of_a_rank, answers)


def run(config: DictConfig) -> None:
    """Check the configuration, then print its plan."""
    print(plan(checked(config)))


def main() -> None:
    """The entry point of `python -m fsdp_dp.plan`."""
    os.environ["HYDRA_FULL_ERROR"] = (
        "1"  # Hydra then raises instead of printing, and `explain` can add what is allowed.
    )
    sys.argv.insert(1, "hydra/help=fsdp_dp_plan")
    ConfigStore.instance().store(name="train_schema", node=writable_schema(PlanConfig))
    try:
        hydra.main(version_base="1.3", config_path=config_folder(), config_name="config")(run)()
    except (ValueError, HydraException, OmegaConfBaseException) as error:
        print(f"fsdp_dp.plan: {explain(error)}", file=sys.stderr, flush=True)
        sys.exit(EXIT_BAD_CONFIGURATION)


if __name__ == "__main__":
    main()
