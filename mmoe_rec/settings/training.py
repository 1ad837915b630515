"""Section `training` of a settings file."""

import math
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo

from mmoe_rec.settings.log_columns import Section


def _auto_or_whole(value: Any, info: ValidationInfo) -> Any:
    minimum = 2 if info.field_name == "batch_size" else 1
    if value == "auto" or (type(value) is int and value >= minimum):
        return value
    raise ValueError(f"must be auto, or a whole number of at least {minimum}")


AutoOrWhole = Annotated[int | Literal["auto"], BeforeValidator(_auto_or_whole)]
TARGET_STEPS = 1000
"""Number of steps that a network needs. `training.batch_size: auto` aims at this number."""
MIN_AUTO_EPOCHS, MAX_AUTO_EPOCHS = 2, 20
"""Minimum (without a warm start) and maximum number of epochs under `training.epochs: auto`."""


class Training(Section):
    """Precision, devices, optimizers and stopping of a training run."""

    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="device; auto: CUDA if a GPU exists")
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "auto",
        description="precision of matrix products. auto takes bf16 if a step of this model gets 20% faster. On a "
        "GPU, fp32 means TF32, except in gates.",
    )
    matmul_backend: Literal["auto", "blas", "onednn"] = Field(
        "auto",
        description="library of fp32 matrix products on a CPU, torch's BLAS or oneDNN. The faster one depends on the "
        "processor. Results differ only by rounding. auto takes oneDNN if torch has it.",
    )
    table_backend: Literal["auto", "fbgemm", "torch"] = Field(
        "auto",
        description="backend of embedding tables on a CPU, fbgemm's kernels or plain PyTorch. The faster one depends "
        "on the processor. Results differ only by rounding. auto takes fbgemm if it is installed.",
    )
    sharding: Literal["auto", "table_wise", "row_wise", "table_row_wise", "column_wise", "grid_shard"] = Field(
        "auto",
        description="torchrec's sharding type of tables on several processes. auto keeps tables whole on CPUs and may "
        "split rows on GPUs. column_wise and grid_shard split columns and train a slightly different model, since each "
        "part of a row has its own Adagrad state.",
    )
    shard_columns: int = Field(
        32, ge=4, multiple_of=4, description="minimum number of columns in a shard under column_wise and grid_shard"
    )
    communication_dtype: Literal["fp32", "bf16"] = Field(
        "fp32", description="number type of embeddings and gradients that processes exchange"
    )
    threads: int | None = Field(
        None, ge=1, description="CPU threads per process; null: OMP_NUM_THREADS or one per core"
    )
    epochs: AutoOrWhole = Field(
        "auto",
        description="passes over the training rows. auto stops after an epoch that improves the best validation by "
        "less than 0.05%, or after 20 epochs. Under auto, learning rates rise and fall in each epoch. The best state "
        "of all validations is kept in either case.",
    )
    batch_size: AutoOrWhole = Field(
        "auto",
        description="rows per step, summed over ranks. auto takes the power of two from 64 to 4,096 that results in "
        "about 1,000 steps in total (under `epochs: auto`, in two epochs).",
    )
    learning_rate: float = Field(1e-3, gt=0, description="peak learning rate of AdamW on the dense part")
    table_learning_rate: float = Field(0.05, gt=0, description="peak learning rate of row-wise Adagrad on the tables")
    weight_decay: float = Field(1e-4, ge=0, description="decoupled weight decay of the dense part")
    warmup_fraction: float = Field(0.05, ge=0, lt=1, description="fraction of steps during which learning rates rise")
    max_grad_norm: float = Field(1.0, gt=0, description="gradient norm at which the dense part's gradient is clipped")
    shuffle_buffer_rows: int = Field(262_144, ge=1, description="rows shuffled together, which limits memory")
    validations_per_epoch: int = Field(2, ge=1, description="validations per epoch")
    monitor: Literal["auc", "loss"] = Field(
        "auc",
        description="metric that selects the best checkpoint: mean AUC over the binary tasks with 50 validation rows "
        "of each label (loss if there are none), or the weighted loss",
    )
    calibration: Literal["none", "temperature", "isotonic"] = Field(
        "none", description="calibration on validation rows"
    )
    task_weighting: Literal["fixed", "uncertainty"] = Field(
        "fixed",
        description="weights of task losses: `loss_weight` alone, or also learned uncertainties (Kendall, 2018)",
    )
    sampling_correction: Literal["none", "weights"] = Field(
        "none",
        description="correction for sampled logs. weights gives rows the weight 1 / `columns.sampling_rate`.",
    )
    max_id_dropout: float = Field(
        0.9,
        ge=0,
        le=1,
        description="maximum fraction of training rows that hide the id of a feature. Training hides ids until as many "
        "are unseen as in validation rows, so that the embeddings of unseen ids are trained. 0 hides none.",
    )
    seed: int = Field(17, ge=0, description="seed of initial weights, shuffling and dropout")
    checkpoint_steps: int = Field(1000, ge=1, description="steps between checkpoints; one more after each validation")
    keep_checkpoints: int = Field(1, ge=1, description="recent checkpoints to keep, besides the best one")
    timeout_minutes: float = Field(10, gt=0, description="minutes that a rank waits for other ranks before it fails")

    @property
    def max_epochs(self) -> int:
        """Maximum number of epochs."""
        return MAX_AUTO_EPOCHS if self.epochs == "auto" else self.epochs

    def resolve_batch_size(self, rows: int) -> int:
        """Return `batch_size`, or the automatic value for this number of training rows."""
        if self.batch_size != "auto":
            return self.batch_size
        epochs = MIN_AUTO_EPOCHS if self.epochs == "auto" else self.epochs
        return 2 ** round(math.log2(min(4096, max(64, rows * epochs / TARGET_STEPS))))
