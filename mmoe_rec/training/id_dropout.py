"""Dropout of whole ids, so that unseen ids get trained embeddings (DropoutNet: Volkovs et al., 2017).

Training rows define the vocabularies, so they have few unseen ids or none. Later rows have more, such as new users.
Without dropout, table rows of unseen ids keep their random initial values, and the network relies on ids that later
rows don't have.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.dataset as pds

from mmoe_rec.batches.encoded_dataset import LabeledRows, file_errors
from mmoe_rec.batches.row_reader import Position
from mmoe_rec.log.columns import splitmix64
from mmoe_rec.model.model_layout import ModelLayout
from mmoe_rec.preprocessing.prepare import FeatureFolder

# Smaller fractions are left out, because they hardly change the model.
_MIN_FRACTION = 0.005


@dataclass(frozen=True)
class IdDropout:
    """Hides ids in training rows.

    Attributes:
        fractions: Input -> fraction of the training rows that hide the id, between 0 and 1.
        buckets: Input -> number of buckets for unseen ids in the input's table.
    """

    fractions: Mapping[str, float]
    buckets: Mapping[str, int]

    @staticmethod
    def measure(prepared: FeatureFolder, layout: ModelLayout, maximum: float) -> "IdDropout":
        """Choose fractions that give training rows as many unseen ids as validation rows have.

        Args:
            prepared: Folder of the features.
            layout: Layout of the model.
            maximum: Largest fraction of the rows that hide an id. 0 reads no rows.

        Raises:
            UserError: A file can't be read.
        """
        tables = {column.name: layout.table(column.table) for column in layout.ids}
        names = layout.single_ids() if maximum else []
        buckets = {name: tables[name].oov_buckets for name in names if tables[name].oov_buckets}
        train, validation = (_unseen_fractions(prepared.split(split), buckets) for split in ("train", "validation"))
        # With fractions t and v of unseen ids in training and validation rows, x must solve t + (1 - t) x = v.
        fractions = {name: min(maximum, (validation[name] - t) / (1 - t)) for name, t in train.items() if t < 1}
        return IdDropout({name: value for name, value in fractions.items() if value >= _MIN_FRACTION}, buckets)

    def hide(self, rows: LabeledRows, position: Position) -> None:
        """Replace ids of training rows by random buckets of unseen ids.

        Draws depend on seed, epoch, input and row number. They don't depend on the number of ranks.

        Args:
            rows: Training rows. Their ids are replaced in place.
            position: Position with the seed and the epoch.
        """
        assert rows.row_numbers is not None
        numbers = rows.row_numbers.astype(np.uint64)
        for index, (name, fraction) in enumerate(self.fractions.items()):
            salt = np.random.default_rng([position.seed, position.epoch, index]).integers(2**64, dtype=np.uint64)
            hashes = splitmix64(numbers ^ salt)
            unseen = 1 + (hashes % np.uint64(self.buckets[name])).astype(np.int64)
            ids = np.asarray(rows.encoded.ids[name])
            rows.encoded.ids[name] = np.where((ids > 0) & (hashes / 2.0**64 < fraction), unseen, ids)


def _unseen_fractions(folder: Path, buckets: Mapping[str, int]) -> dict[str, float]:
    """Return the fraction of the encoded rows in a `folder` with an unseen id, by input."""
    rows, unseen = 0, dict.fromkeys(buckets, 0)
    for file in sorted(folder.glob("*.parquet")) if buckets else []:
        with file_errors(file):
            dataset = pds.dataset(file)
            rows += dataset.count_rows()
            for name, last in buckets.items():
                ids = pds.field(f"id.{name}")
                unseen[name] += dataset.count_rows(filter=(ids >= 1) & (ids <= last))
    return {name: count / rows for name, count in unseen.items()}
