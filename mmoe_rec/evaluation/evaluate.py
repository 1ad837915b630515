"""Metrics of models on the test rows, and their predictions for people."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from mmoe_rec.atomic import atomic_file
from mmoe_rec.errors import UserError
from mmoe_rec.evaluation.comparison import Results
from mmoe_rec.evaluation.slicing import Slicing, overlap
from mmoe_rec.evaluation.summary import MeasuredModel, Summary, find_objective
from mmoe_rec.inference.artifact import Source, read_artifact, version_of
from mmoe_rec.inference.ranking import ROW
from mmoe_rec.locks import reading, writing
from mmoe_rec.preprocessing.logs import BuildInputs, check_out, logs_for, short_names
from mmoe_rec.preprocessing.prepare import FeatureFolder, encode_with, existing, fingerprint_of
from mmoe_rec.progress import say
from mmoe_rec.settings.log_columns import Columns
from mmoe_rec.settings.schema import Schema
from mmoe_rec.settings.sections import Settings, differences
from mmoe_rec.tracking import runs
from mmoe_rec.tracking.client import UnreachableError
from mmoe_rec.tracking.registry import describe_version, find_model, get_version
from mmoe_rec.tracking.runs import as_code, command, data_sets, quoted

if TYPE_CHECKING:
    from mmoe_rec.batches.encoded_rows import EncodedRows
    from mmoe_rec.evaluation.scoring import ScoredRows
    from mmoe_rec.inference.ranker import Ranker
    from mmoe_rec.model.mmoe import RankingModel
    from mmoe_rec.model.model_layout import ModelLayout
    from mmoe_rec.model.score import Calibration


@contextmanager
def rows_to_measure(settings: Settings, artifact: Path, ranker: Ranker, split: str = "test") -> Iterator[Path]:
    """Encoded test rows, which nobody replaces meanwhile: existing ones that the model's features made, or new ones.

    artifact: where the ranker was loaded from; split: of the rows. Raises UserError where its tasks are not the same.
    """
    check_tasks(settings, ranker.pipeline.schema)
    work, what = Path(settings.data.work), "an evaluation"
    with reading(work / "features", what):
        prepared = existing(BuildInputs.of(settings))
        if prepared is not None and prepared.manifest["fingerprint"] == ranker.about.fingerprint:
            prepared.require_rows(split)
            yield prepared.split(split)
            return
    logs, encoded = logs_for(settings, ranker.pipeline), work / "evaluation" / "encoded"
    if gone := FeatureFolder(work / "features").gone(logs):
        files = f"1 is gone, '{gone[0]}'" if len(gone) == 1 else f"{len(gone):,} are gone, such as '{gone[0]}'"
        told = "the features that the model was trained on are not there, so counters and histories are rebuilt from"
        say(f"{told} the files that are left in the log: {files}")
    with writing(encoded, what, "set `data.work` to another folder", queue=True):
        encode_with(artifact / "features", logs, {split: settings.split.windows()[split]}, encoded)
        yield encoded / split


def score_by(
    settings: Settings,
    model: RankingModel,
    layout: ModelLayout,
    rows: Path | EncodedRows,
    calibration: Calibration,
    name: str = "the model",
) -> ScoredRows:
    """Encoded rows as a model scores them, to be measured against what the settings say that labels are worth.

    layout: the model's; rows: or their folder; name: what it is called where it gives predictions that are not finite
    (NotFiniteError).
    """
    from mmoe_rec.batches.encoded_rows import EncodedRows
    from mmoe_rec.evaluation.scoring import score_rows

    scored = score_rows(
        model,
        layout,
        EncodedRows(rows, layout) if isinstance(rows, Path) else rows,
        settings.evaluation.batch_size,
        calibration=calibration,
        relevance={each: task.score_weight for each, task in settings.tasks.items()},
        weighted=settings.training.sampling_correction == "weights",
        name=name,
    )
    return scored if settings.columns.has_candidate else replace(scored, candidates=None, row=scored.candidates)


def check_tasks(settings: Settings, schema: Schema) -> None:
    """Raises UserError where a model's schema has other tasks than the settings, or ones that mean something else."""
    if set(schema.tasks) != set(settings.tasks):
        raise UserError(f"the model predicts {', '.join(schema.tasks)}; the settings have {', '.join(settings.tasks)}")
    its, ours = ({"tasks": each.identity()["tasks"]} for each in (schema, settings.schema_))
    for where, before, now in differences(its, ours):
        raise UserError(
            f"the model was trained with '{where}' {before}, and it is {now} in the settings, so it predicts something "
            "else than these labels: set it back, or train a model with it"
        )


PROMOTION = "promotion"
"""Folder of a run's files, of what `promote` measures."""


def log_evaluation(settings: Settings, model: Source, results: Results, out: Path, place: str, split: str) -> None:
    """Log to the run of a model, or to a new one if that is unknown or the rows are not of its training's log.

    Args:
        settings: Settings that name the rows.
        model: The first of the measured models.
        results: Results of the models.
        out: Folder of the files.
        place: Folder of the run's files.
        split: Split of the rows.

    Raises:
        UnreachableError: MLflow does not answer.
    """
    from mmoe_rec.evaluation.sentences import describe_verdicts, find_all
    from mmoe_rec.evaluation.summary import flatten

    summary, first, inputs = results.first.summary, results.first, BuildInputs.of(settings)
    prepared = existing(inputs)
    fingerprints = {fingerprint_of(inputs.logs, inputs.windows)}
    fingerprints |= set() if prepared is None else {prepared.manifest["fingerprint"]}
    run_id = model.run_id if read_artifact(model.folder, verify=False).fingerprint in fingerprints else None
    uri, name = settings.tracking.address, f"evaluate {model.address}"
    with runs.open_run(uri, settings.experiment, run_name=name, run_id=run_id) as run:
        if prepared is not None:
            run.log_inputs(data_sets(settings, prepared.manifest, split))
        heading = "Evaluation" if split == "test" else f"Evaluation on {split} rows"
        section = "test" if split == "test" else f"{split}_rows"  # `validation` has charts by step
        sentences = quoted([*describe_verdicts(results), *(each.message for each in find_all(results))])
        of_rows = ("log", "rows", "requests", "caution")
        facts = "\n".join(f"- {fact}: {results.facts[fact]}" for fact in of_rows if fact in results.facts)
        page = f"Report: `{place}/report.html` of the artifacts."
        run.describe(heading, f"{sentences}\n\n{facts}\n\n{page}\n\n{as_code(command())}")
        numbers = {  # the ends of intervals get a section of charts of their own
            f"{section}/{'intervals/' if metric.endswith(('.low', '.high')) else ''}{metric}": value
            for metric, value in flatten(summary).items()
        }
        run.log_metrics(numbers)
        run.log_artifact(out / "metrics.json", place)
        run.log_artifact(out / "report.html", place)
    if split != "test" or first.seen:  # what it has learnt says nothing of it
        return
    if (registered := re.fullmatch(r"models:/([^/@]+)/(\d+)", model.address)) is not None:
        rows = f"{summary.rows:,} rows of {settings.data.log}"
        sentences = f"{'; '.join(describe_verdicts(results))} ({rows})"
        report = {"report": f"runs:/{run.run_id}/{place}/report.html", "evaluated": sentences}
        version = get_version(registered[1], registered[2], uri)
        describe_version(version, "", report, uri)


@dataclass(frozen=True)
class EvaluationResult:
    """An evaluation: the test rows as the model scores them, and what was measured of it and of others."""

    scored: ScoredRows
    results: Results

    @property
    def summary(self) -> Summary:
        """The model's metrics."""
        return self.results.first.summary


def evaluate_model(
    settings: Settings, address: str, out: str | Path, against: Sequence[str] = (), split: str = "test"
) -> EvaluationResult:
    """Score the rows of a split with a model, measure them, and write metrics, plots and predictions.

    Waits while another evaluation writes to the same folder.

    Args:
        settings: Settings that name the rows and say what their labels are worth.
        address: URI of the model, or its folder.
        out: Folder for the results, which are also logged to MLflow.
        against: URIs of other models, to compare with on the same rows.
        split: Split of the rows, `test` or `validation`.
    """
    short = short_names([address, *against])
    # A wrong address is reported before torch is loaded.
    models, out = {each: find_model(each, settings.tracking.address) for each in short}, Path(out)
    names: dict[Path, str] = {}
    for each, model in models.items():
        if (folder := model.folder.resolve()) in names:
            raise UserError(f"'{names[folder]}' and '{each}' are the same model, {model.address}")
        names[folder] = each
    by_name = {short[each]: model for each, model in models.items()}
    evaluated = evaluate_found(settings, by_name, out, place_of(split), split)
    write_predictions(evaluated.scored, settings.columns, out)
    return evaluated


def place_of(split: str) -> str:
    """The folder, in `data.work` and among a run's files, of what is measured on a split."""
    return "evaluation" if split == "test" else f"evaluation_{split}"


def evaluate_found(
    settings: Settings,
    models: Mapping[str, Source],
    out: Path,
    place: str = "evaluation",
    split: str = "test",
    note_decision: Callable[[str], int] = lambda rows: 0,
) -> EvaluationResult:
    """Does what `evaluate_model` does for models by their names; the first one is compared with the others.

    place: folder of the run's files; note_decision: tells how many decisions on rows of a digest promoted none before.
    """
    from mmoe_rec.evaluation.results_report import write_results

    rules = settings.evaluation
    check_out(out, settings)
    find_objective(rules.decide_by)
    measured: dict[str, MeasuredModel] = {}
    scored_by_first: ScoredRows | None = None
    (first, *_) = models.values()
    with writing(out, "an evaluation", "give another folder with --out", queue=True):
        slicing = Slicing.of(settings, first.folder)
        for name, each in models.items():
            scored = scored_rows(settings, each, name, split)
            scored_by_first = scored_by_first or scored
            measured[name] = _measure(settings, scored, each, slicing)
        assert scored_by_first is not None, "there is a model"
        title = f"{'Promotion' if place == PROMOTION else 'Evaluation'} of {settings.name}"
        title += "" if split == "test" else f" on {split} rows"
        facts = _facts(settings, split) | {"artifact": version_of(first.folder)}
        tried = note_decision(measured[next(iter(models))].sums.digest)
        results = Results(measured, tuple(settings.tasks), rules, title, facts, tried)
        write_results(results, out)
        try:
            log_evaluation(settings, first, results, out, place, split)
        except UserError as error:
            all_of_it = "" if isinstance(error, UnreachableError) else "all of it "
            say(f"{error}: the evaluation is in '{out}', but not {all_of_it}in MLflow")
    return EvaluationResult(scored_by_first, results)


def scored_rows(settings: Settings, model: Source, name: str, split: str = "test") -> ScoredRows:
    """The rows of a split as a model scores them. Raises UserError where its tasks mean something else."""
    from mmoe_rec.inference.ranker import Ranker

    ranker = Ranker.load(model.folder)
    with rows_to_measure(settings, model.folder, ranker, split) as folder:
        return score_by(settings, ranker.model, ranker.layout, folder, ranker.calibration, name)


def _measure(settings: Settings, scored: ScoredRows, model: Source, slicing: Slicing) -> MeasuredModel:
    facts = {
        "sampling_correction": settings.training.sampling_correction,
        "relevance_weights": dict(scored.relevance),
        "score_weights": {task.name: task.score_weight for task in scored.layout.tasks},
    }
    assert scored.experts is not None, "a model scored the rows"
    gates = [[round(float(each), 4) for each in weights] for weights in scored.experts.weights]
    return scored.predicted.measure(
        settings.evaluation.resamples,
        slicing.find(scored),
        facts,
        address=model.address,
        gates={task.name: weights for task, weights in zip(scored.layout.tasks, gates, strict=True)},
        seen=overlap(settings, model.folder),
        early_end=read_artifact(model.folder, verify=False).early_end,
    )


def _facts(settings: Settings, split: str) -> dict[str, str]:
    """What a reader wants to know of the rows."""
    rows, facts = settings.split, {"log": settings.data.log}
    if rows.column is not None:
        facts["rows"] = f"those with {' or '.join(map(str, getattr(rows, split)))} in column '{rows.column}'"
    else:
        ends = rows.train_end, rows.validation_end, rows.test_end
        begin, end = ends[1:] if split == "test" else ends[:2]
        until = "the end of the log" if end is None else f"{end:%Y-%m-%d %H:%M} UTC"
        facts["requests"] = f"from {begin:%Y-%m-%d %H:%M} UTC to {until}"
    if split == "validation":
        facts["caution"] = "these rows chose the state of the model, so it looks better on them than on others"
    if settings.columns.weight is not None:
        facts["rows count"] = f"by column '{settings.columns.weight}'"
    of = "users" if settings.columns.has_user else "rows" if settings.columns.request is None else "requests"
    facts[f"resamples of {of}"] = f"{settings.evaluation.resamples:,}"
    facts["decides"] = f"{settings.evaluation.decide_by}, margin {settings.evaluation.margin:g}"
    return facts


PREDICTIONS = "predictions.parquet"
"""File of an evaluation: the measured rows of the model in question, as `evaluate --predictions` reads them."""


def write_predictions(scored: ScoredRows, columns: Columns, out: Path) -> None:
    """Write `user`, `request`, `candidate`, `predicted_NAME` and `label_NAME` of each task and outcome, `score`, and
    `weight` where rows have one. Unobserved labels are null.

    Args:
        scored: Rows to write.
        columns: Columns of the log. What it does not have is left out: without candidates, `row` is the number of each
            row in the log.
        out: Folder that gets the file `PREDICTIONS`.
    """
    from mmoe_rec.model.score import scores_from_logs

    rows = scored.predicted
    written: dict[str, Any] = {} if scored.row is None else {ROW: scored.row}
    if columns.has_user:
        written["user"] = rows.users
    if columns.has_user or columns.request is not None:
        written["request"] = rows.requests
    if rows.candidates is not None:
        written["candidate"] = rows.candidates
    written |= {f"predicted_{name}": values for name, values in rows.predictions.items()}
    written |= {f"label_{name}": pa.array(values, from_pandas=True) for name, values in rows.labels.items()}
    written["score"] = scores_from_logs(rows.score)
    if rows.weight is not None:
        written["weight"] = rows.weight
    with atomic_file(out / PREDICTIONS) as path:
        pq.write_table(pa.table(written), path, compression="zstd")
