"""The `training` section of a settings file: in what, how long and on how many machines a model is trained."""

import math
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from mmoe_rec.settings.log_columns import Section


def _as_batch(value: Any) -> Any:
    if value == "auto" or (type(value) is int and value >= 2):
        return value
    raise ValueError("must be auto, or a whole number of at least 2")


TARGET_STEPS = 1000
"""Of a training, which a network needs, and which `training.batch_size: auto` aims at."""
SPLIT_COLUMNS = ("column_wise", "grid_shard")
"""Values of `training.sharding` under which each part of a row has a number of row-wise Adagrad of its own."""


class Training(Section):
    """How the model is trained."""

    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto takes CUDA where there is a GPU")
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "auto",
        description="of products; auto takes bf16 where a step of this model is a fifth faster with it. On a GPU fp32 "
        "is TF32, except in gates",
    )
    matmul_backend: Literal["auto", "blas", "onednn"] = Field(
        "auto",
        description="what multiplies fp32 matrices on a CPU: torch's BLAS library, or oneDNN. Which is faster depends "
        "on the processor; results are equal but for rounding. auto takes oneDNN where torch has it",
    )
    table_backend: Literal["auto", "fbgemm", "torch"] = Field(
        "auto",
        description="how embedding tables are looked up and updated on a CPU: by fbgemm's kernels, or by PyTorch "
        "alone. Which is faster depends on the processor; results are equal but for rounding. auto takes fbgemm where "
        "it is installed",
    )
    sharding: Literal["auto", "table_wise", "row_wise", "table_row_wise", "column_wise", "grid_shard"] = Field(
        "auto",
        description="how several processes share a table, in torchrec's words; auto: whole on CPUs, on GPUs also by "
        "rows. column_wise and grid_shard split columns, and train a slightly different model, as each part of a row "
        "has an Adagrad of its own",
    )
    shard_columns: int = Field(
        32, ge=4, multiple_of=4, description="fewest columns of a part under column_wise and grid_shard"
    )
    communication_dtype: Literal["fp32", "bf16"] = Field(
        "fp32", description="numbers in which processes send each other embeddings and their gradients"
    )
    threads: int | None = Field(None, ge=1, description="CPU threads of a process; null: OMP_NUM_THREADS or one a core")
    epochs: int = Field(1, ge=1, description="passes over the training rows")
    batch_size: Annotated[int | Literal["auto"], BeforeValidator(_as_batch)] = Field(
        "auto",
        description="rows per step, over all ranks together; auto takes the power of two from 64 to 4,096 that makes "
        "about 1,000 steps of all epochs",
    )
    learning_rate: float = Field(1e-3, gt=0, description="peak learning rate of AdamW on the dense part")
    table_learning_rate: float = Field(0.05, gt=0, description="peak learning rate of row-wise Adagrad on the tables")
    weight_decay: float = Field(1e-4, ge=0, description="decoupled weight decay of the dense part")
    warmup_fraction: float = Field(0.05, ge=0, lt=1, description="share of all steps in which the learning rates rise")
    max_grad_norm: float = Field(1.0, gt=0, description="largest norm of the dense part's gradient")
    shuffle_buffer_rows: int = Field(262_144, ge=1, description="rows that are shuffled together; bounds memory")
    validations_per_epoch: int = Field(2, ge=1, description="times per epoch that the validation rows are scored")
    patience: int = Field(4, ge=1, description="validations without a better result until training stops")
    monitor: Literal["auc", "loss"] = Field(
        "auc",
        description="best model: highest mean AUC over the binary tasks with 50 validation rows of each label (loss, "
        "if there are none), or lowest weighted loss",
    )
    calibration: Literal["none", "temperature", "isotonic"] = Field("none", description="correction on validation rows")
    task_weighting: Literal["fixed", "uncertainty"] = Field(
        "fixed",
        description="tasks count by their `loss_weight` alone, or by learnt uncertainties (Kendall 2018) as well",
    )
    sampling_correction: Literal["none", "weights"] = Field(
        "none",
        description="predict the log as it is, or as it was before sampling: rows weigh 1 / `columns.sampling_rate`",
    )
    seed: int = Field(17, ge=0, description="seed of initial weights, shuffling and dropout")
    checkpoint_steps: int = Field(1000, ge=1, description="steps between checkpoints; one more after each validation")
    keep_checkpoints: int = Field(1, ge=1, description="last checkpoints that are kept, besides the best one")
    timeout_minutes: float = Field(10, gt=0, description="minutes that a rank waits for the others before it gives up")

    def resolve_batch_size(self, rows: int) -> int:
        """`batch_size`, for so many training rows."""
        if self.batch_size != "auto":
            return self.batch_size
        return 2 ** round(math.log2(min(4096, max(64, rows * self.epochs / TARGET_STEPS))))
