"""What each rank of `test_choices` does. A module of its own so that spawned processes can import it."""

from __future__ import annotations

import json
from pathlib import Path

from mmoe_rec.batches.batch import make_batch
from mmoe_rec.model.tables import plain_tables
from mmoe_rec.settings.sections import Training
from mmoe_rec.training import choices as choices_module
from mmoe_rec.training import measure
from mmoe_rec.training.choices import Choices, kept
from mmoe_rec.training.measure import Chooser
from tests.model.examples import LAYOUT, random_rows, small_model
from tests.training.ranks import CPU, join


def choose_on_a_rank(rank: int, world: int, port: int, folder: Path) -> None:
    """Chooses the library of products, and keeps an earlier choice, where ranks after the first have no oneDNN."""
    for module in (measure, choices_module):
        module.onednn_offered = lambda: rank == 0  # type: ignore[attr-defined]
    ids = make_batch(random_rows(50)[0], LAYOUT, torchrec=False).ids
    settings = Training(precision="fp32", tables="torch", threads=1)
    with join(rank, world, port):
        chosen = Chooser(small_model(plain_tables(LAYOUT)).mixture, LAYOUT, CPU, 64, ids).choose(settings)
        again = kept(Choices("fp32", "torch", "auto", 1, "onednn"), settings, CPU)
    timed = list(chosen.measured.get("products", {"blas": 0.0}))
    found = [chosen.products, timed, again.products]
    (folder / f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")
