"""Whether a version of a registered model takes an alias from the one that holds it, and the way back.

After a training the two are compared on the validation rows of users that chose nothing about the trained model;
`promote` measures two versions on the settings' test rows. Both decide by the rule of every comparison, with an
interval over users and guardrails for each task. What was decided, and why, is kept with the version.

A holder that can't be served any more (damaged, of another version, with predictions that are not finite) gives way.
One that can't be compared here (tasks or labels that mean something else, files that can't be fetched, other scores
than where it was written) keeps the alias. An outage of MLflow decides nothing.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from mmoe_rec.batches.encoded_dataset import EncodedDataset, ValidationPart
from mmoe_rec.errors import UserError
from mmoe_rec.evaluation.comparison import BETTER, Results
from mmoe_rec.evaluation.evaluate import (
    PROMOTION_FOLDER,
    NotFiniteError,
    check_tasks,
    describe_training_overlap,
    evaluate_models,
    open_encoded_split,
    score_rows,
)
from mmoe_rec.evaluation.messages import find_suspicious_results
from mmoe_rec.evaluation.slices import RowSlicer
from mmoe_rec.evaluation.summary import SCORE, measure_model
from mmoe_rec.evaluation.sums import PredictedRows
from mmoe_rec.inference.artifact import ResolvedModel, read_calibration
from mmoe_rec.inference.ranker import PredictionMismatchError, Ranker
from mmoe_rec.model.mmoe import RankingModel, build_model
from mmoe_rec.model.model_layout import ModelLayout
from mmoe_rec.model.tables import PlainTables
from mmoe_rec.model.warm_start import WarmStart
from mmoe_rec.preprocessing.prepare import FeatureFolder
from mmoe_rec.progress import say
from mmoe_rec.settings.model import Model
from mmoe_rec.settings.sections import Settings
from mmoe_rec.tracking import registry
from mmoe_rec.tracking.client import UnreachableError
from mmoe_rec.tracking.registry import CHALLENGER_ALIAS, ModelVersion
from mmoe_rec.tracking.runs import Run

_RESAMPLES = 200  # of the intervals of calibration, which only tell whether it is far off


@dataclass(frozen=True)
class Decision:
    """What became of a version. address: in the registry; promoted: whether it holds the alias; reasons: sentences on
    how it did beside the version that held it, and on who holds it now; results: where both were measured."""

    address: str
    promoted: bool
    reasons: tuple[str, ...]
    results: Results | None = None


def promote_trained(
    run: Run, settings: Settings, prepared: FeatureFolder, model: RankingModel, artifact: Path, about: str = ""
) -> Decision:
    """Registers a trained model, and points the alias at it if it is better than the holder, else `challenger`.

    model: that of the artifact; about: what the version's description says of it before the verdict. Raises
    UnreachableError where MLflow does not answer, UserError where it refuses. When the same run does it again, nothing
    is registered twice. Where the alias moves meanwhile, the model becomes the challenger.
    """
    name, alias, uri = settings.registered_model, settings.tracking.alias, settings.tracking.resolved_uri
    champion = registry.find_champion(name, alias, uri)
    if champion is not None and champion.run_id == run.run_id:  # a kill came between the alias and the training's end
        return Decision(f"models:/{name}@{alias}", True, (f"'{alias}' is version {champion.number}, this model",))
    # What came between may also have been an outage of MLflow.
    tags = {"data.digest": prepared.manifest["digest"], "features.fingerprint": prepared.manifest["fingerprint"]}
    number = registry.find_registered_version(run, name) or registry.register_model(run, artifact, name, tags=tags)
    version = ModelVersion(name, number, run.run_id)
    better, reason = compare_with_champion(settings, prepared, model, artifact, champion)
    if (now := registry.find_champion(name, alias, uri)) != champion:
        better, reason, champion = False, f"'{alias}' has moved meanwhile: compare with `mmoe-rec promote`", now
    decision = {"promoted": str(better), "compared": reason}
    run.set_tags(decision)
    if better:
        registry.move_alias(name, alias, number, uri, champion)
    registry.describe_version(version, f"{reason}\n\n{about}", decision, uri)
    if better:
        return Decision(f"models:/{name}@{alias}", True, (reason, f"'{alias}' is version {number} now, this model"))
    stays = f"'{alias}' stays {'without a version' if champion is None else f'version {champion.number}'}"
    if alias == CHALLENGER_ALIAS:
        return Decision(version.uri, False, (reason, stays))
    registry.move_alias(name, CHALLENGER_ALIAS, number, uri)
    stays += f"; this model, version {number}, is '{CHALLENGER_ALIAS}'"
    return Decision(f"models:/{name}@{CHALLENGER_ALIAS}", False, (reason, stays))


def compare_with_champion(
    settings: Settings, prepared: FeatureFolder, model: RankingModel, artifact: Path, champion: ModelVersion | None
) -> tuple[bool, str]:
    """Whether a trained model is better than the version that holds the alias, and the sentence that says why."""
    alias, name = settings.tracking.alias, "this model"
    if champion is None:
        return True, f"no model held '{alias}' before"
    try:
        folder = registry.fetch_model(champion.uri, settings.tracking.resolved_uri)
        ranker = _load(folder)
        if isinstance(ranker, Exception):
            return _judge_trouble(ranker, champion, alias)
        if seen := describe_training_overlap(settings, folder, "validation"):
            raise UserError(f"it {seen[0]}")
        its_name = f"version {champion.number}"
        layout, calibration = ModelLayout.of(prepared.layout, settings), read_calibration(artifact)
        rows = _open_judging_rows(prepared.split("validation"), layout)  # too few users are found before any is scored
        its = _score_by_holder(settings, prepared, ranker, folder, its_name)
        mine = score_rows(settings, model, layout, rows, calibration, name)
        slicing = None if settings.evaluation.guardrail_slices == () else RowSlicer(settings, artifact)
        models = {
            each: measure_model(scored, _RESAMPLES, {} if slicing is None else slicing.find(scored))
            for each, scored in ((name, mine), (its_name, its))
        }
        better, sentence = _read_verdict(Results(models, tuple(settings.tasks), settings.evaluation, "", {}))
        return better, f"{sentence} ({len(mine.score):,} judging rows of the validation split)"
    except UnreachableError:
        raise  # an outage decides nothing
    except NotFiniteError as error:
        return error.name != name, str(error)
    except UserError as error:
        return _judge_trouble(error, champion, alias, is_loaded=True)


def _judge_trouble(trouble: Exception, champion: ModelVersion, alias: str, is_loaded: bool = False) -> tuple[bool, str]:
    """Whether a holder that can't be loaded, or else compared, gives way, and the sentence that says why."""
    who, what = f"version {champion.number}, which holds '{alias}',", _one_line(trouble)
    # What is wrong with it wherever it is loaded; memory may lack here alone.
    is_broken = isinstance(trouble, UserError) or "not finite numbers" in what
    if is_broken and not is_loaded and not isinstance(trouble, PredictionMismatchError):
        return True, f"{who} can't be served any more: {what}"
    return False, f"{who} can't be compared here: {what}; point the alias at another one yourself if that is to serve"


def _read_verdict(results: Results) -> tuple[bool, str]:
    """Whether the first of two models is better, and the sentence that says why."""
    assert results.comparison is not None
    (verdict,) = results.comparison.verdicts.values()
    return verdict.kind == BETTER, verdict.message


def _score_by_holder(
    settings: Settings, prepared: FeatureFolder, ranker: Ranker, folder: Path, name: str
) -> PredictedRows:
    """The judging rows as the holder scores them: the training's, where its features are the same or were extended
    from its own; else encoded anew. Raises UserError where its tasks mean something else."""

    def score(model: RankingModel, layout: ModelLayout, folder: Path) -> PredictedRows:
        return score_rows(settings, model, layout, _open_judging_rows(folder, layout), ranker.calibration, name)

    check_tasks(settings, ranker.pipeline.schema)
    manifest, validation = prepared.manifest, prepared.split("validation")
    if manifest["fingerprint"] == ranker.info.fingerprint:
        return score(ranker.model, ranker.layout, validation)
    if "extends" in manifest and (grown := _grow(prepared, ranker, folder)) is not None:
        return score(*grown, validation)
    say(f"encoding the validation rows for {name}, which has other features")
    with open_encoded_split(settings, folder, ranker, "validation") as rows:
        return score(ranker.model, ranker.layout, rows)


def _open_judging_rows(folder: Path, layout: ModelLayout) -> EncodedDataset:
    """Open the validation rows of users that chose nothing. Raises UserError where there are too few users for that."""
    rows = EncodedDataset(folder, layout, part=ValidationPart.EVALUATION)
    if not rows.uses_part:
        raise UserError(
            "the validation rows have too few users with labels: one half of them chooses the model, and the other has "
            "to judge it. Give the validation split rows of more users"
        )
    return rows


def _grow(prepared: FeatureFolder, ranker: Ranker, folder: Path) -> tuple[RankingModel, ModelLayout] | None:
    """A model and its layout on features that were extended from its own, with the same outputs; None for others."""
    structure = Model.model_validate(ranker.info.model)
    rows = {table.name: table.rows for table in prepared.layout.tables}
    tables = tuple(replace(table, rows=rows.get(table.name, table.rows)) for table in ranker.layout.tables)
    layout = replace(ranker.layout, tables=tables)
    try:
        start = WarmStart(folder, structure, prepared, layout, structure)
    except UserError:
        return None
    model = build_model(layout, structure, PlainTables(layout))
    model.trees = ranker.model.trees
    start.fill(model)
    return model, layout


def promote_version(settings: Settings, challenger: str, out: Path) -> Decision:
    """Decides by the test rows, and moves the alias if the challenger is better; writes the report to a folder.

    challenger: number of a version, or an alias. Raises UserError for a version that there is not, or where the two
    can't be compared.
    """
    name, alias, uri = settings.registered_model, settings.tracking.alias, settings.tracking.resolved_uri
    version, champion = _find_version(name, challenger, uri), registry.find_champion(name, alias, uri)
    if champion == version:
        return Decision(version.uri, True, (f"version {version.number} holds '{alias}' already",))
    better, reasons, results = _judge_versions(settings, version, champion, out)
    if better and registry.find_champion(name, alias, uri) != champion:
        better, reasons = False, [f"'{alias}' has moved meanwhile: run the command again"]
    if better:
        registry.move_alias(name, alias, version.number, uri, champion)
    tags = {"promoted": f"'{alias}' since this comparison" if better else "no", "compared": "; ".join(reasons)[:4000]}
    registry.tag_version(version, tags, uri)
    now = f"'{alias}' is version {version.number} now" if better else f"'{alias}' stays as it was"
    return Decision(version.uri, better, (*reasons, now), results)


def _judge_versions(
    settings: Settings, version: ModelVersion, champion: ModelVersion | None, out: Path
) -> tuple[bool, list[str], Results | None]:
    """Whether a version is better than the holder, the reasons, and what was measured."""
    alias, uri = settings.tracking.alias, settings.tracking.resolved_uri
    folder = registry.fetch_model(version.uri, uri)
    mine = _load(folder)
    if isinstance(mine, Exception):
        return False, [f"version {version.number} can't be served: {_one_line(mine)}"], None
    if champion is None:
        return True, [f"no version held '{alias}' before"], None
    its_folder = registry.fetch_model(champion.uri, uri)
    its = _load(its_folder)
    if isinstance(its, Exception):
        better, why = _judge_trouble(its, champion, alias)
        return better, [why], None
    models = {
        f"version {each.number}": ResolvedModel(where, each.uri, each.run_id)
        for each, where in ((version, folder), (champion, its_folder))
    }
    name, its_name = models
    try:
        results = evaluate_models(settings, models, out, artifact_path=PROMOTION_FOLDER)
    except NotFiniteError as error:
        return error.name == its_name, [str(error)], None
    against = _find_objections(results, name, its_name)
    return not against, against or [_read_verdict(results)[1]], results


def _find_objections(results: Results, name: str, its_name: str) -> list[str]:
    """What speaks against a version: rows that either has seen, the verdict, and what is suspicious about it alone."""
    assert results.comparison is not None
    (better, sentence), findings = _read_verdict(results), find_suspicious_results(results)
    objections = [
        f"{model} {training_overlap}"
        for model, each in results.models.items()
        for training_overlap in each.training_overlap
    ]
    objections += [] if better else [sentence]
    its = {(each.check, each.task) for each in findings if each.model == its_name}
    # What is found of a task that is not judged, as few rows have a label, decides nothing.
    eligible_tasks = (*results.comparison.eligible_tasks, SCORE)
    mine = [each for each in findings if each.model == name and each.task in eligible_tasks]
    return objections + [each.message for each in mine if (each.check, each.task) not in its]


def roll_back(settings: Settings) -> Decision:
    """Gives the alias back to the version that held it before the one that holds it now.

    Raises UserError where that is unknown, or can't be served any more, or the alias moves meanwhile.
    """
    name, alias, uri = settings.registered_model, settings.tracking.alias, settings.tracking.resolved_uri
    champion = registry.find_champion(name, alias, uri)
    if champion is None:
        raise UserError(f"no version of '{name}' holds '{alias}'")
    before = champion.find_previous_champion(alias)
    if before is None:
        which = f"which version of '{name}' held '{alias}' before version {champion.number}"
        raise UserError(f"it is not known {which}; point the alias at it by hand")
    version = registry.get_version(name, before, uri)
    if isinstance(model := _load(registry.fetch_model(version.uri, uri)), Exception):
        raise UserError(f"version {before}, which held '{alias}' before, can't be served: {_one_line(model)}")
    if registry.find_champion(name, alias, uri) != champion:
        raise UserError(f"'{alias}' has moved meanwhile: run the command again")
    registry.move_alias(name, alias, before, uri)
    registry.clear_previous_champion(champion, alias, uri)
    registry.tag_version(champion, {"promoted": f"no more: '{alias}' went back to version {before}"}, uri)
    registry.tag_version(version, {"promoted": f"'{alias}' again, after version {champion.number}"}, uri)
    sentence = f"'{alias}' is version {before} again, which held it before version {champion.number}"
    if (as_of := model.info.tables_as_of) is None:  # of a log without times
        return Decision(version.uri, True, (sentence,))
    tables = f"its tables are as of {as_of}: `mmoe-rec refresh` takes in what came since"
    return Decision(version.uri, True, (sentence, tables))


def _find_version(name: str, word: str, uri: str) -> ModelVersion:
    word = word.removeprefix(f"models:/{name}/").removeprefix(f"models:/{name}@")
    if word.isdigit():
        return registry.get_version(name, word, uri)
    version = registry.find_champion(name, word, uri)
    if version is None:
        held = ", ".join(f"'{alias}' ({number})" for alias, number in sorted(registry.list_aliases(name, uri).items()))
        others = f"those that are held are {held}" if held else "none is held"
        raise UserError(f"no version of '{name}' holds the alias '{word}': {others}; or give the number of a version")
    return version


def _load(folder: Path) -> Ranker | Exception:
    """The ranker, whose files, format and example were checked, or why it can't be served here."""
    try:
        return Ranker.load(folder)
    except (UserError, RuntimeError) as error:  # or it fails at its own example, or for want of memory
        return error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
