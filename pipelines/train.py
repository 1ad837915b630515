"""python -m pipelines.train --config configs/complete_journey.yaml
torchrun --nproc-per-node 2 -m pipelines.train --config configs/complete_journey.yaml

Fits features (or takes those at hand), trains the model over sharded tables, keeps the best one by validation, writes
it to `data.work`/model and registers it in MLflow. One process or many, CPU or GPUs: the same code.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from mmoe_rec.errors import exit_with_message
from pipelines.command import read_command


@exit_with_message()
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    arguments, settings = read_command(__doc__ or "", argv)
    from pipelines.steps import train_model

    trained = train_model(settings)
    if trained is None:
        return
    best = ", ".join(f"{name.removeprefix('validation.')} {value:.4f}" for name, value in trained.best.flat().items())
    print(f"best validation, at step {trained.best_step}: {best}")
    print(f"{trained.rows_per_s:,.0f} rows/s in training, {trained.waiting:.1%} of the time spent waiting for data")
    print(f"model: {trained.artifact}, registered as {trained.address}")
    options = shlex.join(["--config", arguments.config, "--model", trained.address, *arguments.overrides])
    print(f"next: python -m pipelines.evaluate {options}")


if __name__ == "__main__":
    main()
