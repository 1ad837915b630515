"""What each feature of a model is worth, what it costs in serving, and what may be left out.

<data.work>/ablation/ablation.json, ablation.parquet    all numbers, and the verdicts in words
<data.work>/ablation/report.html                        shows them
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Sequence
from copy import copy, deepcopy
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.compute as pc

from mmoe_rec.auc import FEWEST
from mmoe_rec.devices import pick_device
from mmoe_rec.errors import UserError
from mmoe_rec.evaluation.comparison import RESAMPLES_OF_SLICES
from mmoe_rec.evaluation.summary import OBJECTIVE, Objective, UserMetrics, find_objective
from mmoe_rec.evaluation.sums import EvaluationSums, count_rarer_label
from mmoe_rec.inference.artifact import Source
from mmoe_rec.jobs.evaluate import rows_to_measure, score_by
from mmoe_rec.jobs.places import check_out
from mmoe_rec.jobs.run_page import as_code, command, quoted
from mmoe_rec.locks import writing
from mmoe_rec.progress import bar, say
from mmoe_rec.settings.schema import Schema
from mmoe_rec.settings.sections import Settings
from mmoe_rec.tracking import runs
from mmoe_rec.tracking.registry import find_model

if TYPE_CHECKING:
    from mmoe_rec.evaluation.ablation import HeldRows, Part, Worth
    from mmoe_rec.inference.ranker import Ranker
    from mmoe_rec.report.ablation import AblationReport

EXCHANGED_ROWS = 200_000
"""Of each feature, by which the number of permutations goes where none is given."""
MOST_REPEATS = 10
PLACE = "ablation"


@dataclass(frozen=True)
class Ablation:
    """How a model is ablated.

    features: those that are wanted, without groups; none for all; split: whose rows; rows: at most about so many are
    measured, of whole users; repeats: permutations of each feature, None by the number of rows; margin: loss of what
    decides that is none; candidates: of the request by which serving is timed; seeds: trainings without each group, or
    each feature that is wanted, 0 for none; at_once: how many run at a time.
    """

    features: tuple[str, ...] = ()
    split: str = "validation"
    rows: int = 100_000
    repeats: int | None = None
    margin: float = 0.001
    candidates: int = 500
    seeds: int = 0
    at_once: int = 1


def ablate_model(settings: Settings, address: str, out: Path, options: Ablation) -> AblationReport:
    """Measures what a model loses without features, and writes it to a folder and to the run that trained the model.

    Raises UserError for a feature that the model does not have, or rows that can't tell.
    """
    from mmoe_rec.inference.ranker import Ranker
    from mmoe_rec.report.ablation import FILE, NUMBERS, PAGE, write

    find_objective(settings.evaluation.decide_by)
    check_out(out, settings)
    model = find_model(address, settings.tracking.address)
    ranker = Ranker.load(model.folder)
    _check_features(options, ranker.pipeline.schema)
    if options.seeds and ranker.pipeline.schema.features != settings.schema_.features:
        raise UserError(
            f"--retrain trains by these settings, whose features are not those of '{address}': give the settings that "
            "it was trained with, or leave --retrain out"
        )
    report = _exchange_features(settings, model, ranker, options)
    if options.seeds:
        joint = () if report.leave_out is None else (report.leave_out.part,)
        report = replace(report, retrained=_train_without(settings, options, joint), seeds=options.seeds)
    with writing(out, "an ablation", "give another folder with --out", queue=True):
        write(report, out)
        name = f"ablate {address}"
        try:
            with runs.open_run(
                settings.tracking.address, settings.experiment, run_name=name, run_id=model.run_id
            ) as run:
                for file in (FILE, NUMBERS, PAGE):
                    run.log_artifact(out / file, PLACE)
                run.describe("Ablation", f"{quoted(report.sentences)}\n\n{as_code(command())}")
        except UserError as error:
            say(f"{error}: the ablation is in '{out}', but not all of it in MLflow")
    return report


def _exchange_features(settings: Settings, model: Source, ranker: Ranker, options: Ablation) -> AblationReport:
    from mmoe_rec.evaluation.ablation import (
        choose_to_leave_out,
        correct_worths,
        find_parts,
        find_readers,
        find_worth,
    )
    from mmoe_rec.inference.costs import measure_costs
    from mmoe_rec.report.ablation import AblationReport

    schema, rules = ranker.pipeline.schema, settings.evaluation
    parts, readers = find_parts(schema, options.features), find_readers(ranker.layout)
    with rows_to_measure(settings, model.folder, ranker, options.split) as folder:
        held, all_rows = _hold_rows(settings, ranker, folder, options.rows)
    candidates = min(options.candidates, ranker.about.max_candidates)
    ids = pc.unique(held.beside["candidate"]).to_pylist() if schema.columns.has_candidate else ()
    costs = measure_costs(ranker, model.folder, {each.name: each.features for each in parts}, candidates, ids)
    scorer, device = copy(ranker), pick_device(settings.training.device)
    if device.type != "cpu":  # while serving is timed without a GPU
        scorer.model = deepcopy(ranker.model).to(device)
    started = time.perf_counter()
    base = _score(settings, scorer, held)
    seconds = time.perf_counter() - started
    objective, judged = _choose_objective(settings, base)
    repeats = options.repeats or int(np.clip(-(-EXCHANGED_ROWS // held.rows), 2, MOST_REPEATS))
    say(
        f"{len(parts)} features and groups are exchanged {repeats} times each among {held.rows:,} {options.split} "
        f"rows: about {max(1, round(seconds * repeats * (len(parts) + 2) / 60)):,} minutes"
    )
    resamples = min(rules.resamples, RESAMPLES_OF_SLICES)

    def exchange(part: Part) -> Worth:
        without = []
        for repeat in range(repeats):
            donors = held.draw_donors(np.random.default_rng([zlib.crc32(part.name.encode()), repeat]))
            without.append(_score(settings, scorer, held.with_donors(schema, part.features, donors)))
        return find_worth(part, [base], without, objective, judged, resamples)

    worths = []
    with bar() as progress:
        task = progress.add_task("exchanging features", total=len(parts))
        for part in parts:
            worths.append(exchange(part))
            progress.advance(task)
    worths, of_tasks = correct_worths(worths), max(options.margin, rules.margin)
    joint = choose_to_leave_out(worths, lambda each: each.is_harmless(options.margin, of_tasks), exchange, readers)
    if joint is not None:
        together = {joint.part.name: joint.part.features}
        costs |= measure_costs(ranker, model.folder, together, candidates, ids)
    users = pc.count_distinct(held.beside["user"]).as_py()
    units = "users" if settings.columns.has_user else "rows" if settings.columns.request is None else "requests"
    facts = {
        "model": model.address,
        "artifact": ranker.version,
        "log": settings.data.log,
        "rows": f"{held.rows:,} of {all_rows:,} {options.split} rows, of {users:,} {units}",
        "permutations": f"{repeats} of each feature and group",
        f"resamples of {units}": f"{resamples:,}",
        "a request has": f"{candidates:,} candidates",
        "command": command(),
    }
    return AblationReport(
        title=f"Ablation of {settings.name}",
        objective=objective,
        value=UserMetrics(base, objective, ()).once[OBJECTIVE],
        margin=options.margin,
        worths=worths,
        leave_out=joint,
        costs=costs,
        readers=readers,
        placement=[name for name in schema.features if schema.role_of(name) == "placement"],
        units=units,
        fingerprint=ranker.about.fingerprint,
        facts=facts,
    )


def _train_without(settings: Settings, options: Ablation, joint: Sequence[Part]) -> list[Worth]:
    """What is lost by models that are trained without groups, or the features that are wanted, and without those of
    `joint`."""
    from mmoe_rec.evaluation.ablation import Part, correct_worths, find_sources, find_worth
    from mmoe_rec.jobs.variants import Variant, open_variants

    schema, rules = settings.schema_, settings.evaluation
    alone = [Part(name, (name,)) for name in options.features]
    by_features = {frozenset(each.features): each for each in (*joint, *(alone or find_sources(schema)))}
    parts = [each for each in by_features.values() if schema.can_rank_without(each.features)]
    seeds = range(settings.training.seed, settings.training.seed + options.seeds)
    with open_variants(settings, PLACE, options.split, options.at_once) as trainings:
        say(f"{len(seeds)} trainings with all features, and as many without each of {len(parts)} features or groups")
        variants = [Variant(f"without {each.name}", settings, each.features) for each in parts]
        whole, *found = trainings.train([Variant("all features", settings), *variants], seeds).values()
    before = whole.measure()
    objective, judged = _choose_objective(settings, before[0])
    worths = [
        find_worth(part, before, each.measure(), objective, judged, rules.resamples)
        for part, each in zip(parts, found, strict=True)
    ]
    return correct_worths(worths)


def _check_features(options: Ablation, schema: Schema) -> None:
    features = options.features
    for name in features:
        if name not in schema.features:
            near = get_close_matches(name, schema.features, 1)
            hint = f"; did you mean '{near[0]}'?" if near else f"; it has {', '.join(schema.features)}"
            raise UserError(f"--features names '{name}', which the model does not have{hint}")
        if schema.role_of(name) == "placement":
            raise UserError(
                f"--features names '{name}', which describes placement: a model ranks without it, so exchanging it "
                "among rows changes nothing; --retrain without --features tells what placement is worth"
            )
    if twice := next((name for name in features if features.count(name) > 1), None):
        raise UserError(f"--features names '{twice}' twice")


def _hold_rows(settings: Settings, ranker: Ranker, folder: Path, most: int) -> tuple[HeldRows, int]:
    from mmoe_rec.batches.encoded_rows import EncodedRows
    from mmoe_rec.evaluation.ablation import hold_rows
    from mmoe_rec.evaluation.scoring import COLUMNS

    layout, weighted = ranker.layout, settings.training.sampling_correction == "weights"
    rows = EncodedRows(folder, layout)
    no_inputs = EncodedRows(folder, replace(layout, tables=(), ids=(), dense=(), attention=()))
    columns = [*COLUMNS, *(f"label.{name}" for name in layout.outcomes)]
    return hold_rows(rows, no_inputs, most, columns, weighted), rows.rows


def _score(settings: Settings, ranker: Ranker, rows: HeldRows) -> EvaluationSums:
    return score_by(settings, ranker.model, ranker.layout, rows, ranker.calibration, shown=False).measure()


def _choose_objective(settings: Settings, base: EvaluationSums) -> tuple[Objective, list[str]]:
    """What decides, and the tasks that are judged. Raises UserError where there are too few labels."""
    tasks = list(settings.tasks)
    objective = Objective.of(settings.evaluation.decide_by, base, tasks)
    if objective is None:
        counts = ", ".join(f"{task} {count_rarer_label(base, task):,}" for task in tasks)
        raise UserError(
            f"what features are worth can't be told: no task has {FEWEST} rows of its rarer label ({counts}); give "
            "more rows with --rows, or another --split"
        )
    return objective, [task for task in tasks if count_rarer_label(base, task) >= FEWEST]
