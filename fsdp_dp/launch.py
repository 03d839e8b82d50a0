"""torchrun for batch jobs: `python -m fsdp_dp.launch [torchrun's options] -m fsdp_dp.train [overrides]`.

A scheduler that tells a job to save itself signals every process of it. The ranks handle SIGUSR1 (save, then exit with
EX_TEMPFAIL, 75); torchrun's agent, which starts them, would die of it and take them along. Here it ignores the signal and
hands on what the ranks say: 75 if they ask to be started again; 2 if one has said what is wrong with its options, which
torchrun would bury under its own traceback; torchrun's own exit status otherwise. Where the launcher itself was
signalled (Ctrl-C), it is 128 and the signal's number, as a shell's, without a traceback under what the ranks said last.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

BAD_CONFIGURATION = 2  # of `fsdp_dp.train`, and of argparse


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status. Ranks inherit that the signal is ignored, until they install their own handler."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        torchrun(list(sys.argv[1:] if arguments is None else arguments))
    except ChildFailedError as error:
        said = {failure.exitcode for failure in error.failures.values()}
        for status in (os.EX_TEMPFAIL, BAD_CONFIGURATION):
            if status in said:
                return status
        raise
    except SignalException as signalled:  # torchrun has passed it on, and waited for the ranks
        return 128 + signalled.sigval
    return 0


if __name__ == "__main__":
    sys.exit(main())
