"""`tune --preset`: better settings than a file's within a time, without a search space; by validation rows alone.

<data.work>/tuning/search.json    what was drawn, so that a search that was killed goes on
<data.work>/tuning/trainings/     what each training predicts for the validation rows
<data.work>/tuning/wide/          rows with further inputs, and what trainings on them predict
<data.work>/tuning/sample/        rows of some users, where too few trainings on all fit into the time
<data.work>/tuning/best.yaml      the file with what was found, its comments kept
<data.work>/tuning/tuning.json    what each alternative gave, and report.html, which shows it
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from mmoe_rec.atomic import atomic_folder, digest, write_text
from mmoe_rec.devices import usable_cores
from mmoe_rec.errors import UserError, first_line
from mmoe_rec.evaluation.intervals import Resampled, resample
from mmoe_rec.evaluation.summary import OBJECTIVE, Objective, UserMetrics, find_objective
from mmoe_rec.evaluation.sums import EvaluationSums
from mmoe_rec.jobs.alternatives import (
    MINUTES,
    Preset,
    apply_alternatives,
    keys_of,
    leave_out,
    list_alternatives,
    widen,
)
from mmoe_rec.jobs.places import log_and_place
from mmoe_rec.jobs.run_page import as_code, command
from mmoe_rec.jobs.screening import LEAST, Notes, Recipe, Result, Screening, Trained
from mmoe_rec.jobs.variants import Variant, VariantTrainings, open_variants
from mmoe_rec.log.columns import hash_column
from mmoe_rec.preprocessing.prepare import FeatureFolder, prepare
from mmoe_rec.progress import say
from mmoe_rec.report.tuning import TriedAlternative, TuningReport, page
from mmoe_rec.settings.editing import edit_settings
from mmoe_rec.settings.sections import Settings

NAME, FILE, PAGE, BEST = "tuning", "tuning.json", "report.html", "best.yaml"
RESAMPLES = 200  # of users: standard errors are good to 5%
TIMED_ROWS = 200_000
"""Training rows, of more of which the first trainings see a part, to tell how long one of all takes."""
WISHED, FEWEST_ROWS = 2 * LEAST, 20_000
"""Trainings that should fit into the time, else a sample of users is trained on; and rows that it has at least."""
BUILT_ROWS = 100_000
"""Of all logs, for each minute of the time, up to which features are built once more."""
WIDE_PLACE = 7
"""Among the alternatives, of those that take further inputs."""
NOT_TRIED = ("other `min_count`, counters and histories than the file's, which take features of their own",)


def tune_preset(
    settings: Settings,
    file: str,
    overrides: dict[str, Any],
    preset: Preset,
    minutes: float | None = None,
    at_once: int | None = None,
) -> TuningReport:
    """Searches, and writes the files. A search that was stopped or killed goes on, within what is left of its time.

    file, overrides: where the settings come from, and what overrides it, such as `training.epochs` -> 2; minutes: None
    for those of the preset; at_once: trainings at a time, None for one on each core or GPU. Raises UserError where no
    metric can decide on the validation rows, or no training by the file ends.
    """
    find_objective(settings.evaluation.decide_by)
    budget = MINUTES[preset] if minutes is None else minutes
    number = at_once or count_places(settings)
    work = Path(settings.data.work) / NAME
    say(f"{budget:g} minutes, {number} training{'s' * (number > 1)} at a time; the same command goes on after a stop")
    with open_variants(settings, NAME, "validation", number) as trainings:
        search = Search(settings, trainings, preset, budget, work)
        result = search.run()
        if not result.trainings:
            reason = next(iter(search.trainings.failed.values()), "none ended in time; give more with --minutes")
            raise UserError(f"no training by '{file}' ended, so nothing can be compared with it: {reason}")
        report = _report(settings, file, preset, search, result)
        _write(report, settings, file, overrides, result, work)
        search.remove_rows()
        run = trainings.run
        assert run is not None, "it is open"
        for name in (BEST, FILE, PAGE):
            if (work / name).exists():
                run.log_artifact(work / name)
        run.describe("Search", "\n\n".join([as_code(command()), *report.sentences]))
        run.flush()
    return report


def count_places(settings: Settings) -> int:
    """How many trainings run at a time: one on each GPU, or one on each core, eight at most."""
    from mmoe_rec.devices import pick_device

    if pick_device(settings.training.device).type == "cuda":
        import torch

        return torch.cuda.device_count()
    return min(8, usable_cores())


class Search:
    """A search on the features of some settings. folder: of what it keeps; trainings: of all rows.

    sample: share of the users whose rows are trained on; objective: what decides, once a training has ended.
    """

    sample = 1.0
    objective: Objective | None = None

    def __init__(
        self, settings: Settings, trainings: VariantTrainings, preset: Preset, minutes: float, folder: Path
    ) -> None:
        self.settings, self.trainings, self.minutes, self.folder = settings, trainings, minutes, folder
        self.rows = int(trainings.prepared.manifest["splits"]["train"]["rows"])
        layout = trainings.prepared.layout
        self._inputs = {each.name for each in (*layout.ids, *layout.dense)}
        self.alternatives = list_alternatives(settings, self.rows, preset, self._inputs)
        # What takes a build of its own is tried where one, from the whole log, takes a small part of the time.
        manifest = trainings.prepared.manifest
        rows = manifest["rows"] + sum(each["rows"] for each in manifest["events"].values())
        has_time = not trainings.prepared.is_extended and rows <= BUILT_ROWS * minutes
        self.wider = widen(settings) if has_time else []
        self._effective, self._pace = math.inf, 0.0
        self._began = time.monotonic()
        self._notes = self._open_notes(preset)

    def _open_notes(self, preset: Preset) -> Notes:
        """The notes of a search of the same settings, features and alternatives that was begun before, or new ones."""
        tree = self.settings.model_dump(mode="json", include={"model", "training", "features", "evaluation"})
        names = [each.name for each in (*self.alternatives, *self.wider)]
        key = digest(tree, names, preset, self.minutes, self.trainings.prepared.manifest["fingerprint"])
        path = self.folder / "search.json"
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            values = values if values["key"] == key else {"key": key}
            if "spent" in values:  # and what was trained since, until a kill
                ended = [file.stat().st_mtime for file in self.folder.rglob("trainings/*/*.*")]
                values["spent"] += max(0.0, max(ended, default=0.0) - path.stat().st_mtime)
        except (OSError, ValueError, LookupError, TypeError):
            values = {"key": key}
        return Notes(values, lambda kept: write_text(path, json.dumps(kept, indent=1)))

    def run(self) -> Result:
        """Tries until the time is over, or what is left of it."""
        self._began -= self._notes.values.get("spent", 0.0)
        try:
            self._take_sample()
            self._add_inputs()
            result = Screening(
                self.settings,
                self.alternatives,
                self._train,
                self._read,
                self._clock,
                self.trainings.at_once,
                self._notes,
                lambda: self._effective,
            ).run(self.minutes)
        finally:
            self._notes.values["spent"] = self._clock()
            self._notes.save(self._notes.values)
        return result

    def _clock(self) -> float:
        return time.monotonic() - self._began

    def _train(self, recipes: Sequence[Recipe], until: float) -> None:
        pairs = [(self._variant(each), each.seed) for each in recipes]
        costs = [math.prod(self.alternatives[number].cost for number in each.made) for each in recipes]
        self.trainings.train_until(pairs, until - self._clock(), costs, self._pace)
        self._notes.values["spent"] = self._clock()
        self._notes.save(self._notes.values)

    def _variant(self, recipe: Recipe) -> Variant:
        made = [self.alternatives[number] for number in recipe.made]
        changed, without = apply_alternatives(self.settings, made)
        added = {each for one in made for each in one.adds}
        unseen = [each for one in self.alternatives for each in one.adds if each not in added]
        return Variant("; ".join(each.name for each in made) or "the file", changed, (*without, *unseen))

    def _read(self, recipe: Recipe) -> Trained | None:
        found = self.trainings.read(self._variant(recipe), recipe.seed)
        if found is None:
            return None
        self._pace = max(self._pace, found.seconds[0]) if not recipe.made else self._pace
        return Trained(self._measure(found.measure()[0], recipe.is_of_last(self.settings)), found.seconds[0])

    def _measure(self, sums: EvaluationSums, is_last: bool) -> Resampled:
        """What decides, higher is better, when users are redrawn: of half of them in the last comparison, else of the
        others."""
        if self.objective is None:
            self.objective = Objective.of(self.settings.evaluation.decide_by, sums, list(self.settings.tasks))
            if self.objective is None:
                raise UserError(
                    f"evaluation.decide_by is '{self.settings.evaluation.decide_by}', which can't be measured on the "
                    "validation rows, as no task has 50 of either label: move split.validation_end"
                )
        objective = self.objective
        measured = UserMetrics(sums, objective, ())
        sign = 1.0 if objective.better == "higher" else -1.0
        self._effective = measured.effective[OBJECTIVE] / 2
        taken = take_half(measured.units, is_last)[:, None]

        def decide(counts: np.ndarray) -> dict[Any, np.ndarray]:
            return {OBJECTIVE: sign * measured.at(counts * taken)[OBJECTIVE]}

        found = resample(decide, measured.units, RESAMPLES)[OBJECTIVE]
        if not np.isfinite(found.value):
            raise UserError(
                f"{objective.name} can't be measured on half of the validation users: one half chooses, the other one "
                "tells what that is worth; move split.validation_end"
            )
        return found

    def _add_inputs(self) -> None:
        """Builds features with further inputs, which alternatives ask for; all of them in one build."""
        if not self.wider or self.sample < 1:
            return
        folder, whole = self.folder / "wide", self.trainings
        data = self.settings.data.model_copy(update={"work": str(folder)})
        try:
            wide, _ = apply_alternatives(self.settings, self.wider)
            prepared = prepare(*log_and_place(wide.model_copy(update={"data": data})))
        except (ValueError, UserError) as error:  # as where files of the log are gone
            say(f"further windows and exact values are not tried: {first_line(error)}")
            return
        if prepared.manifest["splits"] != whole.prepared.manifest["splits"]:
            say("further windows and exact values are not tried, as the log has other rows by now")
            return
        inputs = [each for each in (*prepared.layout.ids, *prepared.layout.dense) if each.name not in self._inputs]
        for each in self.wider:
            features = {name.split(".")[1] for name in each.values}
            if added := tuple(one.name for one in inputs if one.feature in features):
                self.alternatives.insert(WIDE_PLACE, replace(each, adds=added))
        self.trainings = VariantTrainings(self.settings, prepared, folder, whole.split, whole.at_once, whole.run)

    @property
    def metric(self) -> str:
        """What decides, in words; more of it is better."""
        if self.objective is None:
            return "the metric"
        return self.objective.name if self.objective.better == "higher" else f"minus {self.objective.name}"

    def remove_rows(self) -> None:
        """Removes the rows that the search has made for itself."""
        for name in ("wide", "sample"):
            shutil.rmtree(self.folder / name / "features", ignore_errors=True)

    def _take_sample(self) -> None:
        """Where too few trainings on all rows fit into the time, goes on with the rows of a part of the users."""
        if self.rows <= TIMED_ROWS:
            return
        share = self._notes.keep("sample", self._choose_sample)
        if share < 1:
            self.sample = share
            # A batch that suits few rows does not suit all.
            self.alternatives = [each for each in self.alternatives if each.part != "batch"]
            self.trainings = self._on_sample(share)
            say(f"too few trainings on all rows fit: rows of {share:.1%} of the users are trained on")

    def _choose_sample(self) -> float:
        small = TIMED_ROWS / 2 / self.rows
        say(f"how long does a training take? First on the rows of {small:.1%} of the users")
        trainings, begun = self._on_sample(small), time.monotonic()
        number = trainings.at_once
        trainings.train_until([(self._variant(Recipe((), n)), n) for n in range(number)], math.inf, [1.0] * number)
        seconds = (time.monotonic() - begun) / small
        fits = (60 * self.minutes - self._clock()) * number / seconds
        share = min(1.0, fits / WISHED)
        return 1.0 if share > 0.9 else max(share, min(1.0, FEWEST_ROWS / self.rows))

    def _on_sample(self, share: float) -> VariantTrainings:
        whole, folder = self.trainings, self.folder / "sample"
        prepared = sample_users(whole.prepared, share, folder / "features")
        return VariantTrainings(self.settings, prepared, folder, whole.split, whole.at_once, whole.run)


def take_half(units: int, is_last: bool) -> np.ndarray:
    """(units,) bool, the users by whom alternatives are chosen, or those of the last comparison."""
    return np.random.default_rng(0).permutation(units) % 2 == is_last


def sample_users(prepared: FeatureFolder, share: float, folder: Path) -> FeatureFolder:
    """Features with the training and validation rows of a share of the users, drawn by a hash; those that are there
    already are taken."""
    name = f"{prepared.manifest['fingerprint']}-{share:.6f}"
    sampled = FeatureFolder(folder)
    if (folder / "manifest.json").is_file() and sampled.manifest["fingerprint"] == name:
        return sampled
    limit, manifest = np.uint64(int(share * 2**32)), prepared.manifest
    with atomic_folder(folder) as made:
        shutil.copytree(prepared.folder / "encoded", made / "encoded", ignore=shutil.ignore_patterns("*.parquet"))
        for split in ("train", "validation"):
            rows = 0
            for file in sorted(prepared.split(split).glob("*.parquet")):
                rows += _filter_users(file, made / "encoded" / split / file.name, limit)
            if not rows:
                raise UserError(f"{share:.2%} of the users have no {split} rows: give more time with --minutes")
            manifest["splits"][split]["rows"] = rows
        write_text(made / "manifest.json", json.dumps({**manifest, "fingerprint": name}))
    return sampled


def _filter_users(file: Path, out: Path, limit: np.uint64) -> int:
    """Copies the rows of users whose hash is below a limit; how many they are."""
    rows, source = 0, pq.ParquetFile(file)
    with source, pq.ParquetWriter(out, source.schema_arrow, compression="zstd") as writer:
        for group in range(source.num_row_groups):
            table = source.read_row_group(group)
            hashes = hash_column(table.column("user").combine_chunks()).astype(np.uint64)
            table = table.filter((hashes >> np.uint64(32)) < limit)
            rows += len(table)
            if len(table):
                writer.write_table(table)
    return rows


def _report(settings: Settings, file: str, preset: Preset, search: Search, result: Result) -> TuningReport:
    taken, dropped = set(result.taken), set(result.dropped)
    tried = [
        TriedAlternative(result.alternatives[n].name, each, result.counts[n], n in dropped, n in taken)
        for n, each in enumerate(result.effects)
    ]
    manifest = search.trainings.prepared.manifest["splits"]
    return TuningReport(
        title=f"Search for better settings of {settings.name}",
        file=file,
        best=str(search.folder / BEST),
        metric=search.metric,
        minutes=(search.minutes, result.spent / 60),
        trainings=result.trainings,
        failed=search.trainings.failed,
        tried=sorted(tried, key=lambda each: each.effect.value or -math.inf, reverse=True),
        joined=[result.alternatives[number].name for number in result.best],
        compared=result.compared,
        sides=result.sides,
        taken=[result.alternatives[number].name for number in result.taken],
        seconds=result.seconds,
        sample=search.sample,
        not_tried=NOT_TRIED,
        facts={
            "log": settings.data.log,
            "rows": f"{manifest['train']['rows']:,} trained on, {manifest['validation']['rows']:,} validation rows",
            "preset": f"{preset}, {search.trainings.at_once} trainings at a time",
            "ended": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
            "command": command(),
        },
    )


def _write(
    report: TuningReport, settings: Settings, file: str, overrides: dict[str, Any], result: Result, folder: Path
) -> None:
    """Writes the files, the page last."""
    made = [result.alternatives[number] for number in result.taken]
    changed, without = apply_alternatives(settings, made)
    values = {**overrides, **{name: value for each in made for name, value in each.values.items()}}
    values = {n: value for n, value in values.items() if not n.startswith(tuple(f"features.{w}." for w in without))}
    text = Path(file).read_text(encoding="utf-8")
    write_text(folder / BEST, edit_settings(text, values, keys_of(changed, without), leave_out(changed, without)))
    (folder / PAGE).unlink(missing_ok=True)
    tree = {**report.to_tree(), "fingerprint": FeatureFolder(folder.parent / "features").manifest["fingerprint"]}
    write_text(folder / FILE, json.dumps(tree, indent=1, default=asdict))
    write_text(folder / PAGE, page(report))
