"""The same model and rows in a training loop written by hand for speed, in plain PyTorch, as an expert would write it.

All rows lie in memory as tensors. All tables are one `Embedding` with sparse gradients and Adagrad, which keeps a
number for each weight; dense products are few, and in bf16 where the processor has it. It validates nothing, saves
nothing, and knows of one process.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.benchmarks.training_rows import (
    BATCH,
    DIM,
    EXPERT_UNITS,
    EXPERTS,
    IDS,
    NUMBERS,
    TASKS,
    TOWER_UNITS,
    Clock,
    TrainingRows,
)


class TightModel(nn.Module):
    """A mixture of experts on all inputs."""

    def __init__(self, table_rows: int) -> None:
        super().__init__()
        first, second = EXPERT_UNITS
        self.table = nn.Embedding(IDS * table_rows, DIM, sparse=True)
        nn.init.normal_(self.table.weight, 0, 0.01)
        self.offsets = torch.arange(IDS) * table_rows
        self.first = nn.Linear(IDS * DIM + NUMBERS, EXPERTS * first + TASKS * EXPERTS)
        self.second = nn.Parameter(torch.empty(EXPERTS, first, second).uniform_(-(first**-0.5), first**-0.5))
        self.bias = nn.Parameter(torch.zeros(EXPERTS, 1, second))
        self.towers = nn.ModuleList(
            nn.Sequential(nn.Linear(second, TOWER_UNITS[0]), nn.SiLU(), nn.Linear(TOWER_UNITS[0], 1))
            for _ in range(TASKS)
        )

    def forward(self, ids: Tensor, numbers: Tensor) -> Tensor:
        """(B, IDS) and (B, NUMBERS) -> logits (B, TASKS)."""
        inputs = torch.cat([self.table(ids + self.offsets).flatten(1), numbers], 1)
        hidden, gates = self.first(inputs).split([EXPERTS * EXPERT_UNITS[0], TASKS * EXPERTS], 1)
        hidden = functional.silu(hidden).unflatten(1, (EXPERTS, -1)).transpose(0, 1)
        experts = functional.silu(torch.baddbmm(self.bias, hidden, self.second)).transpose(0, 1)
        gated = torch.bmm(gates.unflatten(1, (TASKS, EXPERTS)).softmax(-1).to(experts.dtype), experts)
        return torch.cat([tower(gated[:, task]) for task, tower in enumerate(self.towers)], 1)


def tight(rows: TrainingRows, table_rows: int, bf16: bool, seconds: float) -> float:
    """Rows a second."""
    torch.manual_seed(0)
    model = TightModel(table_rows)
    dense = [parameter for name, parameter in model.named_parameters() if name != "table.weight"]
    optimizers = [torch.optim.Adagrad([model.table.weight], lr=0.05), torch.optim.AdamW(dense, fused=True)]
    data = [torch.from_numpy(each) for each in (rows.ids, rows.numbers, rows.labels)]
    clock = Clock(seconds)
    for index in clock.watch(torch.randperm(len(rows.labels)).split(BATCH)):
        ids, numbers, labels = (each[index] for each in data)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = model(ids, numbers)
        loss = functional.binary_cross_entropy_with_logits(logits.float(), labels)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    return clock.rows_per_s
