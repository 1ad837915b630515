"""Decide whether a version of a registered model becomes the champion, and roll back that decision.

The champion is the version that has the alias `tracking.alias`. After training, the new model is compared with the
champion on the evaluation rows. These are the rows of the half of the validation users that did not select the new
model. `promote` compares two versions on the test rows of the settings. Both use the rule of `comparison.decide`. The
decision and the reason are stored with the version.

A champion that can't be served is replaced: if its files are damaged or written by an incompatible version of this
package, or if its predictions are not finite. A champion that can't be compared here keeps the alias: if its tasks or
labels differ, if its files can't be fetched, or if it gives other scores than on the machine that wrote it. If MLflow
does not answer, the alias does not move.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from mmoe_rec.batches.encoded_dataset import EncodedDataset, ValidationPart
from mmoe_rec.errors import UserError
from mmoe_rec.evaluation.comparison import Outcome, Results
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

_RESAMPLES = 200  # few, because these intervals only check whether calibration is grossly wrong


@dataclass(frozen=True)
class Decision:
    """Decision whether a version becomes the champion.

    Attributes:
        address: URI of the version in the registry.
        promoted: Whether the version is the champion now.
        reasons: Sentences on the comparison, and on the version that is the champion now.
        results: Results of both versions if `promote_version` measured them, else None.
    """

    address: str
    promoted: bool
    reasons: tuple[str, ...]
    results: Results | None = None


def promote_trained(
    run: Run, settings: Settings, prepared: FeatureFolder, model: RankingModel, artifact: Path, description: str = ""
) -> Decision:
    """Register a trained model, and make it the champion if it is better. Else it gets the alias `challenger`.

    A repeated call for the same run registers the model only once. If somebody else moves the champion's alias during
    the comparison, the model gets the alias `challenger`.

    Args:
        run: Run of the training.
        settings: Settings of the run.
        prepared: Folder of features.
        model: The trained model.
        artifact: Folder of the model's files.
        description: Text that follows the verdict in the version's description.

    Raises:
        UnreachableError: MLflow does not answer.
        UserError: MLflow refuses the request.
    """
    name, alias, uri = settings.registered_model, settings.tracking.alias, settings.tracking.resolved_uri
    champion = registry.find_champion(name, alias, uri)
    if champion is not None and champion.run_id == run.run_id:  # the process was killed after moving the alias
        return Decision(f"models:/{name}@{alias}", True, (f"'{alias}' is version {champion.number}, this model",))
    # An earlier call may have registered the model before an outage of MLflow cut it off.
    tags = {"data.digest": prepared.manifest["digest"], "features.fingerprint": prepared.manifest["fingerprint"]}
    number = registry.find_registered_version(run, name) or registry.register_model(run, artifact, name, tags=tags)
    version = ModelVersion(name, number, run.run_id)
    better, reason = compare_with_champion(settings, prepared, model, artifact, champion)
    if (latest_champion := registry.find_champion(name, alias, uri)) != champion:
        better = False
        reason = f"'{alias}' has moved during the comparison. Compare again with `mmoe-rec promote`."
        champion = latest_champion
    decision = {"promoted": str(better), "compared": reason}
    run.set_tags(decision)
    if better:
        registry.move_alias(name, alias, number, uri, champion)
    registry.describe_version(version, f"{reason}\n\n{description}", decision, uri)
    if better:
        return Decision(f"models:/{name}@{alias}", True, (reason, f"'{alias}' is version {number} now, this model"))
    outcome = f"'{alias}' stays {'without a version' if champion is None else f'version {champion.number}'}"
    if alias == CHALLENGER_ALIAS:
        return Decision(version.uri, False, (reason, outcome))
    registry.move_alias(name, CHALLENGER_ALIAS, number, uri)
    outcome += f"; this model, version {number}, is '{CHALLENGER_ALIAS}'"
    return Decision(f"models:/{name}@{CHALLENGER_ALIAS}", False, (reason, outcome))


def compare_with_champion(
    settings: Settings, prepared: FeatureFolder, model: RankingModel, artifact: Path, champion: ModelVersion | None
) -> tuple[bool, str]:
    """Compare a trained model with the champion on the evaluation rows.

    Args:
        settings: Settings of the run.
        prepared: Folder of features.
        model: The trained model.
        artifact: Folder of the model's files.
        champion: The champion, None if no version has its alias.

    Returns:
        Whether the model should become the champion, and a sentence with the reason.

    Raises:
        UnreachableError: MLflow does not answer.
    """
    alias, name = settings.tracking.alias, "this model"
    if champion is None:
        return True, f"'{alias}' belonged to no model before"
    try:
        folder = registry.fetch_model(champion.uri, settings.tracking.resolved_uri)
        ranker = _load(folder)
        if isinstance(ranker, Exception):
            return _judge_trouble(ranker, champion, alias)
        if overlap := describe_training_overlap(settings, folder, "validation"):
            raise UserError(f"it {overlap[0]}")
        champion_name = f"version {champion.number}"
        layout, calibration = ModelLayout.of(prepared.layout, settings), read_calibration(artifact)
        rows = _open_judging_rows(prepared.split("validation"), layout)  # raises if there are too few users
        champion_rows = _score_by_champion(settings, prepared, ranker, folder, champion_name)
        model_rows = score_rows(settings, model, layout, rows, calibration, name)
        slicing = None if settings.evaluation.guardrail_slices == () else RowSlicer(settings, artifact)
        models = {
            label: measure_model(scored, _RESAMPLES, {} if slicing is None else slicing.find(scored))
            for label, scored in ((name, model_rows), (champion_name, champion_rows))
        }
        better, sentence = _read_verdict(Results(models, tuple(settings.tasks), settings.evaluation, "", {}))
        return better, f"{sentence} ({len(model_rows.score):,} evaluation rows of the validation split)"
    except UnreachableError:
        raise  # an outage of MLflow decides nothing
    except NotFiniteError as error:
        return error.name != name, str(error)
    except UserError as error:
        return _judge_trouble(error, champion, alias, is_loaded=True)


def _judge_trouble(trouble: Exception, champion: ModelVersion, alias: str, is_loaded: bool = False) -> tuple[bool, str]:
    """Return whether to replace a champion because of an error, and the reason.

    `is_loaded`: The error occurred after the champion was loaded.
    """
    version, problem = f"version {champion.number} (alias '{alias}')", _one_line(trouble)
    # UserError and predictions that are not finite occur on every machine. Lack of memory may occur here alone.
    is_broken = isinstance(trouble, UserError) or "not finite numbers" in problem
    if is_broken and not is_loaded and not isinstance(trouble, PredictionMismatchError):
        return True, f"{version} can't be served any more: {problem}"
    advice = "To serve another version, move the alias by hand."
    return False, f"{version} can't be compared on this machine: {problem}. {advice}"


def _read_verdict(results: Results) -> tuple[bool, str]:
    """Return whether the first of two models is better, and the reason."""
    assert results.comparison is not None
    (verdict,) = results.comparison.verdicts.values()
    return verdict.kind == Outcome.BETTER, verdict.message


def _score_by_champion(
    settings: Settings, prepared: FeatureFolder, ranker: Ranker, folder: Path, name: str
) -> PredictedRows:
    """Score the evaluation rows with the champion, or raise UserError if the champion has other tasks.

    The rows in `prepared`, which were encoded for the new model, are used if both models have the same features, or if
    the new features extend the champion's features. Otherwise the rows are encoded again with the champion's features.
    """

    def score(model: RankingModel, layout: ModelLayout, folder: Path) -> PredictedRows:
        return score_rows(settings, model, layout, _open_judging_rows(folder, layout), ranker.calibration, name)

    check_tasks(settings, ranker.pipeline.schema)
    manifest, validation = prepared.manifest, prepared.split("validation")
    if manifest["fingerprint"] == ranker.info.fingerprint:
        return score(ranker.model, ranker.layout, validation)
    if "extends" in manifest and (extended := _grow(prepared, ranker, folder)) is not None:
        return score(*extended, validation)
    say(f"encoding the validation rows for {name}, whose features differ")
    with open_encoded_split(settings, folder, ranker, "validation") as rows:
        return score(ranker.model, ranker.layout, rows)


def _open_judging_rows(folder: Path, layout: ModelLayout) -> EncodedDataset:
    """Open the evaluation rows, or raise UserError if too few validation users have labels to divide the users."""
    rows = EncodedDataset(folder, layout, part=ValidationPart.EVALUATION)
    if not rows.uses_part:
        raise UserError(
            "the validation rows have too few users with labels. Half of the users select the model, and the other "
            "half compares it. Extend the validation split to more users."
        )
    return rows


def _grow(prepared: FeatureFolder, ranker: Ranker, folder: Path) -> tuple[RankingModel, ModelLayout] | None:
    """Return the champion and its layout with larger tables, for features that only add IDs to the champion's features.

    New IDs get copies of the embeddings that they had as unknown IDs, so no output changes. Return None if the features
    differ by more than new IDs.
    """
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
    """Compare a version with the champion on the test rows, write a report, and promote it if it is better.

    Args:
        settings: Settings of the model's name, the log and its split.
        challenger: Number or alias of the version.
        out: Folder for the report.

    Raises:
        UserError: There is no such version, or it can't be compared with the champion.
    """
    name, alias, uri = settings.registered_model, settings.tracking.alias, settings.tracking.resolved_uri
    version, champion = _find_version(name, challenger, uri), registry.find_champion(name, alias, uri)
    if champion == version:
        return Decision(version.uri, True, (f"version {version.number} has the alias '{alias}' already",))
    better, reasons, results = _judge_versions(settings, version, champion, out)
    if better and registry.find_champion(name, alias, uri) != champion:
        better, reasons = False, [f"'{alias}' has moved while this command ran. Run the command again."]
    if better:
        registry.move_alias(name, alias, version.number, uri, champion)
    tags = {"promoted": f"'{alias}' since this comparison" if better else "no", "compared": "; ".join(reasons)[:4000]}
    registry.tag_version(version, tags, uri)
    now = f"'{alias}' is version {version.number} now" if better else f"'{alias}' stays as it was"
    return Decision(version.uri, better, (*reasons, now), results)


def _judge_versions(
    settings: Settings, version: ModelVersion, champion: ModelVersion | None, out: Path
) -> tuple[bool, list[str], Results | None]:
    """Return whether a version should replace the champion, the reasons, and the results if both were measured."""
    alias, uri = settings.tracking.alias, settings.tracking.resolved_uri
    folder = registry.fetch_model(version.uri, uri)
    challenger_model = _load(folder)
    if isinstance(challenger_model, Exception):
        return False, [f"version {version.number} can't be served: {_one_line(challenger_model)}"], None
    if champion is None:
        return True, [f"'{alias}' belonged to no version before"], None
    champion_folder = registry.fetch_model(champion.uri, uri)
    champion_model = _load(champion_folder)
    if isinstance(champion_model, Exception):
        better, reason = _judge_trouble(champion_model, champion, alias)
        return better, [reason], None
    models = {
        f"version {compared.number}": ResolvedModel(path, compared.uri, compared.run_id)
        for compared, path in ((version, folder), (champion, champion_folder))
    }
    name, champion_name = models
    try:
        results = evaluate_models(settings, models, out, artifact_path=PROMOTION_FOLDER)
    except NotFiniteError as error:
        return error.name == champion_name, [str(error)], None
    objections = _find_objections(results, name, champion_name)
    return not objections, objections or [_read_verdict(results)[1]], results


def _find_objections(results: Results, name: str, champion_name: str) -> list[str]:
    """Return the reasons not to promote a version.

    The reasons are training of either version on the measured rows, a verdict that is not `better`, and suspicious
    metrics of the version if the champion doesn't have the same finding.
    """
    assert results.comparison is not None
    (better, sentence), findings = _read_verdict(results), find_suspicious_results(results)
    objections = [
        f"{model} {training_overlap}"
        for model, measured in results.models.items()
        for training_overlap in measured.training_overlap
    ]
    objections += [] if better else [sentence]
    champion_findings = {(finding.check, finding.task) for finding in findings if finding.model == champion_name}
    # Findings about tasks with too few labels decide nothing.
    eligible_tasks = (*results.comparison.eligible_tasks, SCORE)
    own_findings = [finding for finding in findings if finding.model == name and finding.task in eligible_tasks]
    return objections + [
        finding.message for finding in own_findings if (finding.check, finding.task) not in champion_findings
    ]


def roll_back(settings: Settings) -> Decision:
    """Move the champion's alias back to the previous champion.

    Raises:
        UserError: There is no champion, the previous one is unknown or can't be served, or somebody moves the alias.
    """
    name, alias, uri = settings.registered_model, settings.tracking.alias, settings.tracking.resolved_uri
    champion = registry.find_champion(name, alias, uri)
    if champion is None:
        raise UserError(f"no version of '{name}' has the alias '{alias}'")
    previous = champion.find_previous_champion(alias)
    if previous is None:
        unknown = f"the version of '{name}' with the alias '{alias}' before version {champion.number}"
        raise UserError(f"{unknown} is unknown. Move the alias by hand.")
    version = registry.get_version(name, previous, uri)
    if isinstance(model := _load(registry.fetch_model(version.uri, uri)), Exception):
        raise UserError(
            f"version {previous}, which had the alias '{alias}' before, can't be served: {_one_line(model)}"
        )
    if registry.find_champion(name, alias, uri) != champion:
        raise UserError(f"'{alias}' has moved while this command ran. Run the command again.")
    registry.move_alias(name, alias, previous, uri)
    registry.clear_previous_champion(champion, alias, uri)
    registry.tag_version(champion, {"promoted": f"no more: '{alias}' went back to version {previous}"}, uri)
    registry.tag_version(version, {"promoted": f"'{alias}' again, after version {champion.number}"}, uri)
    sentence = f"'{alias}' is version {previous} again, as before version {champion.number}"
    if (as_of := model.info.tables_as_of) is None:  # the log has no times
        return Decision(version.uri, True, (sentence,))
    tables = f"its tables are as of {as_of}: `mmoe-rec refresh` adds newer events"
    return Decision(version.uri, True, (sentence, tables))


def _find_version(name: str, word: str, uri: str) -> ModelVersion:
    word = word.removeprefix(f"models:/{name}/").removeprefix(f"models:/{name}@")
    if word.isdigit():
        return registry.get_version(name, word, uri)
    version = registry.find_champion(name, word, uri)
    if version is None:
        held = ", ".join(f"'{alias}' ({number})" for alias, number in sorted(registry.list_aliases(name, uri).items()))
        others = f"existing aliases are {held}" if held else "there are no aliases"
        raise UserError(
            f"no version of '{name}' has the alias '{word}'. Give the number of a version, or another alias ({others})."
        )
    return version


def _load(folder: Path) -> Ranker | Exception:
    """Load a model, and check its files, their format and its scores for an example. Return the error if one fails."""
    try:
        return Ranker.load(folder)
    except (UserError, RuntimeError) as error:  # RuntimeError: wrong scores for the example, or too little memory
        return error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
