"""`engine.summary()`: a line for every kind of layer, with the method that was really used, and labels where it must."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fsdp_dp import make_private
from tests.distributed.backends import privacy_config

WIDTH, VOCABULARY, POSITIONS, DEPTH = 32, 61, 6, 24


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.small = nn.Linear(2, 2, bias=False)
        self.gamma = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(F.gelu(self.up(self.norm(x))))
        return x + self.gamma * self.small(y.unflatten(2, (-1, 2))).flatten(2)


class Gpt(nn.Module):
    """The shape of GPT-2: 24 blocks of equal layers, and a table tied to the head."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.blocks = nn.Embedding(VOCABULARY, WIDTH), nn.ModuleList(Block() for _ in range(DEPTH))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(nn.Sequential(*self.blocks)(self.table(ids))))


def table_of(summary: str) -> dict[str, list[str]]:
    """Cells of the lines of kinds, by layer."""
    lines = [line for line in summary.splitlines() if line.startswith("    ") and line.split()[0].isdigit()]
    cells = [[cell.strip() for cell in line.strip().split("  ") if cell.strip()] for line in lines]
    return {row[1]: row for row in cells}


def test_a_line_for_every_kind_of_layer() -> None:
    torch.manual_seed(0)
    model = Gpt()
    engine = make_private(model, privacy_config(max_grad_norm=1.0))
    before = table_of(engine.summary())
    ids = torch.randint(VOCABULARY, (3, POSITIONS))
    F.cross_entropy(model(ids).transpose(1, 2), ids, reduction="none").mean(1).mean().backward()
    summary = engine.summary()
    table = table_of(summary)

    up, down = table[f"Linear({WIDTH}, {4 * WIDTH})"], table[f"Linear({4 * WIDTH}, {WIDTH})"]
    assert up[0] == down[0] == str(DEPTH)
    elements = f"{DEPTH * 4 * WIDTH * (WIDTH + 1):,}"
    assert up[2:6] == ["weight, bias", elements, "gram + store", f"{POSITIONS * 5 / (4 * WIDTH):.2f}"]
    assert table["Linear(2, 2, bias=False)"][4] == "store"
    tied = table[f"Embedding({VOCABULARY}, {WIDTH})"]
    assert tied[2:5] == ["weight (tied)", f"{VOCABULARY * WIDTH:,}", "gram + rows"]
    norms = table[f"LayerNorm(({WIDTH},), eps=1e-05)"]
    assert norms[0] == str(DEPTH + 1) and norms[4:7] == ["store", "0.00", f"{8 * WIDTH} B"]
    bare = table["parameter of a module with children"]
    assert bare[:4] == [str(DEPTH), "parameter of a module with children", f"{DEPTH * WIDTH}", "store"]
    assert len(table) == 7 and before.keys() == table.keys()
    assert all(row[-1].endswith("%") for row in table.values())
    assert "not private" in summary and len(summary.splitlines()) < 20
    assert "gram (from inner products)" in summary and "recompute" not in summary
    assert max(map(len, summary.splitlines())) <= 120


def test_before_the_first_backward_no_method_is_claimed() -> None:
    engine = make_private(Gpt(), privacy_config(max_grad_norm=1.0))
    assert "gram" not in engine.summary() and "after the first backward" in engine.summary()
