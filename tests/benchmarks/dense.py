"""python -m tests.benchmarks.dense MODEL 5 500

What engines take for the dense part of a request of so many candidates, from its inputs to calibrated predictions, in
one thread: milliseconds of each, as JSON, by number of candidates; and by how much the predictions of any two differ at
most on 10,000 logged rows, the first ones of validation.

modules_blas, modules_onednn  the modules that are trained, by either library of products;
fused_blas, fused_onednn      `mmoe_rec.model.fused`, which serves;
onnx                          the same graph as torch exports it, by ONNX Runtime.

Trees take as long in each: they are read by `mmoe_rec.model.forest`, which is faster than ONNX Runtime's and
LightGBM's own from some ten candidates on.
"""

import itertools
import json
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from mmoe_rec.batches.batch import make_batch
from mmoe_rec.batches.encoded_rows import EncodedRows
from mmoe_rec.inference.export import DensePart
from mmoe_rec.inference.ranker import Ranker
from mmoe_rec.inference.reader import Request
from mmoe_rec.model.products import Products, has_onednn
from mmoe_rec.preprocessing.prepare import FeatureFolder
from tests.benchmarks.serving_models import Bodies

TURNS, ROWS = 60, 10_000
Engine = Callable[[torch.Tensor], np.ndarray]
"""Inputs (N, W) -> predictions (N, T)."""


def by_ours(model: Path, products: Products, fused: bool) -> Engine:
    """What scores in a ranker."""
    scorer = Ranker.load(model).scorer
    scorer.multiply_by(products)
    if not fused:
        scorer.fused = None
    return lambda inputs: scorer.score(inputs).values


def by_onnx(model: Path, example: torch.Tensor) -> Engine:
    """ONNX Runtime, with what trees say from ours."""
    ranker = Ranker.load(model)
    first, trees = ranker.model.width - len(ranker.model.dense_columns), ranker.model.trees

    def given(inputs: torch.Tensor) -> list[torch.Tensor]:
        return [inputs] if trees is None else [inputs, trees.logits(inputs[:, first:], ranker.names).float()]

    names = ["inputs", "grown"][: len(given(example))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            DensePart(ranker).eval(),
            tuple(given(example)),
            dynamo=True,
            verbose=False,
            opset_version=18,
            input_names=names,
            dynamic_shapes=tuple({0: torch.export.Dim("candidates")} for _ in names),
        )
    assert program is not None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    content, providers = program.model_proto.SerializeToString(), ["CPUExecutionProvider"]
    session: Any = onnxruntime.InferenceSession(content, options, providers=providers)

    def run(inputs: torch.Tensor) -> np.ndarray:
        values = session.run(None, dict(zip(names, (each.numpy() for each in given(inputs)), strict=True)))[0]
        return values[:, : len(ranker.names)]

    return run


def inputs_of(ranker: Ranker, request: dict[str, Any]) -> torch.Tensor:
    """(N, W) float32: the inputs of the dense part for the candidates of a request."""
    rows = ranker.reader.rows([Request.of(request)])
    return ranker.request_inputs.matrix(*ranker.pipeline.request_inputs(rows), rows.of)


def largest_difference(model: Path, engines: Mapping[str, Engine], ranker: Ranker) -> float:
    """Of any prediction by two engines."""
    rows = EncodedRows(FeatureFolder(model.parent / "features").split("validation"), ranker.layout)
    batches = itertools.islice(rows.stream(ROWS // 10), 10)
    found = []
    for batch, _ in batches:
        with torch.inference_mode():
            given = make_batch(batch.encoded, ranker.layout, batch.labels, torchrec=False)
            inputs = ranker.model.side_by_side(given)[0]
        values = np.stack([engine(inputs) for engine in engines.values()])
        found.append(float(np.ptp(values, axis=0).max()))
    return max(found)


def main() -> None:
    """Prints the figures."""
    torch.set_num_threads(1)
    model, bodies, found = Path(sys.argv[1]), Bodies(Path(sys.argv[1])), dict[str, dict[str, float]]()
    ranker = Ranker.load(model)
    every: list[Products] = ["blas", "onednn"] if has_onednn() else ["blas"]
    engines = {f"fused_{each}": by_ours(model, each, True) for each in every}
    engines |= {f"modules_{each}": by_ours(model, each, False) for each in every}
    engines["onnx"] = by_onnx(model, inputs_of(ranker, bodies.elements(8, 1)[0]))
    for count in map(int, sys.argv[2:]):
        inputs = inputs_of(ranker, bodies.elements(count, 1)[0])
        taken: dict[str, list[float]] = {name: [] for name in engines}
        expected = engines["modules_blas"](inputs)
        for turn in range(-10, TURNS):
            for name, engine in engines.items():
                start = time.perf_counter()
                values = engine(inputs)
                if turn >= 0:
                    taken[name].append(time.perf_counter() - start)
                np.testing.assert_allclose(values, expected, atol=1e-5)
        found[str(count)] = {name: round(1e3 * float(np.median(each)), 3) for name, each in taken.items()}
    print(json.dumps({"milliseconds": found, "largest_difference": largest_difference(model, engines, ranker)}))


if __name__ == "__main__":
    main()
