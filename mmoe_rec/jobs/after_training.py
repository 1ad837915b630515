"""Which model holds the alias after a training: the new one, if it is shown to be better than the holder on the same
rows.

Both score the training's validation rows, and are compared as models are anywhere (`mmoe_rec.evaluation.judging`): by
`evaluation.decide_by`, with an interval over users, and with guardrails for each task. The holder's features may be
others:

- those of the training, or ones that these were extended from: the training's rows give the holder's own outputs;
- others: the validation rows are encoded anew by the holder's own features, which reads the log.

A holder that could not be served any more (of an earlier version, damaged, with predictions that are not finite) gives
way. One that can't be compared (tasks or labels that mean something else, other rows, files that can't be fetched,
other scores on this machine than where it was written) keeps the alias. An outage of MLflow decides nothing. What holds
the alias is looked up again right before it is moved, and compared anew if it is another model by then.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from mmoe_rec.errors import UserError
from mmoe_rec.jobs.metrics import score_by
from mmoe_rec.jobs.places import logs_for
from mmoe_rec.jobs.workspace import CHALLENGER
from mmoe_rec.preprocessing.prepare import Prepared, encode_with
from mmoe_rec.progress import say
from mmoe_rec.settings.sections import Settings, differences
from mmoe_rec.tracking import registry
from mmoe_rec.tracking.outbox import UnreachableError
from mmoe_rec.tracking.registry import Version, describe_version, fetch_model, find_holder, move_alias
from mmoe_rec.tracking.runs import Run

if TYPE_CHECKING:
    from mmoe_rec.evaluation.scoring import ScoredRows
    from mmoe_rec.inference.ranker import Ranker
    from mmoe_rec.model.layout import ModelLayout
    from mmoe_rec.model.mmoe import RankingModel
    from mmoe_rec.model.score import Calibration


_RESAMPLES = 200  # of the intervals of calibration, which only tell whether it is far off


@dataclass(frozen=True)
class Promotion:
    """What became of a new model. address: in the registry; promoted: whether it holds the alias; compared: sentences
    on how it did beside the model that held it, and on who holds it now."""

    address: str
    promoted: bool
    compared: tuple[str, ...]


@dataclass(frozen=True)
class Judgement:
    """Whether a model is better than the holder of the alias, with the sentence that says why."""

    better: bool
    reason: str


def promote(
    run: Run, settings: Settings, prepared: Prepared, model: RankingModel, artifact: Path, about: str = ""
) -> Promotion:
    """Registers a model, and points the alias at it if it is better than the one that holds it, else `challenger`.

    model: that of the artifact; about: what the version's description says of it before the verdict. Raises
    UnreachableError where MLflow does not answer, UserError where it refuses. When the same run does it again, nothing
    is registered twice.
    """
    name, alias, uri = settings.registered_model, settings.tracking.alias, settings.tracking.address
    holder = find_holder(name, alias, uri)
    if holder is not None and holder.run_id == run.run_id:  # a kill came between the alias and the training's end
        return Promotion(f"models:/{name}@{alias}", True, (f"'{alias}' is version {holder.number}, this model",))
    # What came between may also have been an outage of MLflow.
    tags = {"data.digest": prepared.manifest["digest"], "features.fingerprint": prepared.manifest["fingerprint"]}
    number = registry.find_registered(run, artifact, name) or registry.register_model(run, artifact, name, tags=tags)
    comparison = HolderComparison(settings, prepared, model, artifact)
    while True:
        verdict = comparison.with_holder(holder)
        now = find_holder(name, alias, uri)
        if now == holder:
            break
        say(f"'{alias}' has moved to {'no model' if now is None else f'version {now.number}'} meanwhile")
        holder = now
    decision = {"promoted": str(verdict.better), "compared": verdict.reason}
    run.set_tags(decision)
    mine = Version(name, number, run.run_id)
    if verdict.better:
        move_alias(name, alias, number, uri, holder)
    describe_version(mine, f"{verdict.reason}\n\n{about}", decision, uri)
    if verdict.better:
        said = f"'{alias}' is version {number} now, this model"
        return Promotion(f"models:/{name}@{alias}", True, (verdict.reason, said))
    assert holder is not None, "without a holder the new model is better"
    stays = f"'{alias}' stays version {holder.number}"
    if alias == CHALLENGER:
        return Promotion(Version(name, number, run.run_id).address, False, (verdict.reason, stays))
    move_alias(name, CHALLENGER, number, uri)
    said = f"{stays}; this model, version {number}, is '{CHALLENGER}'"
    return Promotion(f"models:/{name}@{CHALLENGER}", False, (verdict.reason, said))


class HolderComparison:
    """Compares a new model with others on the validation rows of its training. model: that of the artifact."""

    def __init__(self, settings: Settings, prepared: Prepared, model: RankingModel, artifact: Path) -> None:
        from mmoe_rec.model.layout import ModelLayout

        self.settings, self.prepared, self.model, self.artifact = settings, prepared, model, artifact
        self.layout = ModelLayout.of(prepared.layout, settings)

    def with_holder(self, holder: Version | None) -> Judgement:
        """Whether the new model is better than the one that holds the alias."""
        from mmoe_rec.evaluation.scoring import NotFiniteError
        from mmoe_rec.inference.ranker import OtherScoresError, Ranker

        alias = self.settings.tracking.alias
        if holder is None:
            return Judgement(True, f"no model held '{alias}' before")
        who = f"version {holder.number}, which holds '{alias}',"
        by_hand = "point the alias at the new one yourself if it is to serve, or set tracking.registered_model"
        try:
            folder = fetch_model(holder.address, self.settings.tracking.address)
        except UnreachableError:
            raise  # an outage decides nothing
        except UserError as error:
            return Judgement(False, f"{who} can't be compared: {error}; {by_hand}")
        try:
            ranker = Ranker.load(folder)
        except (UserError, RuntimeError) as error:  # or it fails at its own example
            told = " ".join(str(error).split())
            here = isinstance(error, OtherScoresError)  # on another machine it may serve well
            cannot = f"can't be compared: {told}; {by_hand}" if here else f"can't be served any more: {told}"
            return Judgement(not here, f"{who} {cannot}")
        try:
            its = self._holders(ranker, folder, holder)
            return self._judge(its, holder)
        except NotFiniteError:
            return Judgement(True, f"{who} gives predictions that are not finite numbers")
        except UserError as error:
            return Judgement(False, f"{who} can't be compared: {error}; {by_hand}")

    def _judge(self, its: ScoredRows, holder: Version) -> Judgement:
        from mmoe_rec.evaluation.comparison import BETTER, compare
        from mmoe_rec.evaluation.scoring import NotFiniteError
        from mmoe_rec.evaluation.summary import MeasuredModel, summarise
        from mmoe_rec.report.sentences import describe_verdict

        try:
            own = self._own
        except NotFiniteError:
            return Judgement(False, "this model gives predictions that are not finite numbers")
        rules, version = self.settings.evaluation, f"version {holder.number}"
        sums = {name: each.measure() for name, each in (("this model", own), (version, its))}
        models = {name: MeasuredModel(each, summarise(each, _RESAMPLES)) for name, each in sums.items()}
        compared = compare(models, "this model", list(self.settings.tasks), rules, rules.resamples)
        verdict = compared.against[version].verdict
        sentence = describe_verdict(compared, version, models["this model"].summary)
        assert verdict is not None, "a comparison has verdicts"
        return Judgement(verdict.kind == BETTER, f"{sentence} ({len(own.score):,} validation rows)")

    @cached_property
    def _own(self) -> ScoredRows:
        from mmoe_rec.inference.artifact import read_calibration

        rows, calibration = self.prepared.split("validation"), read_calibration(self.artifact)
        return self._scored(self.model, self.layout, rows, calibration)

    def _scored(self, model: RankingModel, layout: ModelLayout, rows: Path, calibration: Calibration) -> ScoredRows:
        return score_by(self.settings, model, layout, rows, calibration)

    def _holders(self, ranker: Ranker, folder: Path, holder: Version) -> ScoredRows:
        """The rows as the holder scores them. Raises UserError where its tasks mean something else."""
        its, tasks = ({"tasks": each.identity()["tasks"]} for each in (ranker.pipeline.schema, self.settings.schema_))
        if set(its["tasks"]) != set(tasks["tasks"]):
            raise UserError(f"it predicts {', '.join(its['tasks'])}, and the new model {', '.join(tasks['tasks'])}")
        for where, before, now in differences(its, tasks):
            raise UserError(f"its '{where}' is {before}, and {now} in the settings, so it predicts something else")
        manifest, rows = self.prepared.manifest, self.prepared.split("validation")
        if manifest["fingerprint"] == ranker.about.fingerprint:
            return self._scored(ranker.model, ranker.layout, rows, ranker.calibration)
        if "extends" in manifest and (grown := self._grown(ranker, folder)) is not None:
            model, layout = grown
            return self._scored(model, layout, rows, ranker.calibration)
        say(f"encoding the validation rows for version {holder.number}, which has other features")
        encoded = Path(self.settings.data.work) / "champion"
        try:
            self._encode(ranker, folder, encoded)
            return self._scored(ranker.model, ranker.layout, encoded / "validation", ranker.calibration)
        finally:
            shutil.rmtree(encoded, ignore_errors=True)

    def _grown(self, ranker: Ranker, folder: Path) -> tuple[RankingModel, ModelLayout] | None:
        """The holder and its layout on the training's features, where these grew from its own: the same outputs."""
        from mmoe_rec.model.mmoe import build_model
        from mmoe_rec.model.tables import plain_tables
        from mmoe_rec.settings.model import Model
        from mmoe_rec.training.warm_start import WarmStart

        structure = Model.model_validate(ranker.about.model)
        rows = {table.name: table.rows for table in self.layout.tables}
        tables = tuple(replace(table, rows=rows.get(table.name, table.rows)) for table in ranker.layout.tables)
        layout = replace(ranker.layout, tables=tables)
        try:
            start = WarmStart(folder, structure, self.prepared, layout, structure)
        except UserError:
            return None
        model = build_model(layout, structure, plain_tables(layout))
        start.fill(model)
        return model, layout

    def _encode(self, ranker: Ranker, folder: Path, encoded: Path) -> None:
        windows = {"validation": self.settings.split.windows()["validation"]}
        encode_with(folder / "features", logs_for(self.settings, ranker.pipeline), windows, encoded)
