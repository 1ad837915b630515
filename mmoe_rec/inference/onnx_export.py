"""The dense part of a model as an ONNX file, its tables beside it, and what a stranger needs to use both.

    <folder>/
        model.onnx              inputs (N, W) -> predictions (N, P), log_score (N,), score (N,)
        tables.safetensors      embedding tables by name, float32
        inputs.json             what stands in which column of inputs and predictions
        example.safetensors     the inputs of the model's example request, and what it gives for them
        README.md               how to use these

torch's own exporter makes the graph from the code that serves, so that it holds whatever a model's settings ask for:
levels of experts, routing rules, crosses, calibration, regressions.
"""

from __future__ import annotations

import copy
import json
import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmoe_rec.errors import UserError, require_packages
from mmoe_rec.inference.example import EXAMPLE
from mmoe_rec.inference.export import Answers
from mmoe_rec.inference.ranker import Ranker
from mmoe_rec.inference.request import Request
from mmoe_rec.inference.writing import write_tensors
from mmoe_rec.model.inputs import RequestInputs
from mmoe_rec.model.levels import Experts
from mmoe_rec.model.mmoe import RankingModel
from mmoe_rec.model.products import set_products
from mmoe_rec.model.score import log_predictions, predictions
from mmoe_rec.model.tables import PlainTables

MODEL, TABLES, INPUTS, EXAMPLE_VALUES = "model.onnx", "tables.safetensors", "inputs.json", "example.safetensors"
OPSET = 18
OUTPUTS = ("predictions", "log_score", "score")
TOLERANCE = 1e-5
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_ROWS_TRACED = 8  # a graph of a single row would hold for no other number of them
_LARGEST = float(np.log(np.finfo(np.float64).max))


def check_packages() -> None:
    """Raises UserError where a package is missing that writing or checking an ONNX file needs."""
    require_packages("ONNX", "onnx", *_PACKAGES)


class Served(nn.Module):
    """What a ranker computes from its inputs on, in one module without choices: all experts run on all rows.

    An expert that fails is not left out, as a ranker does.
    """

    def __init__(self, ranker: Ranker) -> None:
        super().__init__()
        layout = ranker.layout
        self.model = RankingModel(PlainTables((), ()), layout, copy.deepcopy(ranker.model.mixture)).eval()
        self.model.mixture.placement = None
        set_products(self.model, "blas")
        for module in self.model.modules():
            if isinstance(module, Experts):
                module.compute = "dense"
        self._calibration, self._names = ranker.calibration, ranker.names
        self._kinds = [task.kind for task in layout.tasks]
        self._weights = [task.score_weight for task in layout.tasks]
        self._products = list(layout.outcomes.values())

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(N, W) float32 -> predictions (N, P) of tasks, then outcomes; log scores and scores, (N,) float64."""
        logits = self._calibration.apply(self.model.of_inputs(inputs, None).logits, self._names)
        values = predictions(logits, self._kinds)
        both = [(values[:, given] * values[:, task]).unsqueeze(1) for given, task in self._products]
        logs = log_predictions(logits.double(), self._kinds)
        log_score = (logs * logs.new_tensor(self._weights)).sum(1)
        return torch.cat([values, *both], dim=1), log_score, log_score.clamp(max=_LARGEST).exp()


def write_onnx(folder: Path, ranker: Ranker, made: Path) -> None:
    """Writes the model of an artifact folder, loaded as `ranker`, to an empty folder.

    Raises UserError where a package is missing, or for a model that the exporter can't follow.
    """
    check_packages()
    served = Served(ranker)
    example = inputs_of(ranker, json.loads((folder / EXAMPLE).read_text(encoding="utf-8")))
    with warnings.catch_warnings():  # the exporter tells of libraries that no model here uses
        warnings.simplefilter("ignore")
        logger = logging.getLogger("torch.onnx")
        level = logger.level
        logger.setLevel(logging.ERROR)
        try:
            program = torch.onnx.export(
                served,
                (example,),
                dynamo=True,
                verbose=False,
                opset_version=OPSET,
                input_names=["inputs"],
                output_names=list(OUTPUTS),
                dynamic_shapes=({0: torch.export.Dim("candidates")},),
            )
        except Exception as error:  # the exporter's, which has causes of many kinds
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"torch's exporter can't turn this model into ONNX: {reason}") from error
        finally:
            logger.setLevel(level)
    assert program is not None
    program.save(made / MODEL)
    tables = {name: bag.weight.detach().clone() for name, bag in _bags(ranker).items()}
    write_tensors(tables, made / TABLES)
    with torch.inference_mode():
        values = dict(zip(OUTPUTS, served(example), strict=True))
    write_tensors({"inputs": example, **{name: each.clone() for name, each in values.items()}}, made / EXAMPLE_VALUES)
    about = _describe(ranker)
    (made / INPUTS).write_text(json.dumps(about, indent=1, ensure_ascii=False), encoding="utf-8")
    (made / "README.md").write_text(_readme(about), encoding="utf-8")


def inputs_of(ranker: Ranker, request: Mapping[str, Any]) -> Tensor:
    """(N, W) float32: the model's inputs for the candidates of a request, given as arguments of `rank`."""
    tables = ranker.model.tables
    assert isinstance(tables, PlainTables)
    rows = ranker.reader.rows([Request.of(request)])
    return RequestInputs(ranker.layout, tables).matrix(*ranker.pipeline.request_inputs(rows), rows.of)


class OnnxModel:
    """The written file, run by onnxruntime as another server would."""

    def __init__(self, folder: Path) -> None:
        import onnxruntime

        self._session = onnxruntime.InferenceSession(str(folder / MODEL), providers=["CPUExecutionProvider"])
        self._names = json.loads((folder / INPUTS).read_text(encoding="utf-8"))["outputs"]["predictions"]["columns"]

    def answers(self, inputs: Tensor) -> Answers:
        """What it gives for inputs (N, W)."""
        values, _, scores = self._session.run(list(OUTPUTS), {"inputs": inputs.numpy()})
        return {**dict(zip(self._names, values.T.astype(np.float64), strict=True)), "score": scores}


def check_equal(pairs: Sequence[tuple[Answers, Answers]], chooses: bool) -> None:
    """Raises UserError where the second form gives another prediction or score: off by more than TOLERANCE, or by more
    than that share of a value over 1.

    chooses: gates choose some of the experts. Where two are equally good but for rounding, the forms may choose
    differently, so one row in a thousand may be off.
    """
    off = np.concatenate(
        [
            np.max([np.abs(other[name] - one[name]) / np.maximum(1.0, np.abs(one[name])) for name in one], axis=0)
            for one, other in pairs
        ]
    )
    off = np.where(np.isnan(off), np.inf, off)
    if (wrong := int((off > TOLERANCE).sum())) > len(off) * chooses / 1000:
        raise UserError(
            f"the ONNX file computes something else than the model: {wrong:,} of {len(off):,} candidates are off, by "
            f"{off.max():.2g} at most"
        )


def _bags(ranker: Ranker) -> dict[str, Any]:
    """The tables that inputs look up, but for those of placement."""
    used = {each.table for each in ranker.layout.ids if not each.placement}
    tables = ranker.model.tables
    assert isinstance(tables, PlainTables)
    return {table.name: tables.embedding_bags[table.name] for table in ranker.layout.tables if table.name in used}


def _describe(ranker: Ranker) -> dict[str, Any]:
    """What `inputs.json` holds."""
    layout, columns, start = ranker.layout, list[dict[str, Any]](), 0
    for each in (each for each in layout.ids if not each.placement):
        end = start + layout.table(each.table).dim
        columns.append({"name": each.name, "first": start, "end": end, "table": each.table, "many": each.many})
        start = end
    for name in layout.dense_names(False):
        columns.append({"name": name, "first": start, "end": start + 1})
        start += 1
    values = "float64" if any(task.kind == "regression" for task in layout.tasks) else "float32"
    return {
        "format": 1,
        "model": ranker.about.name,
        "fingerprint": ranker.about.fingerprint,
        "inputs": {"dtype": "float32", "width": start, "columns": columns},
        "outputs": {
            "predictions": {"dtype": values, "columns": [*ranker.names, *layout.outcomes]},
            "log_score": {"dtype": "float64", "weights": {task.name: task.score_weight for task in layout.tasks}},
            "score": {"dtype": "float64"},
        },
        "tables": {name: list(bag.weight.shape) for name, bag in _bags(ranker).items()},
    }


def _readme(about: dict[str, Any]) -> str:
    """The text for what `inputs.json` holds, for somebody who has nothing but the folder."""
    predictions, tasks = about["outputs"]["predictions"], about["outputs"]["log_score"]["weights"]
    both = any(name not in tasks for name in predictions["columns"])
    return f"""# {about["model"]}, in ONNX

`model.onnx` takes a matrix with a row for each candidate; mmoe_rec has checked it against the model. It runs wherever
ONNX does, such as in onnxruntime (the packages `onnxruntime` and `safetensors`):

```python
import onnxruntime
from safetensors.numpy import load_file

example = load_file("example.safetensors")
session = onnxruntime.InferenceSession("model.onnx")
predictions, log_score, score = session.run(None, {{"inputs": example["inputs"]}})
assert abs(predictions - example["predictions"]).max() < 1e-5
```

- `inputs`: (candidates, {about["inputs"]["width"]}) float32. `inputs.json` lists its columns, from `first` up to but
  without `end`. A name with a `table` is an embedding: the row of an id in that table of `tables.safetensors`, with
  `many` the mean of the rows of several ids, zeros without any. A name without one is a number, as features give it.
- `predictions`: (candidates, {len(predictions["columns"])}) {predictions["dtype"]}, columns
  {", ".join(f"`{name}`" for name in predictions["columns"])}{". The last of them: two together, their product" * both}.
- `log_score`: (candidates,) float64, the sum of each task's weight times the log of its prediction; `score`: its
  exponential. Rank by `log_score`, which is exact where `score` is too small or too large for a number.

Which row an id has, and what a number is, follows from the folder `features` of the model, which
`mmoe_rec.features.pipeline.FeaturePipeline` reads. Inputs made with other features, even of the same names, mean
something else (these have the fingerprint `{about["fingerprint"]}`).
"""
