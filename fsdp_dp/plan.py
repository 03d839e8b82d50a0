"""What a run needs on a machine that one does not have: `python -m fsdp_dp.plan`; a plan needs no GPU and one process.

    python -m fsdp_dp.plan model=llama_100b precision=bf16 plan.world_size=512 microbatch_size=1 batch_size=4096

The configuration is the tree of `fsdp_dp.train`, with the machine as `plan` (`--help` lists its options).
"""

from __future__ import annotations

import functools
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from fsdp_dp.planning.options import PlanConfig
from fsdp_dp.train import refuse, run_command, typed
from fsdp_dp.training.config_errors import explain
from fsdp_dp.training.schema import check_world

PROCESSES = 2


def checked(config: DictConfig) -> PlanConfig:
    """The configuration as the dataclasses of the schema, for the planned number of ranks; raises as `train.checked`."""
    plan_config = typed(config, PlanConfig)
    check_world(plan_config, plan_config.plan.world_size)
    return plan_config


def plan(config: PlanConfig) -> str:
    """The plan as a page of text; two sides at a time, each in a process of its own."""
    # Imported late: torch takes seconds, and --help or a wrong option should not.
    from fsdp_dp.models.build import parameter_count
    from fsdp_dp.planning.answer import answer, rows_of_a_rank
    from fsdp_dp.planning.report import table

    rows = rows_of_a_rank(config)
    config = replace(config, microbatch_size=min(config.microbatch_size, rows))
    sides = config.plan.sides
    with ProcessPoolExecutor(min(PROCESSES, len(sides)), mp_context=get_context("spawn")) as pool:
        answers = dict(zip(sides, pool.map(functools.partial(answer, config), sides), strict=True))
    return table(config, parameter_count(config.model), rows, answers)


def run(config: DictConfig) -> None:
    """Check the configuration, then print its plan."""
    try:
        plan_config = checked(config)
    except (ValueError, OmegaConfBaseException) as error:
        refuse(explain(error), "plan")
    print(plan(plan_config))


def main() -> None:
    """The entry point of `python -m fsdp_dp.plan`."""
    run_command(run, "plan", PlanConfig)


if __name__ == "__main__":
    main()
