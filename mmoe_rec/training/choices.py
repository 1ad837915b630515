"""The choices of a training, and what was measured for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from mmoe_rec.model.multiply import Products
    from mmoe_rec.training.ways import Way

Precision = Literal["fp32", "bf16"]
Compute = Literal["auto", "dense", "grouped"]


@dataclass(frozen=True)
class Choices:
    """What a training computes with.

    precision: of products; tables: the way in which tables are looked up and updated; experts: `auto` goes by the share
    of experts in use; threads: of each process, for what torch computes, 0 where they do not matter (on a GPU);
    products: the library that multiplies fp32 matrices on a CPU; measured: what was chosen by measurement -> option ->
    milliseconds, of the slowest rank.
    """

    precision: Precision
    tables: Way
    experts: Compute
    threads: int
    products: Products = "blas"
    measured: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return asdict(self)

    @staticmethod
    def from_dict(tree: Mapping[str, Any]) -> Choices:
        """What `to_dict` gave. Raises TypeError for anything else."""
        return Choices(**tree)

    def __str__(self) -> str:
        parts = [f"{self.precision}{self._against('precision', self.precision)}"]
        if self.products != "blas" or (self.precision == "fp32" and "products" in self.measured):
            parts.append(f"products by {self.products}{self._against('products', self.products)}")
        parts.append(f"tables by {self.tables}{self._against('tables', self.tables)}")
        if self.experts != "auto":
            parts.append(f"experts {self.experts}{self._against('experts', self.experts)}")
        if self.threads:
            parts.append(f"{self.threads} thread{'s' if self.threads > 1 else ''}")
        return ", ".join(parts)

    def _against(self, what: str, taken: str) -> str:
        """How the taken option compares with the best of the others, where that was measured."""
        times = self.measured.get(what, {})
        others = {option: time for option, time in times.items() if option != taken}
        if taken not in times or not others:
            return ""
        other = min(others, key=others.__getitem__)
        return f" ({times[taken]:.1f} ms, {other} {others[other]:.1f})"


def faster(times: Mapping[str, float], by_default: str, margin: float) -> str:
    """The option that took least, or the default where that takes less than `margin` times as long."""
    best = min(times, key=times.__getitem__)
    return best if by_default not in times or times[by_default] >= margin * times[best] else by_default
