"""mmoe-rec report --config configs/complete_journey.yaml

All that is known of one `data.work` on one page, the verdicts first: its data (`inspect`), the last training,
evaluations, baselines, comparisons of variants, and the search for settings. It says what is missing, with the command
that makes it, and what is out of date, as features were built anew since, another model was trained, or settings
changed. Nothing is computed: it reads what those commands have left, and writes `report.html`, one file that needs
nothing else, to `data.work`/report.
"""

from pathlib import Path

from mmoe_rec.cli.main import Configuration, out_option, settings_command, show_report


@settings_command(__doc__)
@out_option("data.work/report")
def report(configuration: Configuration, out: Path | None) -> None:
    settings = configuration.settings
    from mmoe_rec.preprocessing.logs import check_out
    from mmoe_rec.report.report_files import write_report
    from mmoe_rec.training.overview import join_reports

    out = out or Path(settings.data.work) / "report"
    check_out(out, settings)
    joined = join_reports(settings, lambda word, *words: f"mmoe-rec {word} {configuration.options(*words)}")
    write_report(joined, out)
    show_report(joined)
    print(f"report: {out / 'report.html'}")
