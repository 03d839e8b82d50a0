"""From a run to plain weights: `python -m fsdp_dp.export RUN OUT.safetensors` (or OUT.pt), for use without this library.

Names and shapes are those of the unsharded model. One process reads it all; no process group and no GPU are needed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from fsdp_dp.checkpoint import alone_without_warning, newest

_MODEL, _AVERAGE = "model.", "average."


def model_weights(checkpoint: Path, *, averaged: bool = False) -> dict[str, Tensor]:
    """The model's state dict of a checkpoint, on the CPU; ``averaged`` over releases, where the run did that.

    Raises:
        FileNotFoundError: there is no checkpoint, or no average in it.
    """
    reader = dcp.FileSystemReader(str(checkpoint))
    stored = reader.read_metadata().state_dict_metadata
    weights = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in stored.items()
        if name.startswith((_MODEL, _AVERAGE) if averaged else _MODEL) and isinstance(entry, TensorStorageMetadata)
    }
    if averaged and not any(name.startswith(_AVERAGE) for name in weights):
        raise FileNotFoundError(
            f"{checkpoint} holds no averaged weights: its run was not started with optimizer.average_decay"
        )
    with alone_without_warning():
        dcp.load(weights, storage_reader=reader, no_dist=True)
    plain = {name.removeprefix(_MODEL): weight for name, weight in weights.items() if name.startswith(_MODEL)}
    return plain | {n.removeprefix(_AVERAGE): weight for n, weight in weights.items() if n.startswith(_AVERAGE)}


def find_checkpoint(run: Path) -> Path:
    """`run` itself where it is a checkpoint, else the newest one of the run. Raises FileNotFoundError."""
    found = run if (run / ".metadata").exists() else newest(run / "checkpoints")
    if found is None:
        raise FileNotFoundError(
            f"{run} holds no checkpoint: expected the folder of a run, or one of its checkpoints/step-*"
        )
    return found


def save_weights(weights: dict[str, Tensor], path: Path) -> None:
    """Write a state dict as safetensors or, under any other ending, with torch.save (load it with weights_only=True).

    What is at ``path`` stays until the new file is whole.
    """
    unfinished = path.with_name(f".unfinished-{path.name}")
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file  # here: only this format needs the package

        save_file(weights, unfinished, metadata={"format": "pt"})
    else:
        torch.save(weights, unfinished)
    unfinished.replace(path)


def main(arguments: list[str] | None = None) -> int:
    """The command line; 1 if there is nothing to export."""
    parser = argparse.ArgumentParser(
        prog="python -m fsdp_dp.export", description="Writes a run's weights as one plain file."
    )
    parser.add_argument("run", type=Path, help="the folder of a run (its newest checkpoint) or of a checkpoint")
    parser.add_argument("out", type=Path, help="OUT.safetensors, or OUT.pt for torch.load")
    parser.add_argument(
        "--average", action="store_true", help="the weights averaged over releases (optimizer.average_decay)"
    )
    asked = parser.parse_args(arguments)
    try:
        checkpoint = find_checkpoint(asked.run)
        weights = model_weights(checkpoint, averaged=asked.average)
        save_weights(weights, asked.out)
    except (FileNotFoundError, ImportError) as error:
        print(f"fsdp_dp.export: {error}", file=sys.stderr)
        return 1
    except (Exception, CheckpointException) as error:  # of whatever reads or writes: pickle, zip, the file system
        cause = str(error).strip().splitlines()[-1:] or [""]
        print(
            f"fsdp_dp.export: could not read {asked.run} or write {asked.out} ({type(error).__name__}: {cause[0]}). If the "
            "checkpoint is damaged, name an older one of the run, checkpoints/step-*",
            file=sys.stderr,
        )
        return 1
    print(f"{asked.out}: {len(weights)} tensors of {checkpoint}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
