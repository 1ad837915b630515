"""An evaluation in MLflow: on the page of the run that made the model, and with its version in the registry."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mmoe_rec.evaluation.results import Results
from mmoe_rec.jobs.places import log_and_place
from mmoe_rec.jobs.run_page import as_code, command, data_sets, draw_gates, quoted
from mmoe_rec.jobs.truth import are_its_own
from mmoe_rec.preprocessing.prepare import existing
from mmoe_rec.settings.sections import Settings
from mmoe_rec.tracking import runs
from mmoe_rec.tracking.client import hide_password
from mmoe_rec.tracking.registry import FoundModel, describe_version, get_version

if TYPE_CHECKING:
    from mmoe_rec.evaluation.scoring import ScoredRows


PROMOTION = "promotion"
"""Folder of a run's files, of what `promote` measures."""
_OF_ROWS = ("log", "rows", "requests", "caution")


def log_evaluation(
    settings: Settings, found: FoundModel, scored: ScoredRows, results: Results, out: Path, place: str, split: str
) -> None:
    """Logs to the run of a model, or to a new one where that is not known. Metrics of other rows than those of its
    training's log and split get sections of their own, beside those of the training's.

    scored, results: of the model and those it is compared with; out: where the files are; place: folder of the run's
    files; split: of the rows. Raises UnreachableError where MLflow does not answer.
    """
    from mmoe_rec.evaluation.summary import flatten
    from mmoe_rec.report.documents import comparison_tree
    from mmoe_rec.report.evaluation_figures import calibration_figure
    from mmoe_rec.report.sentences import describe_verdicts

    layout, summary, first = scored.layout, results.first.summary, results.first
    uri, name = settings.tracking.address, f"evaluate {found.address}"
    with runs.open_run(uri, settings.experiment, run_name=name, run_id=found.run_id) as run:
        prepared = existing(*log_and_place(settings))
        if prepared is not None:
            run.log_inputs(data_sets(settings, prepared.manifest, split))
        heading = "Evaluation" if split == "test" else f"Evaluation on {split} rows"
        section = "test" if split == "test" else f"{split}_rows"  # `validation` has charts by step
        if not are_its_own(settings, found.folder):
            heading, section = f"{heading} of another log or split", f"other_{split}_rows"
            place = f"{place}_of_other_rows" if place != PROMOTION else place
        run.describe(heading, _described(results, place))
        numbers = dict(_named(flatten(summary), section))
        run.log_metrics(numbers)
        run.forget_metrics(f"{section}/", numbers)
        run.forget_metrics(f"{section}.", ())  # of before names had sections
        run.log_artifact(out / "metrics.json", place)
        # Files of a run can't be taken away again: without other models there is a comparison with none.
        tree = {"against": {}} if results.comparison is None else comparison_tree(results.comparison, summary)
        run.log_dict(tree, f"{place}/comparison.json")
        run.log_artifact(out / "report.html", place)
        for task in layout.tasks:
            path = out / f"calibration_{task.name}.png"
            path.unlink(missing_ok=True)  # of an evaluation before
            # Without a label that is known by now there is nothing to draw; the summary says so.
            if summary.tasks[task.name].details.get("calibration_bins"):
                figure = calibration_figure(summary, task.name)
                figure.savefig(path)
                run.log_figure(figure, f"{place}/calibration_{task.name}.png")
        assert scored.experts is not None, "a model scored the rows"
        draw_gates(run, layout, scored.experts, f"{place}/gate_weights.png")
    if split != "test" or first.seen:  # what it has learnt says nothing of it
        return
    if (registered := re.fullmatch(r"models:/([^/@]+)/(\d+)", found.address)) is not None:
        rows = f"{summary.rows:,} rows of {hide_password(settings.data.log)}"
        told = f"{'; '.join(describe_verdicts(results))} ({rows})"
        report = {"report": f"runs:/{run.run_id}/{place}/report.html", "evaluated": told}
        version = get_version(registered[1], registered[2], uri)
        describe_version(version, "", report, uri)


def _named(flat: Mapping[str, float], section: str) -> Iterator[tuple[str, float]]:
    """Metrics by names that give sections of charts: the ends of intervals have one of their own."""
    for name, value in flat.items():
        yield f"{section}/{'intervals/' if name.endswith(('.low', '.high')) else ''}{name}", value


def _described(results: Results, place: str) -> str:
    """What an evaluation found, in Markdown."""
    from mmoe_rec.report.findings import find_all
    from mmoe_rec.report.sentences import describe_verdicts

    found = quoted([*describe_verdicts(results), *(each.message for each in find_all(results))])
    facts = "\n".join(f"- {name}: {fact}" for name, fact in results.facts.items() if name in _OF_ROWS)
    return f"{found}\n\n{facts}\n\nReport: `{place}/report.html` of the artifacts.\n\n{as_code(command())}"
