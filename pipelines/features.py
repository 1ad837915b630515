"""python -m pipelines.features --config configs/complete_journey.yaml

Fits the features to the log and encodes the training, validation and test rows into `data.work`/features. Training and
evaluation do this by themselves when it is missing or when log, features or split have changed.
"""

from __future__ import annotations

from collections.abc import Sequence

from mmoe_rec.errors import exit_with_message
from pipelines.command import read_command


@exit_with_message()
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    _, settings = read_command(__doc__ or "", argv)
    from pipelines.steps import prepare_features

    prepared = prepare_features(settings)
    print(f"features: {prepared.folder}")
    for name, split in prepared.manifest["splits"].items():
        labels = ", ".join(
            f"{task} {split['label_sum'][task]:,.0f} of {observed:,} observed"
            for task, observed in split["observed"].items()
        )
        print(f"  {name}: {split['rows']:,} rows; {labels}")


if __name__ == "__main__":
    main()
