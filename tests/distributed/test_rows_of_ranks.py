"""A rank that had only a row of padding knows from the others where the rows are in what its layers are given."""

from dataclasses import dataclass

import torch

from tests.distributed.backends import BACKENDS, EXPECTED_BATCH_SIZE, Revealed, played, privacy_config
from tests.oracle import CASES, Gradients, clipped_sum, relative_error, row_gradients

BOUND = 0.7


@dataclass(frozen=True, kw_only=True)
class TwoSteps:
    """In the first, the last rank pads an empty share with one row; in the second it has rows. What the second releases."""

    case: str
    backend: str

    def run(self) -> Gradients:
        case, (inputs, targets) = CASES[self.case], CASES[self.case].batch()
        privacy = privacy_config(max_grad_norm=BOUND, loss_reduction="sum")
        model, engine = BACKENDS[self.backend](case.model(), privacy)
        revealed, rank = Revealed(model), engine.model.data_rank
        for step in range(2):
            empty = rank > 0 and step == 0
            numbers = torch.tensor([0]) if empty else torch.arange(3) + 3 * rank * step
            with engine.microbatch(torch.full((len(numbers),), not empty)):
                case.row_losses(model(inputs[numbers]), targets[numbers]).sum().backward()
            released = {n: g.double() * EXPECTED_BATCH_SIZE for n, g in revealed.release().items()}
        engine.detach()
        return released


TASKS = [
    TwoSteps(case=case, backend=backend) for case in ("decoder", "bare parameters") for backend in ("fsdp1", "fsdp2")
]


def test_rows_after_a_row_of_padding() -> None:
    """Seen to fail: the rank refused its first rows, and the other one waited for it."""
    for task, found in played(2, TASKS).items():
        case, (inputs, targets) = CASES[task.case], CASES[task.case].batch()
        gradients = row_gradients(case.model(), (inputs[:6], targets[:6]), case.row_losses)
        assert relative_error(found, clipped_sum(gradients, BOUND)) <= 1e-9, task
