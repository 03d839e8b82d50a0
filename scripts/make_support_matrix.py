"""Writes docs/support.md out of the tests: which models are exact and which are refused, and what became of the peers' holes.

    python scripts/make_support_matrix.py

Models come from the tables that the tests run; behaviours and holes from the first lines of the tests' docstrings.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "support.md"
HOLE = re.compile(r"(?P<peer>\w+) (?P<number>\d+), (?P<here>exact|refused): (?P<what>.*)")


class Hole(NamedTuple):
    peer: str
    number: int
    what: str
    here: str
    test: str


def documented(path: Path) -> Iterator[tuple[str, str]]:
    """Name and first docstring line of every documented test in a file."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            line = (ast.get_docstring(node) or "").split("\n")[0]
            if line:
                yield node.name, line


def peer_holes() -> list[Hole]:
    """In the order of peers and numbers."""
    found = []
    for path in sorted((ROOT / "tests" / "peer_holes").glob("test_*.py")):
        for name, line in documented(path):
            match = HOLE.fullmatch(line)
            if match:
                found.append(Hole(match["peer"], int(match["number"]), match["what"], match["here"], name))
    return sorted(found, key=lambda hole: (("Opacus", "FastDP", "FlashDP").index(hole.peer), hole.number))


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    header = list(header)
    lines = [header, ["---"] * len(header), *map(list, rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def page() -> str:
    sys.path.insert(0, str(ROOT))
    from tests.models.adapters import ADAPTED
    from tests.models.variants import VARIANTS
    from tests.models.zoo import MODELS, REFUSED, architecture

    everywhere = ("exact", "exact", "exact")
    behaviours = [line for _, line in documented(ROOT / "tests" / "models" / "test_behaviour.py")]
    return TEXT.format(
        models=table(
            ("model", "class", "one device", "FSDP1", "FSDP2"),
            ((name, f"`{architecture(MODELS[name])}`", *everywhere) for name in MODELS),
        ),
        refused=table(("model", "what it is told"), ((name, f"`{told}`") for name, (_, told) in REFUSED.items())),
        adapted=table(("part", "one device", "FSDP1", "FSDP2"), ((name, *everywhere) for name in ADAPTED)),
        variants="\n".join(f"- {name}" for name in VARIANTS),
        behaviours="\n".join(f"- {line}" for line in behaviours),
        holes=table(
            ("peer", "", "hole", "here", "test"),
            ((h.peer, str(h.number), h.what, h.here, f"`{h.test}`") for h in peer_holes()),
        ),
    )


TEXT = """\
# What is supported, model by model

This page is made from the tests by `scripts/make_support_matrix.py`; a test compares the two. *Exact* means: one private
update, in float64 and without noise, is what a loop over rows in plain autograd makes it. *Refused* means: an error that
names the parameter or option, before anything is released.

## Hugging Face `transformers`

Unmodified models in small configurations with random weights; rows of different lengths, with padding masks and labels of
-100; on two ranks also with a rank that has no rows. Install with `pip install 'fsdp-dp[hf]'`.

{models}
Refused:

{refused}
ResNet is exact after `fsdp_dp.replace_batch_norm(model)`. Mixtures of experts are exact with
`experts_implementation="batched_mm"`, and with `"eager"` one row a microbatch; `"grouped_mm"`, which `transformers` chooses
by itself, is refused. State-space models are exact as torch computes them, and refused with the kernels of `mamba_ssm` and
`causal_conv1d`, which are given weights inside an operator.

Other ways to use them, each exact on one device:

{variants}

And what else programs do:

{behaviours}

The loss is the user's: `fsdp_dp.per_sample_cross_entropy(logits, labels).mean()`, or `model(**batch,
num_items_in_batch=N).loss` with one number N for the whole run and `loss_reduction="sum"`. For next-token prediction,
`per_sample_cross_entropy(logits[:, :-1], labels[:, 1:])`.

## Recurrent modules of torch

`nn.LSTM`, `nn.GRU` and `nn.RNN`, with layers, directions, projections and packed sequences: exact on one device, under FSDP1
and under FSDP2.

## Parts of a model: `peft`, BiTFiT, frozen layers

Frozen parameters cost no norm, no memory and no noise. What is trained may change between releases
([usage.md](usage.md#saving-and-resuming)).

{adapted}
DoRA is exact on Linears; on embeddings and GPT-2's `Conv1D` it is refused.

## `accelerate` and the `Trainer`

[`scripts/examples/accelerate_fsdp.py`](../scripts/examples/accelerate_fsdp.py) and
[`scripts/examples/hf_trainer.py`](../scripts/examples/hf_trainer.py) run under both versions of accelerate's FSDP plugin;
the tests run them on two ranks and compare a step with the loop over rows.

## Where peers were seen to fail

Opacus 1.6.0, FastDP 2.0.0 (3d5cc56), FlashDP (review snapshot), as measured in November 2026.

{holes}"""


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
