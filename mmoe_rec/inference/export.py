"""Export a model to int8 or ONNX, and measure the difference from the original.

An int8 model is an ordinary artifact folder. Its tables stay int8 in memory, and its bfloat16 matrices become float32.
An ONNX file computes scores from encoded features, for other servers:

    <folder>/
        model.onnx      IDs and numbers of N candidates -> predictions (N, P), log_score (N,), score (N,). IDs are
                        rows of embedding tables, and P counts tasks and joint outcomes.
                        Weights of more than 1.5 GB are in model.onnx.data
        inputs.json     names of the input columns, and their tables
        example.npz     inputs of the model's example request, and the model's outputs
        README.md       how to use these files
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
"""Predictions and `score` of a request's N candidates by name, (N,) float64 each, in the order of the request."""


def write_int8(folder: Path, out: Path) -> dict[str, Any]:
    """Write an artifact with int8 tables and bfloat16 matrices.

    Biases and gates keep their precision, because rounded gates may choose other experts.

    Args:
        folder: Artifact folder of the original model.
        out: Empty folder for the int8 model.

    Returns:
        `bytes`, with the sizes of both models, and `max_difference` between their outputs for the example request (see
        `max_relative_differences`).

    Raises:
        UserError: The folder was modified, or its weights are already int8 or not finite.
    """
    weights, int8_weights = read_tensors(folder / WEIGHTS_FILE), {}
    if has_int8_weights(weights):
        raise UserError(f"The model in '{folder}' is in int8 already. Name the original model.")
    for name, weight in weights.items():
        if not weight.isfinite().all():
            raise UserError(f"weight '{name}' holds NaN or infinity, which int8 lacks. Train the model again.")
        if name.startswith("tables."):
            int8_weights[name], int8_weights[name + SCALES_SUFFIX] = quantize(weight)
        else:
            int8_weights[name] = weight.bfloat16() if name.endswith(".weight") and ".gates." not in name else weight
    copy_files(folder, out, exclude_prefix=WEIGHTS_FILE)
    write_tensors(int8_weights, out / WEIGHTS_FILE)
    finalize_artifact(out)
    model, small = (outputs_in_request_order(Ranker.load(path).rank(**read_example(folder))) for path in (folder, out))
    sizes = {"model": _count_bytes(folder), "int8": _count_bytes(out)}
    return {"bytes": sizes, "max_difference": max_relative_differences(model, small)}


def _count_bytes(folder: Path) -> dict[str, int]:
    """Return the bytes of an artifact's tables, of its other weights, and of all its files including features."""
    sizes = {"tables": 0, "dense": 0}
    for name, weight in read_tensors(folder / WEIGHTS_FILE).items():
        sizes["tables" if name.startswith("tables.") else "dense"] += weight.nbytes
    return sizes | {"all files": sum((folder / name).stat().st_size for name in read_manifest(folder))}


def outputs_in_request_order(ranking: Ranking) -> ModelOutputs:
    """Return the predictions and scores of a ranking of all candidates, in the order of the request."""
    ranks = np.argsort(ranking.order)
    values = {**ranking.predictions, "score": ranking.scores}
    return {name: np.array(outputs, np.float64)[ranks] for name, outputs in values.items()}


def max_relative_differences(base: ModelOutputs, outputs: ModelOutputs) -> dict[str, float]:
    """Return output name -> largest difference over the candidates. Differences of values over 1 are relative.

    Args:
        base: Outputs of the original model.
        outputs: Outputs of the other model.
    """
    gaps = {name: np.abs(outputs[name] - values) / np.maximum(1.0, np.abs(values)) for name, values in base.items()}
    return {name: float(gap.max()) for name, gap in gaps.items()}


MODEL_FILE, INPUTS_FILE = "model.onnx", "inputs.json"
OUTPUT_NAMES = ("predictions", "log_score", "score")
TOLERANCE = 1e-5
_LARGEST = float(np.log(np.finfo(np.float64).max))


class _ExportModule(nn.Module):
    """The computation from encoded inputs to scores, for export. All experts run, so the graph has no branches."""

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
        """Compute the outputs of `_dense` from the arrays of `build_onnx_inputs` and the (N, T) logits of the trees."""
        tables, layout, embedded = self.model.tables, self._layout, list[Tensor]()
        assert isinstance(tables, PlainTables)
        ids = {name.removeprefix("ids."): values for name, values in inputs.items() if name.startswith("ids.")}
        if "ids" in inputs:
            ids |= dict(zip(_single_id_names(layout), inputs["ids"].unbind(1), strict=True))
        for name in layout.id_names(placement=False):
            rows = tables.rows(tables.table_of[name], ids[name].clamp(min=0))
            if rows.dim() == 3:
                present = (ids[name] >= 0).unsqueeze(2)
                rows = (rows * present).sum(1) / present.sum(1).clamp(min=1)
            embedded.append(rows)
        numbers = [inputs["numbers"]] if "numbers" in inputs else []
        return self._dense(torch.cat([*embedded, *numbers], dim=1), tree_logits)

    def _dense(self, inputs: Tensor, tree_logits: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Compute predictions (N, P), first of tasks, then of joint outcomes; log scores and scores, (N,) float64."""
        model, tasks = self.model, self._layout.tasks
        logits = model.forward_inputs(inputs[:, : model.width], None).logits
        if self._trees is not None and tree_logits is not None:
            logits = self._trees.blend(logits, model.to_label_units(tree_logits.to(logits)), self._names)
        logits, kinds = self._calibration.apply(logits, self._names), [task.kind for task in tasks]
        values, logs = predictions(logits, kinds), log_predictions(logits.double(), kinds)
        pairs = self._layout.joint_outcomes.values()
        joint = [(values[:, condition] * values[:, task]).unsqueeze(1) for condition, task in pairs]
        log_score = (logs * logs.new_tensor([task.score_weight for task in tasks])).sum(1)
        return torch.cat([values, *joint], dim=1), log_score, log_score.clamp(max=_LARGEST).exp()


def write_onnx(folder: Path, out: Path) -> dict[str, Any]:
    """Write the model of an artifact folder as an ONNX file.

    Args:
        folder: Artifact folder of the model.
        out: Empty folder for the ONNX file.

    Returns:
        `max_difference` between model and file on the example request (see `max_relative_differences`).

    Raises:
        UserError: The model has attention, torch can't export it, or the file gives different predictions.
    """
    ranker = Ranker.load(folder)
    if ranker.layout.attention:
        history = ranker.layout.attention[0].history
        problem = f"feature '{history}' is pooled by attention, which ONNX export lacks"
        raise UserError(f"{problem}. Train with pooling: mean.")
    request, layout, trees = read_example(folder), ranker.layout, ranker.model.trees
    example, outputs = encode_request(ranker, request), outputs_in_request_order(ranker.rank(**request))
    has_trees = trees is not None and bool(trees.texts)  # `trees` may cover no task.
    _export(_ExportModule(ranker), example, len(ranker.task_names) if has_trees else 0).save(out / MODEL_FILE)
    if trees is not None and has_trees:
        add_trees(out / MODEL_FILE, trees, ranker.task_names)
    names = [name for name in outputs if name != "score"]
    values = np.stack([outputs[name] for name in names], axis=1)
    arrays: dict[str, Any] = {**example, "predictions": values, "score": outputs["score"]}
    np.savez(out / "example.npz", **arrays)
    id_inputs = [id_input for id_input in layout.ids if not id_input.placement]
    description = {
        "model": ranker.info.name,
        "fingerprint": ranker.info.fingerprint,
        "ids": _single_id_names(layout),
        "numbers": layout.dense_names(placement=False),
        "predictions": names,
        "weights": {task.name: task.score_weight for task in layout.tasks},
        "tables": {id_input.name: id_input.table for id_input in id_inputs},
        "rows": {id_input.table: layout.table(id_input.table).rows for id_input in id_inputs},
    }
    (out / INPUTS_FILE).write_text(json.dumps(description, indent=1, ensure_ascii=False), encoding="utf-8")
    shutil.copyfile(Path(__file__).with_name("onnx.md"), out / "README.md")
    differences = max_relative_differences(outputs, load_onnx(out)(example))
    for name, difference in differences.items():
        if not difference <= TOLERANCE:  # This refuses NaN too.
            raise UserError(
                f"The ONNX file of '{folder}' differs from the model: for the model's example, '{name}' "
                f"is off by {difference:.2g}. Use the model itself, and report this error."
            )
    return {"max_difference": differences}


def _export(graph: _ExportModule, example: Mapping[str, np.ndarray], tree_logits: int) -> torch.onnx.ONNXProgram:
    """Export a module as ONNX for inputs like an example. `tree_logits` is the number of tasks, 0 without trees."""
    tensors, sizes, candidates = dict[str, Tensor](), dict[str, Any](), torch.export.Dim("candidates")
    for name, array in example.items():
        list_length = {1: torch.export.Dim.DYNAMIC} if name.startswith("ids.") else {}
        # The exporter treats sizes of 1 as constants, so enlarge the example.
        tensors[name] = torch.from_numpy(np.resize(array, (7, 3 if list_length else array.shape[1])))
        sizes[name] = {0: candidates, **list_length}
    tree_inputs = {"tree_logits": torch.zeros(7, tree_logits)} if tree_logits else {}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # Hide messages about unused libraries.
    with warnings.catch_warnings(action="ignore"):
        try:
            program = torch.onnx.export(
                graph,
                kwargs={"inputs": tensors, **tree_inputs},
                dynamo=True,
                verbose=False,
                opset_version=18,
                input_names=[*tensors, *tree_inputs],
                output_names=list(OUTPUT_NAMES),
                dynamic_shapes={"inputs": sizes, **{name: {0: candidates} for name in tree_inputs}},
            )
        except Exception as error:  # The exporter raises many types of errors.
            raise UserError(f"torch's exporter can't turn this model into ONNX: {one_line(error)[:200]}") from error
    assert program is not None
    return program


def add_trees(path: Path, trees: Trees, names: Sequence[str]) -> None:
    """Put the trees of a model's tasks into its ONNX file, replacing the input `tree_logits`.

    The trees' features are the columns of the input `numbers`, followed by the first columns of `ids`. The graph needs
    tree logits for every task. A task without trees gets another task's trees, but `Trees.blend` ignores them.

    Args:
        path: ONNX file to change.
        trees: Trees of the tasks.
        names: Names of all tasks.
    """
    import onnx

    helper, model, domain = onnx.helper, onnx.load(path, load_external_data=False), "ai.onnx.ml"
    inputs = sorted((value.name for value in model.graph.input if value.name in ("numbers", "ids")), reverse=True)
    nodes = [helper.make_node("Cast", [name], [f"read.{name}"], to=onnx.TensorProto.FLOAT) for name in inputs]
    nodes.append(helper.make_node("Concat", [f"read.{name}" for name in inputs], ["read"], axis=1))
    for name, text in trees.texts.items():
        attributes: dict[str, Any] = {"domain": domain, "n_targets": 1, **_tree_attributes(read_ensemble(text).trees)}
        nodes.append(helper.make_node("TreeEnsembleRegressor", ["read"], [f"trees.{name}"], **attributes))
    tree_logits = [f"trees.{name if name in trees.texts else next(iter(trees.texts))}" for name in names]
    nodes.append(helper.make_node("Concat", tree_logits, ["tree_logits"], axis=1))
    for index, node in enumerate(nodes):
        model.graph.node.insert(index, node)
    del model.graph.input[-1]
    model.opset_import.append(helper.make_opsetid(domain, 3))
    onnx.save(model, path)


def _tree_attributes(trees: Sequence[Tree]) -> dict[str, list[Any]]:
    """Return trees as attributes of the ONNX operator TreeEnsembleRegressor."""
    nodes, leaves = list[dict[str, Any]](), list[dict[str, Any]]()
    for number, tree in enumerate(trees):
        # Number the nodes: first splits (the root is 0), then leaves, then the extra nodes of splits by several IDs.
        splits, next_id = len(tree.features), 2 * len(tree.features) + 1
        left, right = (np.where(child >= 0, child, splits + ~child).tolist() for child in (tree.left, tree.right))
        for split, feature in enumerate(tree.features.tolist()):
            is_categorical = tree.is_categorical[split]
            edges: Any = tree.left_categories(split) if is_categorical else tree.edges[split : split + 1]
            values = [float(edge) for edge in edges]
            node_ids = [split, *range(next_id, next_id + len(values) - 1)]  # One node for each category of a split.
            next_id += len(values) - 1
            base = {"treeids": number, "featureids": feature, "truenodeids": left[split]}
            base["modes"] = "BRANCH_EQ" if is_categorical else "BRANCH_LEQ"
            for node, value, next_node in zip(node_ids, values, [*node_ids[1:], right[split]], strict=True):
                nodes.append({**base, "nodeids": node, "values": value, "falsenodeids": next_node})
        for leaf, value in enumerate(tree.values.tolist(), splits):
            base = {"treeids": number, "nodeids": leaf}
            nodes.append({**base, "featureids": 0, "truenodeids": 0, "modes": "LEAF", "values": 0.0, "falsenodeids": 0})
            leaves.append({**base, "ids": 0, "weights": value})
    attributes = {f"nodes_{name}": [entry[name] for entry in nodes] for name in nodes[0]}
    return attributes | {f"target_{name}": [entry[name] for entry in leaves] for name in leaves[0]}


def _single_id_names(layout: ModelLayout) -> list[str]:
    """Return the inputs with one ID per row, as the columns of `ids` are ordered: first the inputs that trees read."""
    tree_ids = layout.single_ids()
    single = [id_input.name for id_input in layout.ids if not id_input.is_list and not id_input.placement]
    return [*tree_ids, *(name for name in single if name not in tree_ids)]


def encode_request(ranker: Ranker, request: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return the inputs of the ONNX graph for the N candidates of a request, see `build_onnx_inputs`.

    Args:
        ranker: Loaded model.
        request: Arguments of `Ranker.rank`.

    Raises:
        RequestError: The request is invalid.
    """
    rows = ranker.reader.rows([Request.of(request)])
    return build_onnx_inputs(ranker.layout, *ranker.pipeline.request_inputs(rows), rows.request_index)


def build_onnx_inputs(
    layout: ModelLayout, requests: Inputs, candidates: Inputs, request_index: np.ndarray
) -> dict[str, np.ndarray]:
    """Build the inputs of the ONNX graph for N candidates.

    Args:
        layout: Layout of the model.
        requests: Features that are shared by all candidates of a request, for R requests.
        candidates: Features of the N candidates.
        request_index: Index of each candidate's request, (N,) int64.

    Returns:
        Arrays by name, without empty ones. `ids` (N, S) int64 contains rows of embedding tables, for the S inputs with
        one ID. `ids.NAME` (N, L) int64 contains such rows for an input with up to L IDs, padded with -1. `numbers`
        is (N, D) float32, with D dense inputs.
    """
    ids: dict[str, Any] = {name: values.take(request_index) for name, values in requests.ids.items()} | candidates.ids
    dense = {name: values.take(request_index) for name, values in requests.dense.items()} | candidates.dense
    single, numbers, arrays = _single_id_names(layout), layout.dense_names(placement=False), dict[str, np.ndarray]()
    if single:
        arrays["ids"] = np.stack([ids[name] for name in single], axis=1)
    for column in (column for column in layout.ids if column.is_list and not column.placement):
        lists = ids[column.name]
        present = np.arange(lists.lengths.max(initial=1)) < lists.lengths[:, None]
        arrays[f"ids.{column.name}"] = np.full(present.shape, -1)
        arrays[f"ids.{column.name}"][present] = lists.values
    if numbers:
        arrays["numbers"] = np.stack([dense[name] for name in numbers], axis=1)
    return arrays


def load_onnx(folder: Path) -> Callable[[Mapping[str, np.ndarray]], ModelOutputs]:
    """Return a function that runs the ONNX file of a folder in onnxruntime, on inputs as from `encode_request`."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / MODEL_FILE), providers=["CPUExecutionProvider"])
    names = json.loads((folder / INPUTS_FILE).read_text(encoding="utf-8"))["predictions"]

    def answer(inputs: Mapping[str, np.ndarray]) -> ModelOutputs:
        values, _, scores = session.run(list(OUTPUT_NAMES), inputs)
        return {**dict(zip(names, values.T.astype(np.float64), strict=True)), "score": scores}

    return answer
