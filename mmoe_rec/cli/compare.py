"""mmoe-rec compare --config configs/shop.yaml --variant wide model.experts.count=16 --variant long training.epochs=4
mmoe-rec compare --config configs/shop.yaml --architectures
mmoe-rec compare --config configs/shop.yaml --features
mmoe-rec compare --config configs/shop.yaml --seeds 5

Compare variants of the settings. Train the settings and each variant with several seeds. Compare metrics on the test
rows with intervals over runs and users, corrected for the number of variants (Holm). The report starts with the best
variant and the overrides that adopt it.

--variant names a variant and lists its overrides. `features.NAME=null` removes a feature. A variant with other features
or data builds its own features.
--architectures compares a shared bottom, one gate, MMoE, PLE, single tasks, trees alone, and the model without each
task.
--features permutes each feature on validation rows. It then trains without the features that seem unnecessary, and
without each group of features.

Without these options, the command measures the mean and the spread of all metrics over the runs.

All runs use the same precision. No model is registered. Finished runs stay in `data.work_dir`/comparison. To resume
after an interruption, repeat the command.
"""

from pathlib import Path

import click

from mmoe_rec.cli.main import COUNT, Configuration, NumberBetween, settings_command, show_report
from mmoe_rec.errors import UserError


@settings_command(__doc__)
@click.option("--variant", "variant_words", multiple=True, metavar="NAME KEY=VALUE...", help="name and overrides")
@click.option("--architectures", is_flag=True, help="whether to compare architectures and subsets of tasks")
@click.option("--features", is_flag=True, help="whether to find out which features are needed")
@click.option("--only", multiple=True, metavar="F...", help="features to compare with --features (default: all)")
@click.option("--margin", type=NumberBetween(0, 1), help="negligible loss for --features (default: 0.001)")
@click.option("--seeds", type=COUNT, default=5, metavar="N", help="number of runs for each variant (default: 5)")
def compare(
    configuration: Configuration,
    variant_words: tuple[str, ...],
    architectures: bool,
    features: bool,
    only: tuple[str, ...],
    margin: float | None,
    seeds: int,
) -> None:
    if bool(variant_words) + architectures + features > 1:
        raise UserError("--variant, --architectures and --features can't be combined. Give only one.")
    if (only or margin is not None) and not features:
        raise UserError("--only and --margin require --features. Add --features.")
    settings = configuration.settings
    from mmoe_rec.preprocessing.build_inputs import BuildInputs

    _ = BuildInputs.of(settings).logs  # Report a missing log before importing torch.
    from mmoe_rec.experiments import compare as comparison
    from mmoe_rec.experiments.importance import compare_features
    from mmoe_rec.experiments.runner import BASE_VARIANT
    from mmoe_rec.report.report_files import REPORT_PAGE

    if features:
        report = compare_features(settings, only, 0.001 if margin is None else margin, seeds)
    else:
        variants = [BASE_VARIANT, *comparison.parse_variants(variant_words)]
        if architectures:
            variants = comparison.list_architectures(settings)
        report = comparison.compare_variants(settings, variants, seeds)
    show_report(comparison.make_report(report))
    folder = Path(settings.data.work_dir) / comparison.COMPARISON_FOLDER
    print(f"all values: {folder / comparison.COMPARISON_FILE}")
    print(f"report: {folder / REPORT_PAGE}")
