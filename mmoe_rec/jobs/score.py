"""Predictions, scores and ranks of a log's rows, as Parquet."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmoe_rec.atomic import atomic_file
from mmoe_rec.errors import StoppedError, UserError
from mmoe_rec.features.memories import exact_from
from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.inference.artifact import read_artifact, version_of
from mmoe_rec.inference.ranking import Freshness
from mmoe_rec.jobs.score_files import (
    AsOf,
    Output,
    check_names,
    fingerprint_of,
    finished_name,
    open_logs,
)
from mmoe_rec.locks import writing
from mmoe_rec.log.checks import BadFile, format_time
from mmoe_rec.log.database import open_database
from mmoe_rec.log.files import is_remote
from mmoe_rec.log.given import iso_time
from mmoe_rec.log.reader import LogPart
from mmoe_rec.point_in_time.join import Window
from mmoe_rec.preprocessing.engines import Engine, open_engine
from mmoe_rec.preprocessing.steps import ROWS_FOR_PROCESSES, Steps, kept_reader, kept_results
from mmoe_rec.progress import bar, say
from mmoe_rec.settings.load import load_settings, parse_overrides
from mmoe_rec.settings.sections import Settings, Tracking
from mmoe_rec.tracking.registry import FoundModel, find_model

if TYPE_CHECKING:
    from mmoe_rec.jobs.score_parts import PartScored, ScoreJob


ALL: Window = (None, None)
_HERE = ("--data.engine", "local", "--data.workers", "null")  # not those of the machines that trained the model


@dataclass(frozen=True)
class ScoredLog:
    """Scores in a folder: what its manifest says of them, and whether they were there before."""

    folder: Path
    manifest: dict[str, Any]
    before: bool = False


def score_log(
    model: str | Path,
    source: str | Path,
    output: str | Path,
    as_of: AsOf = "log",
    window: Window = ALL,
    overrides: Sequence[str] = (),
    labels: bool = False,
) -> ScoredLog:
    """Scores each row of a log with the model at an address; writes keys, predictions, score and rank to a folder.

    A run that was cut short goes on where the same one is started again, with any engine and number of workers.

    Args:
        model: an address as `find_model` takes it.
        source: a folder of Parquet files, one file or a glob.
        output: a folder, new or empty, or with scores that are replaced once the new ones are whole.
        as_of: `log` gives each row what the log, and the logs of events, knew before its request; `tables` what the
            model itself remembers.
        window: request times to score, microseconds; other rows of the log are only its past.
        overrides: of the settings that the model was trained with, such as `--data.workers 2`.
        labels: whether to write the labels as well, as they are known at the log's last request.

    Raises:
        UserError: bad input, model or settings, or a folder that holds something else.
        StoppedError: Ctrl-C; what was scored is kept.
    """
    model, source = str(model), str(source)
    given = list(parse_overrides(overrides))
    for key, _ in given:
        if key[0] != "data" and key not in (["serving", "products"], ["tracking", "uri"]):
            raise UserError(
                f"--{'.'.join(key)} changes nothing here: scoring takes settings of section data, serving.products and "
                "tracking.uri; all others are those that the model was trained with"
            )
    uri = next((value for key, value in reversed(given) if key == ["tracking", "uri"]), None)
    start, end = window
    if start is not None and end is not None and start >= end:
        raise UserError(f"--start {format_time(start)} is not before --end {format_time(end)}: no request lies between")
    if labels and as_of != "log":
        raise UserError(f"--labels writes what the log says of its rows; leave it out with --as-of {as_of}")
    artifact = find_model(model, Tracking(uri=uri).address)  # before the model's own settings are known
    read_artifact(artifact.folder)  # which says what is wrong with a damaged one
    settings = load_settings(artifact.folder / "settings.yaml", [*_HERE, *overrides])
    if is_remote(str(output)):
        raise UserError(f"--output '{output}' must be a folder of this machine, or one mounted like one")
    out = Output(Path(output))
    out.check(source)
    with writing(out.folder, "a scoring", "give another folder with --output"):
        out.check(source)
        return _Scoring(artifact, settings, source, out, as_of, window, labels).run()


class _Scoring:
    """One run of the command."""

    def __init__(
        self, model: FoundModel, settings: Settings, source: str, out: Output, as_of: AsOf, window: Window, labels: bool
    ) -> None:
        self.settings, self.labels = settings, labels
        self.found, self.source, self.out, self.as_of, self.window = model, source, out, as_of, window
        self.version = version_of(model.folder)
        self.pipeline = FeaturePipeline.load(model.folder / "features", memories=False)
        self.has_time = self.pipeline.schema.columns.has_time
        if window != ALL and not self.has_time:
            raise UserError(
                "--start and --end need times, and the model was trained on a table without times: leave them out"
            )
        self.logs, self.lacking, self.learnt = open_logs(source, self.pipeline, settings, as_of, labels)
        check_names(self.pipeline)
        about = read_artifact(model.folder, verify=False)
        self.tables_as_of, self.freshness = about.tables_as_of, Freshness.of(about)
        self.exact_from = exact_from(model.folder / "features")
        self.constants = {"model": model.address, "model_version": self.version}
        tables = self.tables_as_of, self.exact_from
        more = ["labels", settings.split.model_dump(mode="json")] if labels else []
        self.fingerprint = fingerprint_of(self.logs, self.constants, tables, as_of, window, *more)

    def run(self) -> ScoredLog:
        """Scores, or goes on."""
        before = self.out.manifest
        if before is not None and before["fingerprint"] == self.fingerprint and self.out.is_whole(before):
            return ScoredLog(self.out.folder, before, before=True)
        if before is not None:
            say(f"the {before['rows']:,} scores in '{self.out.folder}' will be replaced once new ones are whole")
        self.out.begin(self.fingerprint)
        try:
            manifest = self._write_scores()
        except UserError as error:
            # Another try with the same input and nothing done would begin at the same place.
            if isinstance(error, BadFile) or not any((self.out.work / "scored").iterdir()):
                self.out.forget()
            raise
        except KeyboardInterrupt:
            raise StoppedError(f"what was scored for '{self.out.folder}' is kept; the same command goes on") from None
        self.out.end(manifest)
        return ScoredLog(self.out.folder, manifest)

    def _write_scores(self) -> dict[str, Any]:
        """Writes the files of the output; gives its manifest."""
        from mmoe_rec.devices import limit_threads
        from mmoe_rec.jobs.score_parts import forget_ranker

        parts, facts = self._known_rows()
        options, in_memory = self.logs.options, self.source.startswith("memory://")
        processes = self.logs.log.rows >= ROWS_FOR_PROCESSES and not in_memory
        # What a product gives may depend on the number of threads that share it.
        with limit_threads(1), open_engine(options.engine, options.workers, processes) as engine:
            try:
                each = self._score_parts(engine, parts, facts)
            finally:
                forget_ranker()
            for log in self.logs.all:
                log.check_unchanged()
            self._rank(engine, [number for number, part in enumerate(each) if part.rows])
        return self._manifest(each, facts)

    def _known_rows(self) -> tuple[list[LogPart], dict[str, Any]]:
        """The parts of the log, and what was found out before they are scored, which is kept for a run that goes on."""
        folder, scratch = self.out.known, self.out.work / "scratch"
        steps = Steps(self.logs, {"scored": self.window}, scratch)
        parts, ready = steps.parts, folder / "ready.json"
        if ready.is_file():
            facts: dict[str, Any] = json.loads(ready.read_text(encoding="utf-8"))
            return parts, facts
        for left in (folder, scratch):
            shutil.rmtree(left, ignore_errors=True)
        folder.mkdir()
        with steps:
            facts = self._find_out(steps, scratch / "compacted")
            steps.keep(folder)
        # Kept, so that a run that goes on computes as it began.
        facts["products"] = self._products()
        with atomic_file(ready) as path:
            path.write_text(json.dumps(facts), encoding="utf-8")
        return parts, facts

    def _products(self) -> str:
        """What multiplies; for the setting `auto` it is measured."""
        from mmoe_rec.devices import limit_threads
        from mmoe_rec.jobs.score_parts import ranker_of

        if self.settings.serving.products != "auto":
            return self.settings.serving.products
        with limit_threads(1):
            return ranker_of(self.found.folder, self.version).best_products()

    def _find_out(self, steps: Steps, memories: Path) -> dict[str, Any]:
        if self.as_of == "tables":
            steps.find_requests()
            return {"first": None}
        counted = steps.count(statistics=False)
        if not counted.rows["scored"]:
            raise self._no_rows()
        memories.mkdir(parents=True)
        steps.look_up(self.pipeline, memories, end=counted.last[0] + 1, training=None)
        return {"first": counted.first[0], "last": counted.last[0]}

    def _no_rows(self) -> UserError:
        start, end = ("any time" if each is None else format_time(each) for each in self.window)
        return UserError(f"no row of '{self.source}' was requested from {start} to {end}; change --start and --end")

    def _job(self, parts: Sequence[LogPart], facts: dict[str, Any]) -> ScoreJob:
        from mmoe_rec.jobs.score_parts import ScoreJob

        return ScoreJob(
            model=self.found.folder,
            version=self.version,
            products=facts["products"],
            reader=kept_reader(self.out.known, self.logs.log),
            results=kept_results(self.out.known, parts) if self.as_of == "log" else None,
            window=self.window,
            known_until=self.freshness.known,
            exact_from=self.exact_from,
            labels_known_by=facts["last"] if self.labels else None,
            learnt=self.learnt,
            out=self.out,
        )

    def _score_parts(self, engine: Engine, parts: Sequence[LogPart], facts: dict[str, Any]) -> list[PartScored]:
        """What is known of each part, all of which are scored then."""
        from mmoe_rec.jobs.score_parts import PartScored, score_part

        before = {n: PartScored.read(self.out, n) for n in range(len(parts))}
        done = {number: scored for number, scored in before.items() if scored is not None}
        left = [(number, part) for number, part in enumerate(parts) if number not in done]
        if done:
            say(f"going on with a run that was cut short: {len(done):,} of {len(parts):,} parts are scored")
        function = partial(score_part, self._job(parts, facts))
        with bar() as progress:
            completed = sum(parts[number].rows for number in done)
            task = progress.add_task("scoring", total=self.logs.log.rows, completed=completed)
            for (number, part), scored in zip(left, engine.map(function, left, lasting=True), strict=True):
                done[number] = scored
                progress.advance(task, part.rows)
        if not any(part.rows for part in done.values()):
            raise self._no_rows()
        return [done[number] for number in range(len(parts))]

    def _rank(self, engine: Engine, numbers: Sequence[int]) -> None:
        """Writes the files of the output, of the parts of these numbers."""
        from mmoe_rec.jobs.score_parts import finish_part, rank_rows

        options, out = self.logs.options, self.out
        with bar() as progress:
            task = progress.add_task("ranking and writing", total=len(numbers))
            shutil.rmtree(out.work / "database", ignore_errors=True)  # of a killed run
            with open_database(out.work / "database", options.memory_gib, options.workers) as database:
                rank_rows(database, {out.part(each, "ranked.parquet"): out.part(each, "npy") for each in numbers})
            for _ in engine.map(partial(finish_part, out, self.constants), numbers):
                progress.advance(task)

    def _manifest(self, each: Sequence[PartScored], facts: dict[str, Any]) -> dict[str, Any]:
        from mmoe_rec.jobs.score_parts import PartScored

        whole = PartScored()
        for part in each:
            whole.merge(part)
        return {
            "fingerprint": self.fingerprint,
            **self.constants,
            "tables_as_of": self.tables_as_of,
            "exact_from": None if self.exact_from is None else iso_time(self.exact_from),
            "as_of": self.as_of,
            "known_from": format_time(facts["first"]) if self.has_time and facts["first"] is not None else None,
            "labels_known_by": format_time(facts["last"]) if self.has_time and self.labels else None,
            "meaning": self._describe_past(facts["first"], whole),
            "learnt": None if self.learnt is None else self.learnt.describe(whole.learnt, whole.rows),
            "input": self.source,
            "files": [file.address for file in self.logs.log.files],
            "events": {log.name: [file.address for file in log.files] for log in self.logs.events},
            "rows": whole.rows,
            "first_request": format_time(whole.first) if self.has_time else None,
            "last_request": format_time(whole.last) if self.has_time else None,
            "rows_before_tables_as_of": whole.early if self.has_time else 0,
            "rows_before_exact_from": whole.inexact,
            "parts": {finished_name(number): part.rows for number, part in enumerate(each) if part.rows},
        }

    def _describe_past(self, first: int | None, whole: PartScored) -> str:
        """What the features of all scored rows knew. first: time of the log's first request, microseconds."""
        if self.tables_as_of is None:
            return "the model was trained on a plain table: its features know nothing but the row itself"
        if self.as_of == "log":
            assert first is not None
            events = "".join(f" and in events '{log.name}'" for log in self.logs.events)
            return (
                "counters and histories know what was known before each request in the log that was given (its first "
                f"request: {format_time(first)}){events}, and nothing of the past besides"
            )
        sentence = f"counters and histories know what the model knew at {self.tables_as_of}"
        if exact := whole.early - whole.inexact:
            sentence += (
                f", and of it only what was known before each request for {exact:,} of {whole.rows:,} rows, which were "
                "requested earlier"
            )
        if whole.inexact:
            assert self.exact_from is not None
            sentence += (
                f"; {whole.inexact:,} of {whole.rows:,} rows were requested before {iso_time(self.exact_from)}, from "
                "when on they are exact, so their features know their future: to judge a model by them, score with "
                "--as-of log"
            )
        if self.freshness.is_stale(whole.last):
            sentence += (
                f"; the last row was requested at {format_time(whole.last)}, more than {self.freshness.days:g} days "
                "later, when these are stale (setting `serving.stale_after_days`)"
            )
        if self.lacking:
            names = ", ".join(map(repr, self.lacking))
            sentence += (
                f"; the input has no column {names}: of each user and candidate the model's latest value is taken"
            )
        return sentence


def microseconds(time: str) -> int:
    """An ISO time in microseconds since 1970 UTC; one without an offset is in UTC.

    Raises UserError for another text.
    """
    try:
        moment = datetime.fromisoformat(time)
    except ValueError:
        raise UserError(f"'{time}' is no time; write it like 2017-09-04 or 2017-09-04T04:00:00+00:00") from None
    since = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)) - datetime(1970, 1, 1, tzinfo=UTC)
    return since // timedelta(microseconds=1)
