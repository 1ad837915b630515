"""The multi-gate mixtures of both peers, of the size that is compared. Needs the peers' environment, and not this
project's."""

from collections.abc import Sequence
from typing import Any

from tests.benchmarks.training_rows import EXPERT_UNITS, EXPERTS, TOWER_UNITS


def rechub_mixture(features: Sequence[Any], tasks: int) -> Any:
    """torch-rechub's, of so many binary tasks."""
    from torch_rechub.models.multi_task import MMOE

    towers = [{"dims": list(TOWER_UNITS)} for _ in range(tasks)]
    return MMOE(features, ["classification"] * tasks, EXPERTS, {"dims": list(EXPERT_UNITS)}, towers)


def deepctr_mixture(features: Sequence[Any], tasks: Sequence[str], **more: Any) -> Any:
    """DeepCTR-Torch's, of binary tasks of these names, ready to be fitted."""
    from deepctr_torch.models import MMOE

    model = MMOE(
        features,
        num_experts=EXPERTS,
        expert_dnn_hidden_units=EXPERT_UNITS,
        gate_dnn_hidden_units=(),
        tower_dnn_hidden_units=TOWER_UNITS,
        l2_reg_linear=0,
        l2_reg_embedding=0,
        task_types=["binary"] * len(tasks),
        task_names=list(tasks),
        **more,
    )
    model.compile("adam", ["binary_crossentropy"] * len(tasks))
    return model
