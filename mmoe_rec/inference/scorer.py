"""From the features of requests to predictions: logits are calibrated, and results are checked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from mmoe_rec.batches.batch import same_ids
from mmoe_rec.errors import RequestError
from mmoe_rec.features.encoder import Inputs
from mmoe_rec.inference.artifact import ArtifactInfo
from mmoe_rec.model.attention import HistoryAttention
from mmoe_rec.model.fused import build_fused_forward, check_fused_forward
from mmoe_rec.model.matmul import MatmulBackend, set_matmul_backend
from mmoe_rec.model.mmoe import Outputs, RankingModel
from mmoe_rec.model.model_layout import ModelLayout
from mmoe_rec.model.score import Calibration, log_predictions, predictions
from mmoe_rec.model.tables import Int8EmbeddingBag, PlainTables
from mmoe_rec.point_in_time.arrays import Ragged, concat_ranges


class InputMatrixBuilder:
    """Puts the inputs of requests (all but placement) side by side, as `RankingModel.concat_inputs` does those of a
    batch: what describes user and context is looked up once, and spread over candidates.
    """

    def __init__(
        self, layout: ModelLayout, tables: PlainTables, with_ids: bool, histories: HistoryAttention | None
    ) -> None:
        """with_ids: for a model with trees; histories: those that attention pools."""
        self._tables, self._histories = tables, histories
        self._parts = {each.history: layout.history_inputs(each) for each in layout.attention}
        bags: Mapping[str, Any] = dict(tables.embedding_bags.items())
        self._weights = {
            name: b.weight.detach().numpy() for name, b in bags.items() if not isinstance(b, Int8EmbeddingBag)
        }
        self._table_of = {each.name: each.table for each in layout.ids}
        self._columns: list[tuple[str, str, slice]] = []  # input, table, columns of the matrix
        width = 0
        for name in layout.id_names(placement=False):
            columns = slice(width, width + layout.table(self._table_of[name]).dim)
            self._columns.append((name, self._table_of[name], columns))
            width = columns.stop
        self._numbers = list(enumerate(layout.dense_names(placement=False), width))
        width += len(self._numbers)
        self._ids = list(enumerate(layout.single_ids() if with_ids else [], width))
        self.width = width + len(self._ids)

    def build_matrix(self, shared: Inputs, own: Inputs, of: np.ndarray) -> Tensor:
        """(N, width) float32 of N candidates. shared: inputs of R requests; own: of the candidates; of: (N,) int64 the
        request of each."""
        requests = int(of[-1]) + 1 if len(of) else 0
        spread = np.empty((requests, self.width), np.float32)
        self._write(spread, shared)
        matrix = spread.take(of, axis=0)
        self._write(matrix, own)
        inputs = torch.from_numpy(matrix)
        for name, parts in self._parts.items():
            inputs = self._look_at_candidates(name, parts, inputs, {**shared.ids, **own.ids}, of)
        return inputs

    def _look_at_candidates(
        self,
        name: str,
        parts: Sequence[tuple[str, str | None]],
        inputs: Tensor,
        ids: Mapping[str, Any],
        of: np.ndarray,
    ) -> Tensor:
        """Inputs (N, width) with what a history's events say of each candidate; events are read once a request."""
        lists = ids[name]
        assert self._histories is not None
        assert isinstance(lists, Ragged)
        lengths = lists.lengths[of]
        events, rows = concat_ranges(lists.offsets[of], lengths), np.arange(len(of)).repeat(lengths)
        values = {part: ids[part].values for part, _ in parts}
        pairs = [(part, partner) for part, partner in parts if partner is not None]
        same = np.empty((len(rows), len(pairs)), np.float32)
        for column, (part, partner) in enumerate(pairs):
            same[:, column] = same_ids(values[part][events], ids[partner][rows])
        later = lists.offsets[1:].repeat(lists.lengths) - 1 - np.arange(len(lists.values))
        with torch.inference_mode():
            own = [self._tables.rows(self._table_of[part], torch.from_numpy(each)) for part, each in values.items()]
            of_events = (torch.from_numpy(each) for each in (later, rows, same, events))
            return self._histories.attend(name, inputs, torch.cat(own, dim=1), *of_events)

    def _write(self, matrix: np.ndarray, inputs: Inputs) -> None:
        for name, table, columns in self._columns:
            if (ids := inputs.ids.get(name)) is not None:
                matrix[:, columns] = self._embed(table, ids)
        for column, name in self._numbers:
            if (numbers := inputs.dense.get(name)) is not None:
                matrix[:, column] = numbers
        for column, name in self._ids:
            if (ids := inputs.ids.get(name)) is not None:
                matrix[:, column] = ids

    def _embed(self, table: str, ids: np.ndarray | Ragged) -> np.ndarray:
        if not isinstance(ids, Ragged) and table in self._weights:
            return self._weights[table].take(ids, axis=0)
        bag: Any = self._tables.embedding_bags[table]
        if isinstance(ids, Ragged):
            embedded = bag(torch.from_numpy(ids.values), torch.from_numpy(ids.offsets)).detach()
        else:
            embedded = bag.rows(torch.from_numpy(ids))
        return np.asarray(embedded)


# What the model computes of so many rows stays in a processor's cache: 16,384 rows at a time take 1.7 times as long.
CHUNK_ROWS = 1_024


class ExpertOptions(NamedTuple):
    """What a request asks of the experts. top_k: experts per row and gate, None is the model's own number; masked:
    numbers of experts to leave out."""

    top_k: int | None = None
    masked: tuple[int, ...] = ()


_MODELS_OWN = ExpertOptions()


@dataclass(frozen=True)
class Scored:
    """Results of N rows: predictions (N, T), float32, or float64 where a task is a regression; their logs (N, T)
    float64; sentences about tasks without experts; and where it was asked for, predictions before calibration (N, T)
    and gates (N, T, E) float32, each task's weights of the experts of the last level."""

    predictions: np.ndarray
    log_predictions: np.ndarray
    warnings: tuple[str, ...] = ()
    uncalibrated: np.ndarray | None = None
    gates: np.ndarray | None = None

    @staticmethod
    def join(parts: "Sequence[Scored]", tasks: int) -> "Scored":
        if len(parts) == 1:
            return parts[0]
        if not parts:
            return Scored(np.empty((0, tasks), np.float32), np.empty((0, tasks)))
        every = ("predictions", "log_predictions", "uncalibrated", "gates")
        names = [name for name in every if getattr(parts[0], name) is not None]
        joined = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
        return Scored(**joined, warnings=parts[0].warnings)


class Scorer:
    """A `RankingModel` over `PlainTables` with its calibration. Raises UserError where `check_fused_forward` does.

    fused: gives the network's logits where the model and a request allow it, None where no request does.
    """

    def __init__(self, info: ArtifactInfo, model: RankingModel, calibration: Calibration) -> None:
        self.info, self.model, self.calibration = info, model.eval(), calibration
        self.task_names, self._kinds = [task.name for task in info.tasks], [task.kind for task in info.tasks]
        self.num_experts = model.visible_experts.shape[1]
        self.matmul_backend: MatmulBackend = "blas"
        self.fused = build_fused_forward(model.mixture, self.matmul_backend)
        if self.fused is not None:
            check_fused_forward(model)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "fused"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.fused = build_fused_forward(self.model.mixture, self.matmul_backend)

    def check_expert_options(self, top_k: int | None, masked: Sequence[Any] | None) -> ExpertOptions:
        """A request's `gate_top_k` and `mask_experts`, checked. Raises RequestError."""
        if top_k is not None and top_k > self.num_experts:
            raise RequestError(f"gate_top_k is {top_k}, and the model has {self.num_experts} experts")
        for expert in masked or ():
            if isinstance(expert, bool) or not isinstance(expert, int):
                raise RequestError("mask_experts must be a list of experts' numbers, such as [0, 3]")
            if not 0 <= expert < self.num_experts:
                raise RequestError(f"mask_experts names expert {expert}; the model has 0 to {self.num_experts - 1}")
        return ExpertOptions(top_k, tuple(sorted(set(masked or ()))))

    def set_matmul_backend(self, matmul_backend: MatmulBackend) -> None:
        """Multiply by this library from now on; results are equal but for rounding."""
        if matmul_backend != self.matmul_backend:
            self.matmul_backend = matmul_backend
            self.fused = build_fused_forward(self.model.mixture, matmul_backend)
            set_matmul_backend(self.model, matmul_backend)

    def score(self, inputs: Tensor, options: ExpertOptions = _MODELS_OWN, explain: bool = False) -> Scored:
        """Predictions of inputs (N, W), see `RankingModel.concat_inputs`. explain: give what they come from, too.

        Raises RuntimeError where the model gives values that are not finite numbers.
        """
        pieces = inputs.split(CHUNK_ROWS) if len(inputs) else ()
        return Scored.join([self._score(piece, options, explain) for piece in pieces], len(self.task_names))

    def _score(self, inputs: Tensor, options: ExpertOptions, explain: bool) -> Scored:
        rows, usable, explained = len(inputs), self._usable(options), dict[str, np.ndarray]()
        if self.matmul_backend == "onednn":
            inputs = _filled_up(inputs)
        with torch.inference_mode():
            if self.fused is not None and options == _MODELS_OWN:  # also where it is to be explained: equal to the bit
                logits = self.fused(inputs[:, : self.model.width])
                outputs = self.model.postprocess(inputs, Outputs(logits, ()))
                plain = outputs.logits[:rows]
                if explain:
                    outputs = self.model.forward_inputs(inputs, None)
            else:
                outputs = self.model.forward_inputs(inputs, None, options.top_k, usable)
                plain = outputs.logits[:rows]
            logits = self.calibration.apply(plain, self.task_names)
            values = predictions(logits, self._kinds).numpy()
            logs = log_predictions(logits.double(), self._kinds).numpy()
            if explain:
                gates = outputs.routings[-1].weights.expand(
                    -1, len(self.task_names), -1
                )  # one gate may serve all tasks
                explained = {"uncalibrated": predictions(plain, self._kinds).numpy(), "gates": gates[:rows].numpy()}
        if not (np.isfinite(values).all() and np.isfinite(logs).all()):
            # NaN would make the reply invalid JSON, and a ranking by it means nothing.
            raise RuntimeError(f"model '{self.info.name}' gives predictions that are not finite numbers")
        return Scored(values, logs, self._warn(usable), **explained)

    def _usable(self, options: ExpertOptions) -> Tensor | None:
        """(E,) bool: False for the experts that a request leaves out. None if there are none."""
        if not options.masked:
            return None
        usable = torch.ones(self.num_experts, dtype=torch.bool)
        usable[list(options.masked)] = False
        return usable

    def _warn(self, usable: Tensor | None) -> tuple[str, ...]:
        """Sentences on tasks for which no expert is left, where (E,) bool may be used."""
        in_use, whose = self.model.experts_in_use, "network's " if self.model.trees is not None else ""
        left = (in_use if usable is None else in_use & usable).any(1).tolist()
        return tuple(
            f"no expert is left for '{task}': its {whose}prediction is the same for every candidate"
            for task, any_left in zip(self.task_names, left, strict=True)
            if not any_left
        )


def _filled_up(inputs: Tensor) -> Tensor:
    """Rows (N, W) with rows of zeros behind them, at most a sixteenth or 15 more.

    oneDNN prepares and keeps products for each number of rows, so there should be few of these.
    """
    step = max(16, 1 << max(0, (len(inputs) - 1).bit_length() - 5))
    missing = -len(inputs) % step
    return functional.pad(inputs, (0, 0, 0, missing)) if missing else inputs
