"""Other forms of a model, and how near they are to the model itself.

In int8 it is an artifact folder like any other: tables stay int8 in memory, matrices are computed with in float32.

In ONNX it is all that comes after the features as one graph, in the folder that Triton takes, and what a stranger needs
to use it:

    <folder>/
        1/model.onnx    table rows and numbers of N candidates -> predictions (N, P), log_score (N,), score (N,);
                        weights of more than 1.5 GB lie beside it, in model.onnx.data
        config.pbtxt    its inputs and outputs, as Triton asks for them
        inputs.json     what stands in which column of these
        example.npz     the inputs of the model's example request, and what the model gives for them
        README.md       how to use these

torch's own exporter makes the graph from the code that serves, so that it holds whatever a model's settings ask for:
levels of experts, routing rules, crosses, calibration, regressions, int8 tables.
"""

from __future__ import annotations

import copy
import json
import logging
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from mmoe_rec.errors import UserError, one_line
from mmoe_rec.features.encoder import Inputs
from mmoe_rec.inference.artifact import read_example, read_manifest, read_stored, write_tensors
from mmoe_rec.inference.ranker import Ranker
from mmoe_rec.inference.ranking import Ranking
from mmoe_rec.inference.reader import Request
from mmoe_rec.inference.writing import copy_files, seal
from mmoe_rec.model.forest import Tree, read_ensemble
from mmoe_rec.model.layout import ModelLayout
from mmoe_rec.model.levels import set_compute
from mmoe_rec.model.mmoe import RankingModel
from mmoe_rec.model.products import set_products
from mmoe_rec.model.score import log_predictions, predictions
from mmoe_rec.model.tables import SCALES, PlainTables, quantised, some_in_int8
from mmoe_rec.model.trees import Trees

WEIGHTS = "weights.safetensors"
Dense = Literal["bfloat16", "int8", "float32"]
"""How the matrices of the dense part are stored."""
REQUESTS, CANDIDATES, BEST = 50, 200, 10
Answers = Mapping[str, np.ndarray]
"""What a model answers for the N candidates of a request, in its order: prediction or `score` -> (N,) float64."""
MODEL, INPUTS = "1/model.onnx", "inputs.json"
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
        self.model.mixture.placement = None
        set_products(self.model, "blas")
        set_compute(self.model, "dense")
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
            logits = self._trees.blend(logits, model.in_units(grown.to(logits)), self._names)
        logits = self._calibration.apply(logits, self._names)
        values = predictions(logits, self._kinds)
        both = [(values[:, given] * values[:, task]).unsqueeze(1) for given, task in self._products]
        logs = log_predictions(logits.double(), self._kinds)
        log_score = (logs * logs.new_tensor(self._weights)).sum(1)
        return torch.cat([values, *both], dim=1), log_score, log_score.clamp(max=_LARGEST).exp()


class WholeModel(nn.Module):
    """A ranker's tables and dense part in one module, which takes what `encode` gives."""

    def __init__(self, ranker: Ranker) -> None:
        super().__init__()
        self.dense, self.tables, self._layout = DensePart(ranker), ranker.model.tables, ranker.layout

    def forward(self, inputs: Mapping[str, Tensor], grown: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """What the dense part gives, and with trees takes."""
        tables, layout, embedded = self.tables, self._layout, dict[str, Tensor]()
        assert isinstance(tables, PlainTables)
        ids = {name.removeprefix("ids."): each for name, each in inputs.items() if name.startswith("ids.")}
        if "ids" in inputs:
            ids |= dict(zip(single_names(layout), inputs["ids"].unbind(1), strict=True))
        rows = {name: tables.rows(tables.table_of[name], each.clamp(min=0)) for name, each in ids.items()}
        for name in layout.id_names(placement=False):
            if rows[name].dim() == 2:
                embedded[name] = rows[name]
            else:
                there = (ids[name] >= 0).unsqueeze(2)
                embedded[name] = (rows[name] * there).sum(1) / there.sum(1).clamp(min=1)
        for each in layout.attention:
            pool: Any = self.dense.model.mixture.histories[each.history]  # type: ignore[index]
            parts = layout.parts(each)
            pairs = [(name, partner) for name, partner in parts if partner is not None]
            same = [(ids[name] == ids[partner][:, None]) & (ids[name] != 0) for name, partner in pairs]
            vectors = torch.cat([rows[name] for name, _ in parts], dim=2)
            candidates = torch.cat([rows[partner] for _, partner in pairs], dim=1)
            said = pool.of_lists(vectors, ids[each.history] >= 0, candidates, torch.stack(same, dim=2).float())
            embedded[each.history] = embedded[each.history] + said
        numbers = [inputs["numbers"]] if "numbers" in inputs else []
        return self.dense(torch.cat([*embedded.values(), *numbers], dim=1), grown)


def write_onnx(folder: Path, ranker: Ranker, made: Path) -> None:
    """Writes the model of an artifact folder, loaded as `ranker`, to an empty folder. Raises UserError for one that the
    exporter can't follow."""
    request = read_example(folder)
    layout, trees = ranker.layout, ranker.model.trees
    example, answers = encode(ranker, request), answers_of(ranker.rank(**request))
    grows = trees is not None and bool(trees.texts)  # or of no task
    (made / MODEL).parent.mkdir()
    _export(WholeModel(ranker), example, len(ranker.names) if grows else 0).save(made / MODEL)
    if trees is not None and grows:
        add_trees(made / MODEL, trees, ranker.names)
    names = [name for name in answers if name != "score"]
    values = np.stack([answers[name] for name in names], axis=1)
    arrays: dict[str, Any] = {**example, "predictions": values, "score": answers["score"]}
    np.savez(made / "example.npz", **arrays)
    used = [each for each in layout.ids if not each.placement]
    about = {
        "format": 2,
        "model": ranker.about.name,
        "fingerprint": ranker.about.fingerprint,
        "ids": single_names(layout),
        "numbers": layout.dense_names(placement=False),
        "predictions": names,
        "weights": {task.name: task.score_weight for task in layout.tasks},
        "tables": {each.name: each.table for each in used},
        "rows": {each.table: layout.table(each.table).rows for each in used},
    }
    (made / INPUTS).write_text(json.dumps(about, indent=1, ensure_ascii=False), encoding="utf-8")
    (made / "config.pbtxt").write_text(_configure(made / MODEL, ranker.about.max_candidates), encoding="utf-8")
    shutil.copyfile(Path(__file__).with_name("onnx.md"), made / "README.md")


def _export(whole: WholeModel, example: Mapping[str, np.ndarray], grown: int) -> torch.onnx.ONNXProgram:
    """The graph of a module for inputs like an example. grown: tasks, of a model with trees."""
    given, sizes, candidates = dict[str, Tensor](), dict[str, Any](), torch.export.Dim("candidates")
    for name, each in example.items():
        any_number = {1: torch.export.Dim.DYNAMIC} if name.startswith("ids.") else {}
        # The exporter would take a size of 1 for fixed.
        given[name] = torch.from_numpy(np.resize(each, (7, 3 if any_number else each.shape[1])))
        sizes[name] = {0: candidates, **any_number}
    more = {"grown": torch.zeros(7, grown)} if grown else {}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # the exporter tells of libraries that no model here uses
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            program = torch.onnx.export(
                whole,
                kwargs={"inputs": given, **more},
                dynamo=True,
                verbose=False,
                opset_version=18,
                input_names=[*given, *more],
                output_names=list(OUTPUTS),
                dynamic_shapes={"inputs": sizes, **{name: {0: candidates} for name in more}},
            )
        except Exception as error:  # the exporter's, which has causes of many kinds
            raise UserError(f"torch's exporter can't turn this model into ONNX: {one_line(error)[:200]}") from error
    assert program is not None
    return program


def add_trees(path: Path, trees: Trees, names: Sequence[str]) -> None:
    """Puts the trees of a model's tasks into its file, in the place of its input `grown`.

    They read numbers and then ids, the first of which are those that they know. A task without trees gets another
    one's, which its blend does not read.
    """
    import onnx

    model = onnx.load(path, load_external_data=False)
    read = [each.name for each in model.graph.input if each.name in ("numbers", "ids")]
    nodes = [onnx.helper.make_node("Cast", [name], [f"read.{name}"], to=onnx.TensorProto.FLOAT) for name in read]
    read = [f"read.{name}" for name in sorted(read, reverse=True)]
    nodes.append(onnx.helper.make_node("Concat", read, ["read"], axis=1))
    kind, domain = "TreeEnsembleRegressor", "ai.onnx.ml"
    for name, text in trees.texts.items():
        own = {"domain": domain, "n_targets": 1, **_as_attributes(read_ensemble(text).trees)}
        nodes.append(onnx.helper.make_node(kind, ["read"], [f"grown.{name}"], **own))
    grown = [f"grown.{name}" if name in trees.texts else f"grown.{next(iter(trees.texts))}" for name in names]
    nodes.append(onnx.helper.make_node("Concat", grown, ["grown"], axis=1))
    for place, node in enumerate(nodes):
        model.graph.node.insert(place, node)
    del model.graph.input[-1]
    model.opset_import.append(onnx.helper.make_opsetid(domain, 3))
    onnx.save(model, path)


def _as_attributes(trees: Sequence[Tree]) -> dict[str, Any]:
    """Trees as attributes of a TreeEnsembleRegressor."""
    found: dict[str, list[Any]] = {}

    def add(kind: str, **values: Any) -> None:
        for name, value in values.items():
            found.setdefault(f"{kind}_{name}", []).append(value)

    for number, tree in enumerate(trees):
        # The root has number 0: splits come first, then leaves, then what sets of ids need.
        splits, count = len(tree.features), 2 * len(tree.features) + 1
        left, right = (np.where(each >= 0, each, splits + ~each).tolist() for each in (tree.left, tree.right))
        for split, feature in enumerate(tree.features.tolist()):
            own = {"treeids": number, "nodeids": split, "featureids": feature, "truenodeids": left[split]}
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


def single_names(layout: ModelLayout) -> list[str]:
    """The columns of the input `ids`: inputs with one id a row, those that trees read first."""
    first = layout.single_ids()
    single = [each.name for each in layout.ids if not each.many and not each.placement]
    return [*first, *(name for name in single if name not in first)]


def encode(ranker: Ranker, request: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """What the graph takes for the N candidates of a request, given as arguments of `rank`, see `as_arrays`.

    Raises RequestError as `rank` does.
    """
    rows = ranker.reader.rows([Request.of(request)])
    return as_arrays(ranker.layout, *ranker.pipeline.request_inputs(rows), rows.of)


def as_arrays(layout: ModelLayout, shared: Inputs, own: Inputs, of: np.ndarray) -> dict[str, np.ndarray]:
    """The inputs of N candidates by name; none without columns.

    `ids` (N, S) int64: table rows of inputs with one id; `ids.NAME` (N, L) int64: of an input with any number of ids,
    with -1 after a candidate's last one; `numbers` (N, D) float32. shared: inputs of R requests; own: of the
    candidates; of: (N,) int64 the request of each.
    """
    ids: dict[str, Any] = {name: each.take(of) for name, each in shared.ids.items()} | own.ids
    dense = {name: each.take(of) for name, each in shared.dense.items()} | own.dense
    single, numbers, arrays = single_names(layout), layout.dense_names(placement=False), dict[str, np.ndarray]()
    if single:
        arrays["ids"] = np.stack([ids[name] for name in single], axis=1)
    for each in (each for each in layout.ids if each.many and not each.placement):
        lists = ids[each.name]
        there = np.arange(lists.lengths.max(initial=1)) < lists.lengths[:, None]
        arrays[f"ids.{each.name}"] = np.full(there.shape, -1)
        arrays[f"ids.{each.name}"][there] = lists.values
    if numbers:
        arrays["numbers"] = np.stack([dense[name] for name in numbers], axis=1)
    return arrays


def open_onnx(file: Path) -> Any:
    """A written file as onnxruntime runs it."""
    import onnxruntime

    return onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])


def load_onnx(folder: Path) -> Callable[[Mapping[str, np.ndarray]], Answers]:
    """What the written file answers for what `encode` gives, run as another server would."""
    session = open_onnx(folder / MODEL)
    names = json.loads((folder / INPUTS).read_text(encoding="utf-8"))["predictions"]

    def answer(inputs: Mapping[str, np.ndarray]) -> Answers:
        values, _, scores = session.run(list(OUTPUTS), inputs)
        return {**dict(zip(names, values.T.astype(np.float64), strict=True)), "score": scores}

    return answer


def check_equal(pairs: Sequence[tuple[Answers, Answers]], chooses: bool) -> None:
    """Raises UserError where the second form gives another prediction or score: off by more than TOLERANCE, or by more
    than that share of a value over 1.

    chooses: gates choose some of the experts. Where two are equally good but for rounding, the forms may choose
    differently, so one row in a thousand may be off.
    """
    apart = [
        [np.abs(other[name] - one[name]) / np.maximum(1.0, np.abs(one[name])) for name in one] for one, other in pairs
    ]
    off = np.concatenate([np.max(each, axis=0) for each in apart])
    off = np.where(np.isnan(off), np.inf, off)
    if (wrong := int((off > TOLERANCE).sum())) > len(off) * chooses / 1000:
        raise UserError(
            f"the ONNX file does not compute what the model does: {wrong:,} of {len(off):,} candidates are off, by "
            f"{off.max():.2g} at most"
        )


def _configure(file: Path, candidates: int) -> str:
    """Triton's `config.pbtxt` of a written file, for so many candidates at a time."""
    session = open_onnx(file)
    lines = ['backend: "onnxruntime"', f"max_batch_size: {candidates}", "dynamic_batching { }"]
    types = {"tensor(int64)": "TYPE_INT64", "tensor(float)": "TYPE_FP32", "tensor(double)": "TYPE_FP64"}
    for kind, parts in (("input", session.get_inputs()), ("output", session.get_outputs())):
        for each in parts:
            sizes = [size if isinstance(size, int) else -1 for size in each.shape[1:]]
            dims = f"dims: {sizes}" if sizes else "dims: [1] reshape: { shape: [] }"  # which has to say something
            lines.append(f"{kind} {{ name: {json.dumps(each.name)} data_type: {types[each.type]} {dims} }}")
    return "\n".join([*lines, ""])


# How near the forms are to each other


def draw_requests(folder: Path, ranker: Ranker, requests: int = REQUESTS) -> Iterator[dict[str, Any]]:
    """Arguments of `Ranker.rank`, the same ones at every call: users and candidates that the model knows, in the
    context of its folder's example; of a model that knows none only the example."""
    random = np.random.default_rng(0)
    example = read_example(folder)
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
