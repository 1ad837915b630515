"""What training reports while it runs."""

from __future__ import annotations

import time

import torch

from mmoe_rec.features.layout import Layout


class Meter:
    """Rows a second, the share of time spent waiting for data (on a CPU, making batches too), and the mean loss per
    task since the last reading.

    note: the same for a progress bar.
    """

    def __init__(self, layout: Layout, world_size: int) -> None:
        self.names = [task.learnt_from for task in layout.tasks]
        self.world_size = world_size
        self.note = ""
        self.start = time.perf_counter()
        self.rows = 0
        self.waited, self.left_out = 0.0, 0.0
        self._clear()

    def _clear(self) -> None:
        # Sums stay on the device until they are read: fetching them every step would make a GPU wait.
        self.losses: torch.Tensor | None = None
        self.counts: torch.Tensor | None = None

    def add(self, rows: int, losses: torch.Tensor, counts: torch.Tensor) -> None:
        """A step of this rank: its rows, and per task the sum of its losses and the observed labels."""
        self.rows += rows * self.world_size
        self.losses = losses if self.losses is None else self.losses + losses
        self.counts = counts if self.counts is None else self.counts + counts

    def leave_out(self, seconds: float) -> None:
        """Time that was spent on something other than training."""
        self.left_out += seconds

    @property
    def seconds(self) -> float:
        """Time spent on training so far."""
        return max(1e-9, time.perf_counter() - self.start - self.left_out)

    @property
    def rows_per_s(self) -> float:
        """Of all ranks."""
        return self.rows / self.seconds

    @property
    def waiting(self) -> float:
        """Share of the time."""
        return self.waited / self.seconds

    def read(self) -> dict[str, float]:
        """Metrics since the last reading; losses are those of this rank's rows."""
        means = self._means()
        losses = "  ".join(f"{name} {mean:.4f}" for name, mean in means.items())
        self.note = f"{self.rows_per_s:,.0f} rows/s  {losses}  waiting {self.waiting:.0%}"
        self._clear()
        return {f"train/{name}.loss": mean for name, mean in means.items()} | {
            "train/rows_per_s": self.rows_per_s,
            "train/waiting_share": self.waiting,
        }

    def _means(self) -> dict[str, float]:
        if self.losses is None or self.counts is None:
            return {}
        pairs = zip(self.names, self.losses.tolist(), self.counts.tolist(), strict=True)
        return {name: total / count for name, total, count in pairs if count > 0}
