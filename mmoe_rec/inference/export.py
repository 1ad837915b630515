"""Other forms of a model, and how near they are to the model itself.

In int8 it is an artifact folder like any other: tables stay int8 in memory, matrices are computed with in float32. An
ONNX file holds all that comes after the features, for other servers:

    <folder>/
        model.onnx      table rows and numbers of N candidates -> predictions (N, P), log_score (N,), score (N,);
                        weights of more than 1.5 GB lie beside it, in model.onnx.data
        inputs.json     names of the columns of the inputs, and their tables
        example.npz     inputs of the model's example request, and what the model gives for them
        README.md       how to use these

torch's own exporter makes the graph from the code that serves, so that it holds whatever a model's settings ask for:
levels of experts, routing rules, crosses, calibration, regressions, int8 tables.
"""

import copy
import json
import logging
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmoe_rec.errors import UserError, one_line
from mmoe_rec.features.encoder import Inputs
from mmoe_rec.inference.artifact import read_example, read_manifest, read_tensors, write_tensors
from mmoe_rec.inference.artifact_writer import copy_files, finalize_artifact
from mmoe_rec.inference.ranker import Ranker
from mmoe_rec.inference.ranking import Ranking
from mmoe_rec.inference.request_reader import Request
from mmoe_rec.model.levels import set_compute
from mmoe_rec.model.matmul import set_matmul_backend
from mmoe_rec.model.mmoe import RankingModel
from mmoe_rec.model.model_layout import ModelLayout
from mmoe_rec.model.score import log_predictions, predictions
from mmoe_rec.model.tables import SCALES_SUFFIX, PlainTables, has_int8_weights, quantize
from mmoe_rec.model.trees import Tree, Trees, read_ensemble

WEIGHTS_FILE = "weights.safetensors"
ModelOutputs = Mapping[str, np.ndarray]
"""What a model answers for the N candidates of a request, in its order: prediction or `score` -> (N,) float64."""


def write_int8(folder: Path, out: Path) -> dict[str, Any]:
    """Write the artifact of a folder to an empty one, with tables in int8 and other matrices in bfloat16.

    Biases stay as they are, and so do gates, which choose experts: rounded ones may choose others.

    Returns:
        The sizes of both, and the largest differences on the model's example request, see `max_relative_differences`.

    Raises:
        UserError: The folder is not as it was written, or its weights are in int8 already, or not finite.
    """
    stored, smaller = read_tensors(folder / WEIGHTS_FILE), {}
    if has_int8_weights(stored):
        raise UserError(f"the model in '{folder}' is in int8 already: name the model that it was made from")
    for name, weight in stored.items():
        if not weight.isfinite().all():
            raise UserError(f"weight '{name}' holds NaN or infinity, which int8 can't hold: train the model again")
        if name.startswith("tables."):
            smaller[name], smaller[name + SCALES_SUFFIX] = quantize(weight)
        else:
            smaller[name] = weight.bfloat16() if name.endswith(".weight") and ".gates." not in name else weight
    copy_files(folder, out, exclude_prefix=WEIGHTS_FILE)
    write_tensors(smaller, out / WEIGHTS_FILE)
    finalize_artifact(out)
    model, small = (outputs_in_request_order(Ranker.load(each).rank(**read_example(folder))) for each in (folder, out))
    sizes = {"model": count_bytes(folder), "int8": count_bytes(out)}
    return {"bytes": sizes, "max_difference": max_relative_differences(model, small)}


def count_bytes(folder: Path) -> dict[str, int]:
    """Bytes of an artifact's tables, of its other weights, and of all its files: its features, too."""
    sizes = {"tables": 0, "dense": 0}
    for name, weight in read_tensors(folder / WEIGHTS_FILE).items():
        sizes["tables" if name.startswith("tables.") else "dense"] += weight.nbytes
    return sizes | {"all files": sum((folder / name).stat().st_size for name in read_manifest(folder))}


def outputs_in_request_order(ranking: Ranking) -> ModelOutputs:
    """The answers in a ranking of all candidates."""
    back = np.argsort(ranking.order)
    values = {**ranking.predictions, "score": ranking.scores}
    return {name: np.array(each, np.float64)[back] for name, each in values.items()}


def max_relative_differences(one: ModelOutputs, other: ModelOutputs) -> dict[str, float]:
    """Return the largest difference of each prediction and of the score, relative to values over 1."""
    apart = {name: np.abs(other[name] - values) / np.maximum(1.0, np.abs(values)) for name, values in one.items()}
    return {name: float(each.max()) for name, each in apart.items()}


MODEL_FILE, INPUTS_FILE = "model.onnx", "inputs.json"
OUTPUT_NAMES = ("predictions", "log_score", "score")
TOLERANCE = 1e-5
_LARGEST = float(np.log(np.finfo(np.float64).max))


class ExportModule(nn.Module):
    """What a ranker computes from `encode_request`'s arrays on, in one module without choices: all experts run on all
    rows."""

    def __init__(self, ranker: Ranker) -> None:
        super().__init__()
        mixture = copy.deepcopy(ranker.model.mixture)
        mixture.placement = None
        self.model = RankingModel(ranker.model.tables, ranker.layout, mixture).eval()
        set_matmul_backend(self.model, "blas")
        set_compute(self.model, "dense")
        self._layout, self._names = ranker.layout, ranker.task_names
        self._calibration, self._trees = ranker.calibration, ranker.model.trees

    def forward(self, inputs: Mapping[str, Tensor], tree_logits: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Arrays of N candidates, with trees also their logits, (N, T) float32 -> what `dense` gives."""
        tables, layout, embedded = self.model.tables, self._layout, list[Tensor]()
        assert isinstance(tables, PlainTables)
        ids = {name.removeprefix("ids."): each for name, each in inputs.items() if name.startswith("ids.")}
        if "ids" in inputs:
            ids |= dict(zip(single_id_names(layout), inputs["ids"].unbind(1), strict=True))
        for name in layout.id_names(placement=False):
            rows = tables.rows(tables.table_of[name], ids[name].clamp(min=0))
            if rows.dim() == 3:
                there = (ids[name] >= 0).unsqueeze(2)
                rows = (rows * there).sum(1) / there.sum(1).clamp(min=1)
            embedded.append(rows)
        numbers = [inputs["numbers"]] if "numbers" in inputs else []
        return self.dense(torch.cat([*embedded, *numbers], dim=1), tree_logits)

    def dense(self, inputs: Tensor, tree_logits: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(N, W) float32 -> predictions (N, P) of tasks, then outcomes; log scores and scores, (N,) float64."""
        model, tasks = self.model, self._layout.tasks
        logits = model.forward_inputs(inputs[:, : model.width], None).logits
        if self._trees is not None and tree_logits is not None:
            logits = self._trees.blend(logits, model.to_label_units(tree_logits.to(logits)), self._names)
        logits, kinds = self._calibration.apply(logits, self._names), [task.kind for task in tasks]
        values, logs = predictions(logits, kinds), log_predictions(logits.double(), kinds)
        both = [
            (values[:, given] * values[:, task]).unsqueeze(1) for given, task in self._layout.joint_outcomes.values()
        ]
        log_score = (logs * logs.new_tensor([task.score_weight for task in tasks])).sum(1)
        return torch.cat([values, *both], dim=1), log_score, log_score.clamp(max=_LARGEST).exp()


def write_onnx(folder: Path, out: Path) -> dict[str, Any]:
    """Write the model of an artifact folder as an ONNX file to an empty folder.

    Returns:
        The largest differences on the model's example request, see `max_relative_differences`.

    Raises:
        UserError: The model has attention, the exporter can't follow it, or the file gives other predictions.
    """
    ranker = Ranker.load(folder)
    if ranker.layout.attention:
        history = ranker.layout.attention[0].history
        raise UserError(
            f"feature '{history}' is pooled by attention, which ONNX export lacks. Train with pooling: mean."
        )
    request, layout, trees = read_example(folder), ranker.layout, ranker.model.trees
    example, answers = encode_request(ranker, request), outputs_in_request_order(ranker.rank(**request))
    grows = trees is not None and bool(trees.texts)  # or of no task
    _export(ExportModule(ranker), example, len(ranker.task_names) if grows else 0).save(out / MODEL_FILE)
    if trees is not None and grows:
        add_trees(out / MODEL_FILE, trees, ranker.task_names)
    names = [name for name in answers if name != "score"]
    values = np.stack([answers[name] for name in names], axis=1)
    arrays: dict[str, Any] = {**example, "predictions": values, "score": answers["score"]}
    np.savez(out / "example.npz", **arrays)
    used = [each for each in layout.ids if not each.placement]
    about = {
        "model": ranker.info.name,
        "fingerprint": ranker.info.fingerprint,
        "ids": single_id_names(layout),
        "numbers": layout.dense_names(placement=False),
        "predictions": names,
        "weights": {task.name: task.score_weight for task in layout.tasks},
        "tables": {each.name: each.table for each in used},
        "rows": {each.table: layout.table(each.table).rows for each in used},
    }
    (out / INPUTS_FILE).write_text(json.dumps(about, indent=1, ensure_ascii=False), encoding="utf-8")
    shutil.copyfile(Path(__file__).with_name("onnx.md"), out / "README.md")
    differences = max_relative_differences(answers, load_onnx(out)(example))
    for name, difference in differences.items():
        if not difference <= TOLERANCE:  # nor NaN
            raise UserError(
                f"the ONNX file of '{folder}' does not compute what the model does: for the model's example, '{name}' "
                f"is off by {difference:.2g}. Use the model itself, and report this error."
            )
    return {"max_difference": differences}


def _export(graph: ExportModule, example: Mapping[str, np.ndarray], tree_logits: int) -> torch.onnx.ONNXProgram:
    """The graph of a module for inputs like an example. grown: tasks, of a model with trees."""
    given, sizes, candidates = dict[str, Tensor](), dict[str, Any](), torch.export.Dim("candidates")
    for name, each in example.items():
        any_number = {1: torch.export.Dim.DYNAMIC} if name.startswith("ids.") else {}
        # The exporter would take a size of 1 for fixed.
        given[name] = torch.from_numpy(np.resize(each, (7, 3 if any_number else each.shape[1])))
        sizes[name] = {0: candidates, **any_number}
    more = {"tree_logits": torch.zeros(7, tree_logits)} if tree_logits else {}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # the exporter tells of libraries that no model here uses
    with warnings.catch_warnings(action="ignore"):
        try:
            program = torch.onnx.export(
                graph,
                kwargs={"inputs": given, **more},
                dynamo=True,
                verbose=False,
                opset_version=18,
                input_names=[*given, *more],
                output_names=list(OUTPUT_NAMES),
                dynamic_shapes={"inputs": sizes, **{name: {0: candidates} for name in more}},
            )
        except Exception as error:  # the exporter's, which has causes of many kinds
            raise UserError(f"torch's exporter can't turn this model into ONNX: {one_line(error)[:200]}") from error
    assert program is not None
    return program


def add_trees(path: Path, trees: Trees, names: Sequence[str]) -> None:
    """Puts the trees of a model's tasks into its file, in the place of its input `tree_logits`.

    They read numbers and then ids, the first of which are those that they know. A task without trees gets another
    one's, which its blend does not read.
    """
    import onnx

    helper, model, domain = onnx.helper, onnx.load(path, load_external_data=False), "ai.onnx.ml"
    read = sorted((each.name for each in model.graph.input if each.name in ("numbers", "ids")), reverse=True)
    nodes = [helper.make_node("Cast", [name], [f"read.{name}"], to=onnx.TensorProto.FLOAT) for name in read]
    nodes.append(helper.make_node("Concat", [f"read.{name}" for name in read], ["read"], axis=1))
    for name, text in trees.texts.items():
        own: dict[str, Any] = {"domain": domain, "n_targets": 1, **_as_attributes(read_ensemble(text).trees)}
        nodes.append(helper.make_node("TreeEnsembleRegressor", ["read"], [f"grown.{name}"], **own))
    tree_logits = [f"grown.{name if name in trees.texts else next(iter(trees.texts))}" for name in names]
    nodes.append(helper.make_node("Concat", tree_logits, ["tree_logits"], axis=1))
    for place, node in enumerate(nodes):
        model.graph.node.insert(place, node)
    del model.graph.input[-1]
    model.opset_import.append(helper.make_opsetid(domain, 3))
    onnx.save(model, path)


def _as_attributes(trees: Sequence[Tree]) -> dict[str, list[Any]]:
    """Trees as attributes of a TreeEnsembleRegressor."""
    nodes, leaves = list[dict[str, Any]](), list[dict[str, Any]]()
    for number, tree in enumerate(trees):
        # The root has number 0: splits come first, then leaves, then what sets of ids need.
        splits, count = len(tree.features), 2 * len(tree.features) + 1
        left, right = (np.where(each >= 0, each, splits + ~each).tolist() for each in (tree.left, tree.right))
        for split, feature in enumerate(tree.features.tolist()):
            is_categorical = tree.is_categorical[split]
            values = [
                float(each)
                for each in (tree.left_categories(split) if is_categorical else tree.edges[split : split + 1])
            ]
            chain = [split, *range(count, count + len(values) - 1)]  # all of which go on with the same node
            count += len(values) - 1
            own = {"treeids": number, "featureids": feature, "truenodeids": left[split]}
            own["modes"] = "BRANCH_EQ" if is_categorical else "BRANCH_LEQ"
            for node, value, otherwise in zip(chain, values, [*chain[1:], right[split]], strict=True):
                nodes.append({**own, "nodeids": node, "values": value, "falsenodeids": otherwise})
        for leaf, value in enumerate(tree.values.tolist(), splits):
            own = {"treeids": number, "nodeids": leaf}
            nodes.append({**own, "featureids": 0, "truenodeids": 0, "modes": "LEAF", "values": 0.0, "falsenodeids": 0})
            leaves.append({**own, "ids": 0, "weights": value})
    attributes = {f"nodes_{name}": [each[name] for each in nodes] for name in nodes[0]}
    return attributes | {f"target_{name}": [each[name] for each in leaves] for name in leaves[0]}


def single_id_names(layout: ModelLayout) -> list[str]:
    """The columns of the input `ids`: inputs with one id a row, those that trees read first."""
    first = layout.single_ids()
    single = [each.name for each in layout.ids if not each.is_list and not each.placement]
    return [*first, *(name for name in single if name not in first)]


def encode_request(ranker: Ranker, request: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """What the graph takes for the N candidates of a request, given as arguments of `rank`, see `build_onnx_inputs`.

    Raises RequestError as `rank` does.
    """
    rows = ranker.reader.rows([Request.of(request)])
    return build_onnx_inputs(ranker.layout, *ranker.pipeline.request_inputs(rows), rows.request_index)


def build_onnx_inputs(layout: ModelLayout, shared: Inputs, own: Inputs, of: np.ndarray) -> dict[str, np.ndarray]:
    """The inputs of N candidates by name; none without columns.

    `ids` (N, S) int64: table rows of inputs with one id; `ids.NAME` (N, L) int64: of an input with any number of ids,
    with -1 after a candidate's last one; `numbers` (N, D) float32. shared: inputs of R requests; own: of the
    candidates; of: (N,) int64 the request of each.
    """
    ids: dict[str, Any] = {name: each.take(of) for name, each in shared.ids.items()} | own.ids
    dense = {name: each.take(of) for name, each in shared.dense.items()} | own.dense
    single, numbers, arrays = single_id_names(layout), layout.dense_names(placement=False), dict[str, np.ndarray]()
    if single:
        arrays["ids"] = np.stack([ids[name] for name in single], axis=1)
    for each in (each for each in layout.ids if each.is_list and not each.placement):
        lists = ids[each.name]
        there = np.arange(lists.lengths.max(initial=1)) < lists.lengths[:, None]
        arrays[f"ids.{each.name}"] = np.full(there.shape, -1)
        arrays[f"ids.{each.name}"][there] = lists.values
    if numbers:
        arrays["numbers"] = np.stack([dense[name] for name in numbers], axis=1)
    return arrays


def load_onnx(folder: Path) -> Callable[[Mapping[str, np.ndarray]], ModelOutputs]:
    """What the written file answers for what `encode_request` gives, run as another server would."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / MODEL_FILE), providers=["CPUExecutionProvider"])
    names = json.loads((folder / INPUTS_FILE).read_text(encoding="utf-8"))["predictions"]

    def answer(inputs: Mapping[str, np.ndarray]) -> ModelOutputs:
        values, _, scores = session.run(list(OUTPUT_NAMES), inputs)
        return {**dict(zip(names, values.T.astype(np.float64), strict=True)), "score": scores}

    return answer
