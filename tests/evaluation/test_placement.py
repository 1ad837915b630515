"""What a model has learnt of placement, beside what placement does to each row's logits."""

import numpy as np
import pandas as pd
import pytest
import torch

from mmoe_rec.batches.batch import make_batch
from mmoe_rec.batches.encoded_rows import EncodedRows
from mmoe_rec.evaluation.evaluate import describe_placement
from mmoe_rec.evaluation.scoring import score_rows
from mmoe_rec.log.reader import Log
from tests.inference.small_model import SmallModel


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallModel:
    return SmallModel(tmp_path_factory.mktemp("placement"))


def test_effects_are_those_of_the_rows(small: SmallModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference scores each row with its placement and without, and groups rows by the log's own column."""
    folder = small.prepared.split("test")
    model, layout = small.model, small.model_layout
    part, table = next(EncodedRows(folder, layout).stream(10_000, ("request", "candidate")))
    batch = make_batch(part.encoded, layout, torchrec=False)
    with torch.inference_mode():
        monkeypatch.setattr(model.mixture.placement, "dropout", 0.0)
        both = [model.train(training)(batch).logits.double().numpy() for training in (True, False)]
    added = pd.DataFrame(both[0] - both[1], columns=[task.name for task in layout.tasks])
    keys = ["user", "item", "time"]
    log = pd.concat([rows.table.to_pandas() for rows in Log(small.settings.data.log, small.settings.schema_).stream()])
    read = next(EncodedRows(folder, layout).stream(10_000, ("user", "candidate", "time")))[1].to_pandas()
    slots = read.merge(log.set_index(keys)["slot"], left_on=["user", "candidate", "time"], right_index=True, how="left")
    assert len(slots) == len(added) == len(table)
    expected = (added - added.mean()).groupby(slots["slot"].to_numpy(), dropna=False).mean()
    told = describe_placement(score_rows(model, layout, EncodedRows(folder, layout), 64), small.folder / "features")
    assert {each.feature for each in told} == {"slot"}
    found = {each.value: each for each in told}
    assert sum(each.rows for each in told) == len(added)
    for slot, effects in expected.iterrows():
        mine = found["missing" if pd.isna(slot) else str(slot if isinstance(slot, str) else int(slot))]
        for task in layout.tasks:
            each = np.exp(effects[task.name]) if task.kind == "binary" else effects[task.name]
            assert mine.effects[task.name] == pytest.approx(each, rel=1e-4, abs=1e-5)
    assert len(found) >= 3, "slots do the same"
