"""Plain PyTorch's look-up and update of tables, against a loop in float64."""

from typing import Any

import numpy as np
import pytest
import torch

from mmoe_rec.errors import UserError
from mmoe_rec.features.layout import IdInput
from mmoe_rec.model.model_layout import EmbeddingTable, ModelLayout
from mmoe_rec.training.table_backends import SingleProcessTables
from tests.reference.model import adagrad

ROWS = [7, 90, 30, 1]
TABLE_OF = [0, 1, 2, 1, 3]  # one table is shared by two inputs
WIDTHS = {"equal": [8, 8, 8, 8], "mixed": [4, 12, 16, 12], "all different": [4, 8, 16, 20]}
RATES = [0.05, 0.5, 0.01]


def random_bags(random: np.random.Generator, batch: int, longest: int) -> list[list[list[int]]]:
    """Of each input, the ids of each row of a batch: 0 to `longest`, many of them the same; one each if it is 0."""
    bags = []
    for most in (ROWS[table] for table in TABLE_OF):
        lengths = random.integers(0, longest + 1, batch) if longest else np.ones(batch, np.int64)
        bags.append([np.minimum(random.geometric(0.1, length) - 1, most - 1).tolist() for length in lengths])
    return bags


def flat(bags: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The ids, key-major, and the offsets at which each row's begin."""
    lengths = [len(row) for rows in bags for row in rows]
    ids = torch.tensor([item for rows in bags for row in rows for item in row], dtype=torch.int64)
    return ids, torch.tensor([0, *np.cumsum(lengths, dtype=int).tolist()])


class Tables:
    """Tables with random weights, and the same as a reference."""

    def __init__(self, widths: list[int], seed: int) -> None:
        random = np.random.default_rng(seed)
        tables = tuple(EmbeddingTable(f"t{t}", ROWS[t], dim=width) for t, width in enumerate(widths))
        ids = tuple(IdInput(f"input{number}", f"t{t}", is_list=True) for number, t in enumerate(TABLE_OF))
        self.tables = SingleProcessTables(ModelLayout(tables, ids, (), ()))
        for weight in self.weights():
            weight.copy_(torch.from_numpy(random.normal(size=weight.shape)))
        self.reference = [item.double().clone().requires_grad_() for item in self.weights()]
        self.reference_momentum = [torch.zeros(rows, dtype=torch.float64) for rows in ROWS]

    def weights(self) -> list[torch.Tensor]:
        return [self.tables.state_dict()[f"embedding_bags.t{t}.weight"] for t in range(len(ROWS))]

    def momentum(self) -> list[torch.Tensor]:
        return [self.tables.momentum[f"t{t}"] for t in range(len(ROWS))]

    def look_up(self, bags: Any) -> torch.Tensor:
        """By the code that is tested."""
        return self.tables.look_up(*flat(bags))

    def expected(self, bags: Any) -> torch.Tensor:
        """By the reference: sums of rows."""
        inputs = zip(TABLE_OF, bags, strict=True)
        return torch.cat([torch.stack([self.reference[t][ids].sum(0) for ids in rows]) for t, rows in inputs], 1)

    def update_reference(self) -> None:
        """A step of row-wise Adagrad."""
        for table, momentum in zip(self.reference, self.reference_momentum, strict=True):
            assert table.grad is not None
            adagrad(table.data, momentum, table.grad, self.tables.rate.item())
            table.grad = None


@pytest.mark.parametrize("longest", [0, 1, 6])
@pytest.mark.parametrize("widths", WIDTHS)
def test_many_steps_equal_a_loop_over_rows(longest: int, widths: str) -> None:
    """Ids repeated within a row and between rows and inputs, rows without ids, and rates that change."""
    tables = Tables(WIDTHS[widths], seed=longest)
    random = np.random.default_rng(longest)
    for step in range(12):
        bags = random_bags(random, batch=1 + 5 * step, longest=longest)
        pooled = tables.look_up(bags)
        expected = tables.expected(bags)
        torch.testing.assert_close(pooled.double(), expected, atol=1e-4, rtol=1e-4)
        gradient = torch.randn(pooled.shape)
        tables.tables.rate.fill_(RATES[step % 3])
        pooled.backward(gradient)
        expected.backward(gradient.double())
        tables.update_reference()
    for ours, theirs in ((tables.weights(), tables.reference), (tables.momentum(), tables.reference_momentum)):
        for first, second in zip(ours, theirs, strict=True):
            torch.testing.assert_close(first.double(), second.detach(), atol=1e-4, rtol=1e-4)


def test_rows_that_were_not_looked_up_keep_every_bit() -> None:
    tables = Tables([8, 8, 8, 8], seed=0)
    before = [weight.clone() for weight in tables.weights()]
    tables.tables.rate.fill_(0.1)
    tables.look_up([[[1, 1]], [[3]], [[]], [[3, 5]], [[]]]).sum().backward()
    changed = [
        (first != second).any(1).nonzero().view(-1).tolist()
        for first, second in zip(tables.weights(), before, strict=True)
    ]
    assert changed == [[1], [3, 5], [], []]


@pytest.mark.parametrize("bags", [[[], [], [], [], []], [[[], []]] * 5], ids=["no rows", "no ids"])
def test_nothing_to_look_up(bags: Any) -> None:
    tables = Tables([4, 12, 16, 12], seed=0)
    before = [weight.clone() for weight in tables.weights()]
    pooled = tables.look_up(bags)
    assert pooled.shape == (len(bags[0]), 4 + 12 + 16 + 12 + 12)
    assert not pooled.any()
    pooled.sum().backward()
    assert all(map(torch.equal, tables.weights(), before))


@pytest.mark.parametrize("threads", [1, 2])
def test_a_step_is_the_same_to_the_last_bit_whatever_the_threads(threads: int) -> None:
    def trained(used: int) -> list[torch.Tensor]:
        before = torch.get_num_threads()
        torch.set_num_threads(used)
        try:
            tables = Tables([8, 8, 8, 8], seed=1)
            random = np.random.default_rng(1)
            generator = torch.Generator().manual_seed(1)
            tables.tables.rate.fill_(0.1)
            for _ in range(3):
                pooled = tables.look_up(random_bags(random, 3000, 3))
                pooled.backward(torch.randn(pooled.shape, generator=generator))
            return tables.weights()
        finally:
            torch.set_num_threads(before)

    assert all(map(torch.equal, trained(threads), trained(1)))


@pytest.mark.parametrize("wrong", [-1, 30])
@pytest.mark.parametrize("longest", [0, 4])
def test_a_row_that_a_table_does_not_have_is_named(wrong: int, longest: int) -> None:
    tables = Tables([4, 4, 4, 4], seed=0)
    bags = random_bags(np.random.default_rng(0), 9, longest)
    bags[2][4] = [wrong]
    with pytest.raises(UserError, match=rf"table 't2' has 30 rows, but row {wrong} was looked up"):
        tables.look_up(bags)
