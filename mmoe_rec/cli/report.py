"""mmoe-rec report --config configs/complete_journey.yaml

All that is known of one `data.work` on one page, the verdicts first: its data (`inspect`), the last training,
evaluations, baselines, comparisons of variants, and the search for settings. It says what is missing, with the command
that makes it, and what is out of date, as features were built anew since, another model was trained, or settings
changed. Nothing is computed: it reads what those commands have left, and writes `report.html`, one file that needs
nothing else, to `data.work`/report.
"""

from pathlib import Path

from mmoe_rec.cli.main import COMMANDS, Configuration, out_option, settings_command, show


@settings_command(__doc__)
@out_option("data.work/report")
def report(configuration: Configuration, out: Path | None) -> None:
    settings = configuration.settings
    from mmoe_rec.atomic import write_text
    from mmoe_rec.preprocessing.logs import check_out
    from mmoe_rec.training.overview import find_cautions, read_parts, to_page

    work = Path(settings.data.work)
    out = out or work / "report"
    check_out(out, settings)

    def command(word: str, *words: str) -> str:
        return f"mmoe-rec {word} {configuration.options(*words)}"

    parts, cautions = list(read_parts(settings, command, COMMANDS)), list(find_cautions(settings))
    about = f"What lies in {work}, of the log {settings.data.log}."
    write_text(out / "report.html", to_page(f"Report: {settings.name}", about, cautions, parts))
    show(f"warning: {each}" for each in cautions)
    for part in parts:
        stale = f" (out of date: {'; '.join(part.stale)})" if part.stale else ""
        known = part.command if part.report is None else f"{part.report.headline}{stale}"
        show([f"{part.title}: {known}"])
    print(f"report: {out / 'report.html'}")
