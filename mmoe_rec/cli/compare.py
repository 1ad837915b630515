"""mmoe-rec compare --config configs/shop.yaml --variant wide model.experts.count=16 --variant long training.epochs=4
mmoe-rec compare --config configs/shop.yaml --architectures
mmoe-rec compare --config configs/shop.yaml --features
mmoe-rec compare --config configs/shop.yaml --seeds 5

Compares variants of settings. Trains the settings and each variant with several seeds, and judges the differences on
the test rows, by intervals over runs and users that are corrected for the number of variants (Holm). It says first
which variant is better, and which overrides adopt it.

--variant names a variant and its overrides. `features.NAME=null` leaves a feature out. A variant that changes features
or data gets features of its own.
--architectures compares a shared bottom, one gate, MMoE, PLE, single tasks, trees alone, and each task left out.
--features permutes each feature on validation rows, then trains without the features that the model seems not to need,
and without each group of features.
Without any of them, it measures the settings alone: the mean of all metrics, and how far runs are apart.

All runs use the same precision. Nothing is registered. Complete runs stay in `data.work_dir`/comparison: after a stop,
repeat the command.
"""

from pathlib import Path

import click

from mmoe_rec.cli.main import COUNT, Configuration, NumberBetween, settings_command, show_report
from mmoe_rec.errors import UserError


@settings_command(__doc__)
@click.option("--variant", "words", multiple=True, metavar="NAME KEY=VALUE...", help="a variant and its overrides")
@click.option("--architectures", is_flag=True, help="compare architectures and subsets of tasks")
@click.option("--features", is_flag=True, help="compare the settings without features")
@click.option("--only", multiple=True, metavar="F...", help="with --features, only these features")
@click.option("--margin", type=NumberBetween(0, 1), help="with --features, loss that counts as none (default: 0.001)")
@click.option("--seeds", type=COUNT, default=5, metavar="N", help="runs of each variant (default: 5)")
def compare(
    configuration: Configuration,
    words: tuple[str, ...],
    architectures: bool,
    features: bool,
    only: tuple[str, ...],
    margin: float | None,
    seeds: int,
) -> None:
    if bool(words) + architectures + features > 1:
        raise UserError("--variant, --architectures and --features are comparisons of their own. Give one of them.")
    if (only or margin is not None) and not features:
        raise UserError("--only and --margin belong to --features. Add --features.")
    settings = configuration.settings
    from mmoe_rec.preprocessing.build_inputs import BuildInputs

    _ = BuildInputs.of(settings).logs  # a log that is missing is reported before torch is loaded
    from mmoe_rec.experiments.compare import (
        COMPARISON_FILE,
        COMPARISON_FOLDER,
        compare_variants,
        list_architectures,
        make_report,
        parse_variants,
    )
    from mmoe_rec.experiments.importance import compare_features
    from mmoe_rec.experiments.runner import BASE_VARIANT
    from mmoe_rec.report.report_files import REPORT_PAGE

    if features:
        report = compare_features(settings, only, 0.001 if margin is None else margin, seeds)
    else:
        variants = list_architectures(settings) if architectures else [BASE_VARIANT, *parse_variants(words)]
        report = compare_variants(settings, variants, seeds)
    show_report(make_report(report))
    folder = Path(settings.data.work_dir) / COMPARISON_FOLDER
    print(f"all values: {folder / COMPARISON_FILE}")
    print(f"report: {folder / REPORT_PAGE}")
