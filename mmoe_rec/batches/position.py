"""Where training stands in its rows: plain data for a checkpoint."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from mmoe_rec.errors import UserError

OTHERWISE = "or train from the start"


@dataclass(frozen=True)
class Position:
    """The first `row` rows of an epoch's order are consumed, by all ranks together; the rest is to come.

    seed, shuffle_window, rows and fingerprint (of the encoded rows, see `EncodedRows`) fix that order, with any number
    of ranks and any batch size.
    """

    epoch: int
    row: int
    seed: int
    shuffle_window: int
    rows: int
    fingerprint: str

    def to_dict(self) -> dict[str, int | str]:
        """The fields, as JSON can hold them."""
        return asdict(self)

    @staticmethod
    def from_dict(tree: dict[str, Any]) -> Position:
        """The position that `to_dict` gave. Raises UserError when a field is missing, unknown or of another type."""
        types = {each.name: str if each.name == "fingerprint" else int for each in fields(Position)}
        for name, kind in types.items():
            if type(tree.get(name)) is not kind:
                raise UserError(
                    f"the checkpoint's position has {tree.get(name)!r} as '{name}', expected one {kind.__name__}: the "
                    f"checkpoint is damaged or of another version; resume from another one {OTHERWISE}"
                )
        if unknown := sorted(set(tree) - set(types)):
            raise UserError(
                f"the checkpoint's position has the unknown field '{unknown[0]}': the checkpoint is of another "
                f"version; resume from another one {OTHERWISE}"
            )
        return Position(**tree)

    def check(self, own: Position) -> None:
        """Raises UserError unless this position lies in the same order of rows as `own`, and inside its epoch."""
        cannot = f"cannot resume at row {self.row} of epoch {self.epoch}"
        if self.rows != own.rows:
            raise UserError(
                f"{cannot}: the checkpoint was made with {self.rows} encoded rows, now there are {own.rows}; bring "
                f"those rows back {OTHERWISE}"
            )
        if self.fingerprint != own.fingerprint:
            raise UserError(
                f"{cannot}: the encoded rows are not those that the checkpoint was made with (fingerprint "
                f"{own.fingerprint}, expected {self.fingerprint}); bring those back {OTHERWISE}"
            )
        for name in ("seed", "shuffle_window"):
            before, now = getattr(self, name), getattr(own, name)
            if before != now:
                raise UserError(
                    f"{cannot}: the checkpoint was made with training.{name} {before}, now it is {now}; set it to "
                    f"{before} {OTHERWISE}"
                )
        if self.epoch < 0 or not 0 <= self.row <= self.rows:
            raise UserError(f"{cannot}: an epoch has {self.rows} rows; resume from another checkpoint {OTHERWISE}")
