"""Score encoded requests: run the model, calibrate its logits and check the predictions."""

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
    """Builds the model's input matrix from the features of requests.

    The matrix equals the inputs that `RankingModel.concat_inputs` returns, but features of user and context are looked
    up only once per request and then repeated for its candidates.
    """

    def __init__(
        self, layout: ModelLayout, tables: PlainTables, with_ids: bool, histories: HistoryAttention | None
    ) -> None:
        """Prepare the columns of the matrix.

        Args:
            layout: Layout of the model.
            tables: Embedding tables of the model.
            with_ids: Whether to append the IDs of inputs with one ID per row, which trees read.
            histories: Attention that pools histories, None if no history uses it.
        """
        self._tables, self._histories = tables, histories
        self._parts = {attention.history: layout.history_inputs(attention) for attention in layout.attention}
        bags: Mapping[str, Any] = dict(tables.embedding_bags.items())
        self._weights = {
            name: bag.weight.detach().numpy() for name, bag in bags.items() if not isinstance(bag, Int8EmbeddingBag)
        }
        self._table_of = {id_input.name: id_input.table for id_input in layout.ids}
        self._columns: list[tuple[str, str, slice]] = []  # (input, table, columns of the matrix)
        width = 0
        for name in layout.id_names(placement=False):
            columns = slice(width, width + layout.table(self._table_of[name]).dim)
            self._columns.append((name, self._table_of[name], columns))
            width = columns.stop
        self._numbers = list(enumerate(layout.dense_names(placement=False), width))
        width += len(self._numbers)
        self._ids = list(enumerate(layout.single_ids() if with_ids else [], width))
        self.width = width + len(self._ids)

    def build_matrix(self, request_inputs: Inputs, candidate_inputs: Inputs, request_index: np.ndarray) -> Tensor:
        """Concatenate the inputs of N candidates.

        Args:
            request_inputs: Features that are shared by all candidates of a request, for R requests.
            candidate_inputs: Features of the N candidates.
            request_index: Index of each candidate's request, (N,) int64, in ascending order.

        Returns:
            Inputs of the model, (N, width) float32.
        """
        num_requests = int(request_index[-1]) + 1 if len(request_index) else 0
        request_rows = np.empty((num_requests, self.width), np.float32)
        self._write(request_rows, request_inputs)
        matrix = request_rows.take(request_index, axis=0)
        self._write(matrix, candidate_inputs)
        inputs = torch.from_numpy(matrix)
        for name, parts in self._parts.items():
            ids = {**request_inputs.ids, **candidate_inputs.ids}
            inputs = self._add_attention(name, parts, inputs, ids, request_index)
        return inputs

    def _add_attention(
        self,
        name: str,
        parts: Sequence[tuple[str, str | None]],
        inputs: Tensor,
        ids: Mapping[str, Any],
        request_index: np.ndarray,
    ) -> Tensor:
        """Add the attention to one history to `inputs` (N, width). Events are embedded only once per request."""
        lists = ids[name]
        assert self._histories is not None
        assert isinstance(lists, Ragged)
        lengths = lists.lengths[request_index]
        events = concat_ranges(lists.offsets[request_index], lengths)
        rows = np.arange(len(request_index)).repeat(lengths)
        values = {part: ids[part].values for part, _ in parts}
        compared = [(part, partner) for part, partner in parts if partner is not None]
        is_same = np.empty((len(rows), len(compared)), np.float32)
        for column, (part, partner) in enumerate(compared):
            is_same[:, column] = same_ids(values[part][events], ids[partner][rows])
        age = lists.offsets[1:].repeat(lists.lengths) - 1 - np.arange(len(lists.values))
        with torch.inference_mode():
            vectors = [self._tables.rows(self._table_of[part], torch.from_numpy(v)) for part, v in values.items()]
            event_tensors = (torch.from_numpy(array) for array in (age, rows, is_same, events))
            return self._histories.attend(name, inputs, torch.cat(vectors, dim=1), *event_tensors)

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


# Intermediate results of 1,024 rows fit the processor's cache. Chunks of 16,384 rows take 1.7 times as long.
CHUNK_ROWS = 1_024


class ExpertOptions(NamedTuple):
    """Expert options of a request.

    Attributes:
        top_k: Number of experts that a gate uses for each row. None is the number in the model's settings.
        masked: Indices of the experts to leave out.
    """

    top_k: int | None = None
    masked: tuple[int, ...] = ()


_DEFAULT_OPTIONS = ExpertOptions()


@dataclass(frozen=True)
class Scored:
    """Predictions of N rows for T tasks.

    Attributes:
        predictions: (N, T) float32, or float64 if a task is a regression.
        log_predictions: Logarithms of the predictions, (N, T) float64.
        warnings: Sentences about tasks without a usable expert.
        uncalibrated: Predictions before calibration, (N, T), if an explanation was requested.
        gates: Each task's weights of the E experts of the last level, (N, T, E) float32, if explained.
    """

    predictions: np.ndarray
    log_predictions: np.ndarray
    warnings: tuple[str, ...] = ()
    uncalibrated: np.ndarray | None = None
    gates: np.ndarray | None = None

    @staticmethod
    def join(parts: "Sequence[Scored]", num_tasks: int) -> "Scored":
        """Concatenate the results of consecutive rows.

        Args:
            parts: Results in the order of the rows.
            num_tasks: Number of tasks, for the shape of an empty result.
        """
        if len(parts) == 1:
            return parts[0]
        if not parts:
            return Scored(np.empty((0, num_tasks), np.float32), np.empty((0, num_tasks)))
        fields = ("predictions", "log_predictions", "uncalibrated", "gates")
        names = [name for name in fields if getattr(parts[0], name) is not None]
        joined = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
        return Scored(**joined, warnings=parts[0].warnings)


class Scorer:
    """A `RankingModel` over `PlainTables` with its calibration.

    Attributes:
        fused: Faster function from inputs (N, W) to the network's logits (N, T), None if the model has no such form.
    """

    def __init__(self, info: ArtifactInfo, model: RankingModel, calibration: Calibration) -> None:
        """Prepare a model for scoring.

        Args:
            info: Metadata of the artifact.
            model: The model.
            calibration: Calibration of the model's tasks.

        Raises:
            UserError: The fused function differs from the model (`check_fused_forward`).
        """
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
        """Check the options `gate_top_k` and `mask_experts` of a request.

        Args:
            top_k: Experts per row and gate. None is the model's own number.
            masked: Numbers of the experts to leave out.

        Raises:
            RequestError: The model doesn't have these experts.
        """
        if top_k is not None and top_k > self.num_experts:
            raise RequestError(f"gate_top_k is {top_k}, and the model has {self.num_experts} experts")
        for expert in masked or ():
            if isinstance(expert, bool) or not isinstance(expert, int):
                raise RequestError("mask_experts must be a list of experts' numbers, such as [0, 3]")
            if not 0 <= expert < self.num_experts:
                raise RequestError(f"mask_experts names expert {expert}; the model has 0 to {self.num_experts - 1}")
        return ExpertOptions(top_k, tuple(sorted(set(masked or ()))))

    def set_matmul_backend(self, matmul_backend: MatmulBackend) -> None:
        """Switch to another library for matrix products. Results differ only by rounding."""
        if matmul_backend != self.matmul_backend:
            self.matmul_backend = matmul_backend
            self.fused = build_fused_forward(self.model.mixture, matmul_backend)
            set_matmul_backend(self.model, matmul_backend)

    def score(self, inputs: Tensor, options: ExpertOptions = _DEFAULT_OPTIONS, explain: bool = False) -> Scored:
        """Score rows in chunks that fit the processor's cache.

        Args:
            inputs: Inputs of N rows as `RankingModel.concat_inputs` returns them, (N, W) float32.
            options: Expert options of the request.
            explain: Whether to return gate weights and uncalibrated predictions too.

        Raises:
            RuntimeError: A prediction is NaN or infinite.
        """
        chunks = inputs.split(CHUNK_ROWS) if len(inputs) else ()
        return Scored.join([self._score(chunk, options, explain) for chunk in chunks], len(self.task_names))

    def _score(self, inputs: Tensor, options: ExpertOptions, explain: bool) -> Scored:
        num_rows, usable, details = len(inputs), self._usable(options), dict[str, np.ndarray]()
        if self.matmul_backend == "onednn":
            inputs = _pad_rows(inputs)
        with torch.inference_mode():
            # Explained requests take their predictions from the fused function too, so explaining a request doesn't
            # change a bit of its predictions.
            if self.fused is not None and options == _DEFAULT_OPTIONS:
                logits = self.fused(inputs[:, : self.model.width])
                outputs = self.model.postprocess(inputs, Outputs(logits, ()))
                uncalibrated = outputs.logits[:num_rows]
                if explain:
                    outputs = self.model.forward_inputs(inputs, None)
            else:
                outputs = self.model.forward_inputs(inputs, None, options.top_k, usable)
                uncalibrated = outputs.logits[:num_rows]
            logits = self.calibration.apply(uncalibrated, self.task_names)
            values = predictions(logits, self._kinds).numpy()
            log_values = log_predictions(logits.double(), self._kinds).numpy()
            if explain:
                # Repeat the weights, because all tasks may share one gate.
                gates = outputs.routings[-1].weights.expand(-1, len(self.task_names), -1)
                details["uncalibrated"] = predictions(uncalibrated, self._kinds).numpy()
                details["gates"] = gates[:num_rows].numpy()
        if not (np.isfinite(values).all() and np.isfinite(log_values).all()):
            # NaN can't be sorted or written as JSON.
            raise RuntimeError(f"model '{self.info.name}' gives predictions that are not finite numbers")
        return Scored(values, log_values, self._warn(usable), **details)

    def _usable(self, options: ExpertOptions) -> Tensor | None:
        """Return which experts a request may use, (E,) bool, None for all."""
        if not options.masked:
            return None
        usable = torch.ones(self.num_experts, dtype=torch.bool)
        usable[list(options.masked)] = False
        return usable

    def _warn(self, usable: Tensor | None) -> tuple[str, ...]:
        """Return a warning for each task without a usable expert."""
        in_use, owner = self.model.experts_in_use, "network's " if self.model.trees is not None else ""
        has_expert = (in_use if usable is None else in_use & usable).any(1).tolist()
        return tuple(
            f"no expert is left for '{task}': its {owner}prediction is the same for every candidate"
            for task, usable_expert in zip(self.task_names, has_expert, strict=True)
            if not usable_expert
        )


def _pad_rows(inputs: Tensor) -> Tensor:
    """Append rows of zeros to inputs (N, W), at most 15 or a sixteenth of N.

    oneDNN prepares and caches a matrix product for each distinct number of rows, so fewer such numbers save time.
    """
    step = max(16, 1 << max(0, (len(inputs) - 1).bit_length() - 5))
    padding = -len(inputs) % step
    return functional.pad(inputs, (0, 0, 0, padding)) if padding else inputs
