"""A kind of feature is added by one file and one line, and then is everywhere."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.added_package import AddedPackage
from tests.pipelines.learnable_log import START, settings_tree, write_files

pytestmark = pytest.mark.thorough
KIND = '''
"""The kind `remainder`: an integer's remainder, looked up in an embedding table."""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from pydantic import Field

from mmoe_rec.features.encoder import Encoder, FeatureKind, Inputs, InputSpec
from mmoe_rec.features.layout import TableSpec
from mmoe_rec.log.rows import LogRows
from mmoe_rec.settings.log_columns import ColumnUse
from mmoe_rec.settings.schema import EmbeddingChoices, Feature, InputSemantics, Schema


class RemainderFeature(Feature, EmbeddingChoices):
    """An integer's remainder, embedded."""

    kind: Literal["remainder"]
    column: str = Field(description="column that the feature reads")
    divisor: int = Field(ge=2, description="what numbers are divided by")

    def reads(self) -> Mapping[str, ColumnUse]:
        return {self.column: "key"}

    def semantics(self, schema: Schema) -> InputSemantics:
        return InputSemantics((self.column,), lambda table, row: f"remainder {row - 1}")


class RemainderEncoder(Encoder):
    """An integer's remainder; row 0 is a missing number."""

    def input_spec(self) -> InputSpec:
        return InputSpec((TableSpec(self.name, self.feature.divisor + 1),), ((self.name, self.name, False),))

    def encode(self, rows: LogRows) -> Inputs:
        numbers = rows.column(self.feature.column).to_numpy(zero_copy_only=False).astype(np.float64)
        found = np.where(np.isnan(numbers), 0, 1 + np.nan_to_num(numbers) % self.feature.divisor)
        return Inputs({self.name: found.astype(np.int64)})

    def example_value(self, use: ColumnUse) -> Any:
        return 1


KIND = FeatureKind(RemainderFeature, RemainderEncoder)
'''

SCRIPT = """
import json
from mmoe_rec.cli.main import main
from mmoe_rec.inference.ranker import Ranker
from mmoe_rec.settings.load import describe_settings

assert "features.NAME (kind: remainder): An integer's remainder, embedded." in describe_settings()
words = ["--config", "settings.yaml"]
main(["plan", *words, "--world-size", "1", "--local-world-size", "1"])
for command in ("features", "train", "inspect"):
    main([command, *words])
main(["evaluate", *words, "--model", "work/model"])
candidates = {"item": [1, 2, 3, 4, 5, 8]}
ranking = Ranker.load("work/model").rank({"user": 3}, {"time": "2024-03-11T00:00:00Z"}, candidates)
print("RANKED", json.dumps(ranking.to_dict()))
"""


def test_a_kind_is_learnt_from_and_named_in_the_report(tmp_path: Path) -> None:
    package = AddedPackage(tmp_path)
    package.add(
        "features/kinds/remainder.py",
        KIND,
        listed_in="features/kinds/__init__.py",
        after='    "counter",',
        line='    "remainder",',
    )
    tree = settings_tree(tmp_path)
    features = {
        "user": {"kind": "id", "column": "user", "max_size": 100},
        "rest": {"kind": "remainder", "column": "item", "divisor": 7, "dim": 4},
    }
    write_files(tmp_path, features=features, training={**tree["training"], "epochs": 1})
    printed = package.run(SCRIPT)
    log = pq.read_table(tmp_path / "log")
    log = log.filter(np.asarray(log["time"]) < START + np.timedelta64(7, "D"))
    (split,) = (item for item in (tmp_path / "work" / "features").rglob("train") if item.is_dir())
    encoded = pq.read_table(split)
    assert np.array_equal(np.sort(encoded["id.rest"].to_numpy()), np.sort(1 + log["item"].to_numpy() % 7))
    assert "rest: 8 rows x 4 dims" in printed
    ranked = json.loads(printed.rpartition("RANKED ")[2])
    scores = dict(zip(ranked["candidates"], ranked["scores"], strict=True))
    assert len({round(score, 6) for score in scores.values()}) == 5  # only `rest` tells candidates apart,
    assert scores[1] == pytest.approx(scores[8], rel=1e-6)  # and 1 and 8 have the same one
    (path,) = (tmp_path / "work").rglob("health.json")
    health = json.loads(path.read_text(encoding="utf-8"))
    (rest,) = (feature for feature in health["features"] if feature["name"] == "rest")
    assert {item["bin"] for item in rest["inputs"][0]["bins"]} == {*(f"remainder {n}" for n in range(7)), "missing"}
