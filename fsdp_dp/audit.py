"""`python -m fsdp_dp.audit`: what an auditor can find out about canaries, beside the epsilon that is claimed.

    torchrun --standalone --nproc-per-node=2 -m fsdp_dp.audit privacy=eps3 audit.rows=0 batch_size=1000 steps=1

The configuration is the tree of `fsdp_dp.train`, with `audit` beside it (`--help` lists its options). It ends with 0 if
what is found is consistent with the claim, with 1 if it refutes it, and with 2 over a bad configuration.
"""

from __future__ import annotations

import json
import os
import sys

from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from fsdp_dp.train import refuse, run_command, typed
from fsdp_dp.training.audit_options import AuditConfig
from fsdp_dp.training.config_errors import explain
from fsdp_dp.training.schema import check_world

AUDIT_FILE = "audit.json"


def checked(config: DictConfig) -> AuditConfig:
    """The configuration as the dataclasses of the schema; raises as `train.checked`."""
    audit_config = typed(config, AuditConfig)
    check_world(audit_config, int(os.environ.get("WORLD_SIZE", "1")))
    return audit_config


def run_job(config: DictConfig) -> None:
    """Audit, and end with what was found."""
    try:
        audit_config = checked(config)
        # Imported late: torch takes seconds, and --help or a wrong option should not.
        from fsdp_dp.training.auditing_run import prepare

        job = prepare(audit_config)
    except (ValueError, OmegaConfBaseException) as error:
        refuse(explain(error), "audit")
    from fsdp_dp.training.auditing_run import audit
    from fsdp_dp.training.run_folder import make_folder
    from fsdp_dp.training.world import start_world

    with start_world(audit_config) as world:
        file = make_folder(audit_config) / AUDIT_FILE if world.is_main else None
        result = audit(job, world)
        if file is not None:
            print(result, flush=True)
            file.write_text(json.dumps(result.as_dict(), indent=2) + "\n", encoding="utf-8")
            print(f"  {'written to':<24}{file}", flush=True)
    sys.exit(0 if result.consistent else 1)


def main() -> None:
    """The entry point of `python -m fsdp_dp.audit`."""
    run_command(run_job, "audit", AuditConfig)


if __name__ == "__main__":
    main()
