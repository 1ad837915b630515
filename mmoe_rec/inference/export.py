"""Other forms of a model, and how near they are to the model itself.

In int8 it is an artifact folder like any other: tables stay int8 in memory, matrices are computed with in float32.

In ONNX it is the dense part as a file, its tables beside it, and what a stranger needs to use both:

    <folder>/
        model.onnx              inputs (N, W) -> predictions (N, P), log_score (N,), score (N,), with trees, if any
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from mmoe_rec.errors import UserError, one_line
from mmoe_rec.inference.artifact import EXAMPLE, read_manifest, read_stored, write_tensors
from mmoe_rec.inference.ranker import Ranker
from mmoe_rec.inference.ranking import Ranking
from mmoe_rec.inference.reader import Request
from mmoe_rec.inference.writing import copy_files, seal
from mmoe_rec.model.forest import Tree, read_ensemble
from mmoe_rec.model.levels import Experts
from mmoe_rec.model.mmoe import RankingModel
from mmoe_rec.model.products import set_products
from mmoe_rec.model.score import log_predictions, predictions
from mmoe_rec.model.tables import SCALES, quantised, some_in_int8
from mmoe_rec.model.trees import Trees

WEIGHTS = "weights.safetensors"
Dense = Literal["bfloat16", "int8", "float32"]
"""How the matrices of the dense part are stored."""
REQUESTS, CANDIDATES, BEST = 50, 200, 10
Answers = Mapping[str, np.ndarray]
"""What a model answers for the N candidates of a request, in its order: prediction or `score` -> (N,) float64."""
MODEL, INPUTS = "model.onnx", "inputs.json"
OUTPUTS = ("predictions", "log_score", "score")
TOLERANCE = 1e-5
_LARGEST = float(np.log(np.finfo(np.float64).max))


def write_int8(folder: Path, made: Path, dense: Dense) -> None:
    """Writes the artifact of a folder in int8 to an empty folder.

    Biases stay as they are, and so do gates, which choose experts: rounded ones may choose others.

    Raises UserError for a folder that is not as it was written, whose weights are in int8 already, or not finite.
    """
    stored, smaller = read_stored(folder / WEIGHTS), {}
    if some_in_int8(stored):
        raise UserError(f"the model in '{folder}' is in int8 already: name the model that it was made from")
    for name, weight in stored.items():
        if not weight.isfinite().all():
            raise UserError(f"weight '{name}' holds NaN or infinity, which int8 can't hold: train the model again")
        matrix = name.endswith(".weight") and ".gates." not in name
        if name.startswith("tables.") or (matrix and dense == "int8"):
            smaller[name], smaller[name + SCALES] = quantised(weight)
        else:
            smaller[name] = weight.bfloat16() if matrix and dense == "bfloat16" else weight
    copy_files(folder, made, but=WEIGHTS)
    write_tensors(smaller, made / WEIGHTS)
    seal(made)


def count_bytes(folder: Path) -> dict[str, int]:
    """Bytes of an artifact's tables, of its other weights, and of all its files: its features, too."""
    sizes = {"tables": 0, "dense": 0}
    for name, weight in read_stored(folder / WEIGHTS).items():
        sizes["tables" if name.startswith("tables.") else "dense"] += weight.nbytes
    return sizes | {"all files": sum(file.bytes for file in read_manifest(folder).values())}


class DensePart(nn.Module):
    """What a ranker computes from its inputs on, in one module without choices: all experts run on all rows, and
    one that fails is not left out."""

    def __init__(self, ranker: Ranker) -> None:
        super().__init__()
        layout = ranker.layout
        self.model = RankingModel(nn.Module(), layout, copy.deepcopy(ranker.model.mixture)).eval()
        for member in self.model.mixture.each_member():
            member.placement = None
        set_products(self.model, "blas")
        for module in self.model.modules():
            if isinstance(module, Experts):
                module.compute = "dense"
        self._calibration, self._names = ranker.calibration, ranker.names
        self._kinds = [task.kind for task in layout.tasks]
        self._weights = [task.score_weight for task in layout.tasks]
        self._products = list(layout.outcomes.values())
        self._trees = ranker.model.trees

    def forward(self, inputs: Tensor, grown: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(N, W) float32, with trees also what these say, (N, T) float32 -> predictions (N, P) of tasks, then outcomes;
        log scores and scores, (N,) float64."""
        model = self.model
        logits = model.of_inputs(inputs[:, : model.width], None).logits
        if self._trees is not None and grown is not None:
            grown = torch.addcmul(model.mean, grown.to(logits), model.scale)
            logits = self._trees.blend(logits, grown, self._names)
        logits = self._calibration.apply(logits, self._names)
        values = predictions(logits, self._kinds)
        both = [(values[:, given] * values[:, task]).unsqueeze(1) for given, task in self._products]
        logs = log_predictions(logits.double(), self._kinds)
        log_score = (logs * logs.new_tensor(self._weights)).sum(1)
        return torch.cat([values, *both], dim=1), log_score, log_score.clamp(max=_LARGEST).exp()


def write_onnx(folder: Path, ranker: Ranker, made: Path) -> None:
    """Writes the model of an artifact folder, loaded as `ranker`, to an empty folder. Raises UserError for one that the
    exporter can't follow."""
    if ranker.layout.attention:
        raise UserError(
            f"feature '{ranker.layout.attention[0].history}' is pooled by attention, which an ONNX file does not hold: "
            "its inputs are pooled already; export in int8, or train with `pooling: mean`"
        )
    dense, trees = DensePart(ranker), ranker.model.trees
    if trees is not None and not trees.texts:  # of no task
        trees = None
    example = inputs_of(ranker, json.loads((folder / EXAMPLE).read_text(encoding="utf-8")))
    first = ranker.model.width - len(ranker.model.dense_columns)  # of what trees read
    given = (example,) if trees is None else (example, trees.logits(example[:, first:], ranker.names).float())
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # the exporter tells of libraries that no model here uses
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            program = torch.onnx.export(
                dense,
                given,
                dynamo=True,
                verbose=False,
                opset_version=18,
                input_names=["inputs", "grown"][: len(given)],
                output_names=list(OUTPUTS),
                dynamic_shapes=tuple([{0: torch.export.Dim("candidates")}] * len(given)),
            )
        except Exception as error:  # the exporter's, which has causes of many kinds
            raise UserError(f"torch's exporter can't turn this model into ONNX: {one_line(error)[:200]}") from error
    assert program is not None
    if trees is None:
        program.save(made / MODEL)
    else:
        save_with_trees(program.model_proto, trees, ranker.names, first, made / MODEL)
    bags: Any = ranker.model.tables.embedding_bags
    used = {each.table for each in ranker.layout.ids if not each.placement}
    tables = {table.name: bags[table.name].weight for table in ranker.layout.tables if table.name in used}
    write_tensors(tables, made / "tables.safetensors")
    with torch.inference_mode():
        values = dict(zip(OUTPUTS, dense(*given), strict=True))
    write_tensors({"inputs": example, **values}, made / "example.safetensors")
    about = _describe(ranker, {name: list(each.shape) for name, each in tables.items()})
    (made / INPUTS).write_text(json.dumps(about, indent=1, ensure_ascii=False), encoding="utf-8")
    (made / "README.md").write_text(_README, encoding="utf-8")


def save_with_trees(model: Any, trees: Trees, names: Sequence[str], first: int, path: Path) -> None:
    """Writes a graph with the trees of its tasks in the place of its input `grown`. first: input that trees read first.

    A task without trees gets another one's, which its blend does not read.
    """
    import onnx

    grown = [f"grown.{name}" if name in trees.texts else f"grown.{next(iter(trees.texts))}" for name in names]
    nodes = [
        onnx.helper.make_node(
            "TreeEnsembleRegressor",
            ["inputs"],
            [f"grown.{name}"],
            domain="ai.onnx.ml",
            n_targets=1,
            **_as_attributes(read_ensemble(text).trees, first),
        )
        for name, text in trees.texts.items()
    ]
    nodes.append(onnx.helper.make_node("Concat", grown, ["grown"], axis=1))
    for place, node in enumerate(nodes):
        model.graph.node.insert(place, node)
    del model.graph.input[1]
    model.opset_import.append(onnx.helper.make_opsetid("ai.onnx.ml", 3))
    onnx.save(model, path)


def _as_attributes(trees: Sequence[Tree], first: int) -> dict[str, Any]:
    """Trees as attributes of a TreeEnsembleRegressor."""
    found: dict[str, list[Any]] = {
        f"{kind}_{name}": []
        for kind, of_kind in (
            ("nodes", ("treeids", "nodeids", "featureids", "values", "modes", "truenodeids", "falsenodeids")),
            ("target", ("treeids", "nodeids", "ids", "weights")),
        )
        for name in of_kind
    }

    def add(kind: str, **values: Any) -> None:
        for name, value in values.items():
            found[f"{kind}_{name}"].append(value)

    for number, tree in enumerate(trees):
        # The root has number 0: splits come first, then leaves, then what sets of ids need.
        splits, count = len(tree.features), 2 * len(tree.features) + 1
        left, right = (np.where(each >= 0, each, splits + ~each).tolist() for each in (tree.left, tree.right))
        for split, feature in enumerate(tree.features.tolist()):
            own = {"treeids": number, "nodeids": split, "featureids": first + feature, "truenodeids": left[split]}
            if tree.by_set[split]:  # a chain of nodes, all of which go on with the same one
                *others, last = map(float, tree.members(split))
                for value in others:
                    add("nodes", **own, values=value, modes="BRANCH_EQ", falsenodeids=count)
                    own["nodeids"] = count
                    count += 1
                add("nodes", **own, values=last, modes="BRANCH_EQ", falsenodeids=right[split])
            else:
                add("nodes", **own, values=float(tree.edges[split]), modes="BRANCH_LEQ", falsenodeids=right[split])
        for leaf, value in enumerate(tree.values.tolist(), splits):
            own = {"treeids": number, "nodeids": leaf}
            add("nodes", **own, featureids=0, values=0.0, modes="LEAF", truenodeids=0, falsenodeids=0)
            add("target", **own, ids=0, weights=value)
    return found


def inputs_of(ranker: Ranker, request: Mapping[str, Any]) -> Tensor:
    """(N, W) float32: the model's inputs for the candidates of a request, given as arguments of `rank`."""
    rows = ranker.reader.rows([Request.of(request)])
    return ranker.request_inputs.matrix(*ranker.pipeline.request_inputs(rows), rows.of)


def load_onnx(folder: Path) -> Callable[[Tensor], Answers]:
    """What the written file answers for inputs (N, W), run by onnxruntime as another server would."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / MODEL), providers=["CPUExecutionProvider"])
    names = json.loads((folder / INPUTS).read_text(encoding="utf-8"))["outputs"]["predictions"]["columns"]

    def answer(inputs: Tensor) -> Answers:
        values, _, scores = session.run(list(OUTPUTS), {"inputs": inputs.numpy()})
        return {**dict(zip(names, values.T.astype(np.float64), strict=True)), "score": scores}

    return answer


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
            f"the ONNX file does not compute what the model does: {wrong:,} of {len(off):,} candidates are off, by "
            f"{off.max():.2g} at most"
        )


def _describe(ranker: Ranker, tables: dict[str, list[int]]) -> dict[str, Any]:
    """What `inputs.json` holds. tables: shapes by name."""
    layout, columns, start = ranker.layout, list[dict[str, Any]](), 0
    for each in (each for each in layout.ids if not each.placement):
        end = start + layout.table(each.table).dim
        columns.append({"name": each.name, "first": start, "end": end, "table": each.table, "many": each.many})
        start = end
    for name in layout.dense_names(False):
        columns.append({"name": name, "first": start, "end": start + 1})
        start += 1
    of_tables = {each.name: each.table for each in layout.ids}
    for name in layout.single_ids() if ranker.model.trees is not None else ():
        columns.append({"name": name, "first": start, "end": start + 1, "row_of": of_tables[name]})
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
        "tables": tables,
    }


_README = """# A model of mmoe_rec in ONNX

`model.onnx` takes a matrix with a row for each candidate; mmoe_rec has checked it against the model. It runs wherever
ONNX does, such as in onnxruntime (the packages `onnxruntime` and `safetensors`):

```python
import onnxruntime
from safetensors.numpy import load_file

example = load_file("example.safetensors")
session = onnxruntime.InferenceSession("model.onnx")
predictions, log_score, score = session.run(None, {"inputs": example["inputs"]})
assert abs(predictions - example["predictions"]).max() < 1e-5
```

`inputs.json` lists the columns of inputs and predictions, and their types.

- `inputs`: a column of the list goes from `first` up to but without `end`. With a `table` it is an embedding: the row
  of an id in that table of `tables.safetensors`, with `many` the mean of the rows of several ids, zeros without any.
  Without one it is a number, as features give it, or with `row_of` the number of an id's row in that table.
- `predictions`: of each task, and then of two tasks together, their product. `log_score`: the sum of each task's weight
  times the log of its prediction; `score`: its exponential. Rank by `log_score`, which is exact where `score` is too
  small or too large for a number.

Which row an id has, and what a number is, follows from the folder `features` of the model, which
`mmoe_rec.features.pipeline.FeaturePipeline` reads. Inputs made with other features than those of the `fingerprint` in
`inputs.json`, even of the same names, mean something else.
"""


# How near the forms are to each other


def draw_requests(folder: Path, ranker: Ranker, requests: int = REQUESTS) -> Iterator[dict[str, Any]]:
    """Arguments of `Ranker.rank`, the same ones at every call: users and candidates that the model knows, in the
    context of its folder's example; of a model that knows none only the example."""
    random = np.random.default_rng(0)
    example = json.loads((folder / EXAMPLE).read_text(encoding="utf-8"))
    names = ranker.pipeline.schema.columns
    users, candidates = (
        pq.read_table(folder / "features" / f"latest.{role}.parquet", columns=[key]).column(key).combine_chunks()
        for role, key in (("user", names.user), ("candidate", names.candidate))
    )
    if not len(users) or not len(candidates):  # a plain table's, which knows no ids
        yield example
        return
    for _ in range(requests):
        user = users[int(random.integers(len(users)))].as_py()
        count = min(CANDIDATES, len(candidates), ranker.about.max_candidates)
        shown = candidates.take(random.choice(len(candidates), count, replace=False)).to_pylist()
        yield example | {"user": {names.user: user}, "candidates": {names.candidate: shown}}


def answers_of(ranking: Ranking) -> Answers:
    """The answers in a ranking of all candidates."""
    back = np.argsort(ranking.order)
    values = {**ranking.predictions, "score": ranking.scores}
    return {name: np.array(each, np.float64)[back] for name, each in values.items()}


def answer_both(
    folder: Path, ranker: Ranker, answer: Callable[[dict[str, Any]], Answers]
) -> list[tuple[Answers, Answers]]:
    """What a folder's ranker gives for drawn requests, and what another form of it answers."""
    return [(answers_of(ranker.rank(**each)), answer(each)) for each in draw_requests(folder, ranker)]


def agreement(pairs: Sequence[tuple[Answers, Answers]]) -> dict[str, Any]:
    """How near two forms are to each other, of R requests with up to N candidates each.

    `max_difference` is of predictions, by task or outcome; `top_10_shared` is the mean share of the 10 best of the
    first form that are among those of the other.
    """
    best = [[set(np.argsort(-each["score"], kind="stable")[:BEST].tolist()) for each in pair] for pair in pairs]
    return {
        "requests": len(pairs),
        "candidates": max(len(one["score"]) for one, _ in pairs),
        "max_difference": {
            name: max(float(np.abs(one[name] - other[name]).max()) for one, other in pairs)
            for name in pairs[0][0]
            if name != "score"
        },
        "top_10_shared": float(np.mean([len(one & other) / len(one) for one, other in best])),
    }
