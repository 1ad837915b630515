"""mmoe-rec inspect --config configs/complete_journey.yaml

The health of a data set before one trains on it: rows, labels by split and week, and for each feature its coverage, ids
that training does not know, drift, and how well it alone predicts each task, which finds leaks.
Prepares the features as training would, or takes existing ones; writes `report.html` and `health.json` to
`data.work`/inspection.
"""

from pathlib import Path

from mmoe_rec.cli.main import Configuration, out_option, settings_command, show_report


@settings_command(__doc__)
@out_option("data.work/inspection")
def inspect(configuration: Configuration, out: Path | None) -> None:
    settings = configuration.settings
    from mmoe_rec.locks import writing
    from mmoe_rec.preprocessing.logs import BuildInputs, check_out
    from mmoe_rec.preprocessing.prepare import features_in_use
    from mmoe_rec.profiling.data_health import inspect as inspect_features

    out = out or Path(settings.data.work) / "inspection"
    check_out(out, settings)
    # matplotlib and Jinja2 are for what there is to be shown.
    with (
        features_in_use(BuildInputs.of(settings), "an inspection") as prepared,
        writing(out, "an inspection", "give another --out"),
    ):
        data, scratch = settings.data, out / ".inspection_scratch"
        health = inspect_features(settings.name, prepared, settings.schema_, scratch, data.memory_gib, data.workers)
        from mmoe_rec.profiling.health_report import FILE, make_report, write
        from mmoe_rec.report.report_files import PAGE

        write(health, out)
    show_report(make_report(health))
    print(f"report: {out / PAGE}")
    print(f"numbers: {out / FILE}")
    print(f"next: mmoe-rec train {configuration.options()}")
