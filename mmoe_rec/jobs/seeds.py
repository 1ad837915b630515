"""Trainings of one setting with several seeds: what it is worth on average, and beside other settings.

    <data.work>/seeds/SEED/         checkpoints and model of each, with the features of `data.work`
    <data.work>/seeds/seeds.json    what was measured of which models, and report.html, which shows it

The trainings are runs within one of MLflow's; none of their models is registered.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict
from functools import partial
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from mmoe_rec.atomic import digest, write_text
from mmoe_rec.devices import usable_cores
from mmoe_rec.errors import (
    EXIT_CODE,
    STOP_SIGNALS,
    STOPPED_EXIT_CODE,
    StoppedError,
    StopRequest,
    UserError,
    exit_with_message,
)
from mmoe_rec.inference.artifact import Source, version_of
from mmoe_rec.jobs.evaluate import check_tasks, measured_on_test_rows
from mmoe_rec.jobs.places import log_and_place, short_names
from mmoe_rec.jobs.run_page import as_code, command
from mmoe_rec.jobs.train import train_model
from mmoe_rec.locks import reading, writing
from mmoe_rec.preprocessing.prepare import features_in_use
from mmoe_rec.progress import bar, say
from mmoe_rec.settings.sections import Settings
from mmoe_rec.tracking import runs

if TYPE_CHECKING:
    from mmoe_rec.evaluation.summary import MeasuredModel
    from mmoe_rec.preprocessing.prepare import FeatureFolder
    from mmoe_rec.report.trainings import TrainingsReport
    from mmoe_rec.training.choices import Choices

FILE, PAGE, CHOICES = "seeds.json", "report.html", "choices.json"
Task = TypeVar("Task")
_SECONDS_BETWEEN_LOOKS = 0.5


def train_seeds(
    settings: Settings, number: int, resume: bool = False, at_once: int = 1, against: Sequence[str] = ()
) -> TrainingsReport:
    """Trains with `training.seed` and those after it, measures all on the test rows, and writes the files.

    resume: trainings that an earlier run has ended stay; at_once: how many run at a time; against: `data.work` of other
    settings, whose trainings these are compared with. Raises UserError where there are no test rows, or none of those.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("--seeds trains in one process: start it without torchrun")
    folder, uri, what = Path(settings.data.work) / "seeds", settings.tracking.address, "trainings with several seeds"
    seeds = list(range(settings.training.seed, settings.training.seed + number))
    others = _find_others(against, settings, folder)
    with (
        features_in_use(*log_and_place(settings), what, ("train", "validation", "test")) as prepared,
        writing(folder, what, "set `data.work` to another folder"),
        ExitStack() as held,
    ):
        theirs = {}
        for (name, models), work in zip(others.items(), against, strict=True):
            held.enter_context(reading(Path(work) / "seeds", what))
            try:  # before hours of training, where it can't be compared with
                theirs[name] = _measure(settings, models)
            except UserError as error:
                raise UserError(f"--against '{work}': {error}") from None
        depends = settings.model_dump(mode="json", include={"model", "training"})
        key = f"seeds-{digest(depends, settings.choices, seeds, prepared.manifest['fingerprint'])}"
        with runs.open_run(uri, settings.experiment, run_name=f"{number} seeds", key=key) as run:
            own = [share_threads(_with_seed(settings, seed, folder, prepared.folder), at_once) for seed in seeds]
            choices = _share_choices(own[0], prepared, folder, resume, against)
            train = partial(train_model, resume=resume, parent=run.run_id, register=False, choices=choices)
            logs = [Path(each.data.work) / "training.log" for each in own]
            run_each(train, own, [f"seed {seed}" for seed in seeds], logs, at_once)
            models = [Path(each.data.work) / "model" for each in own]
            report = _report(settings, own, _measure(settings, models), theirs)
            _write(folder, report, models)
            run.log_artifact(folder / FILE)
            run.log_artifact(folder / PAGE)
            run.log_metrics(
                {
                    f"test/{group}.{metric}.{name}": value
                    for group, its in report.summary.items()
                    for metric, each in its.items()
                    for name, value in asdict(each).items()
                    if name != "values" and value is not None
                }
            )
            run.describe("Trainings", "\n\n".join([as_code(command()), *report.sentences]))
    return report


def _share_choices(
    settings: Settings, prepared: FeatureFolder, folder: Path, resume: bool, against: Sequence[str]
) -> Choices:
    """Return what all runs compute in: as those that they are compared with or continue, else as measured now."""
    from mmoe_rec.training.choices import read_choices, write_choices

    places = [*([folder] if resume else []), *(Path(work) / "seeds" for work in against)]
    found = [each for place in places if (each := read_choices(place / CHOICES)) is not None]
    if len(computed := {each.precision for each in found}) > 1:
        say(f"warning: the other trainings compute in {' and '.join(sorted(computed))}; set training.precision in all")
    choices = found[0] if found else measure_choices(settings, prepared, folder)
    write_choices(folder / CHOICES, choices)
    return choices


def measure_choices(settings: Settings, prepared: FeatureFolder, folder: Path) -> Choices:
    """Measure what a run would compute in, once for all runs of a comparison. folder: where it could write."""
    from mmoe_rec.model.layout import ModelLayout
    from mmoe_rec.training.loop import Trainer
    from mmoe_rec.training.ranks import training_ranks

    layout = ModelLayout.of(prepared.layout, settings)
    import torch

    with training_ranks(settings.training) as (device, _):
        trainer = Trainer(
            prepared, layout, settings.model, settings.training, device, folder / "checkpoints", lambda *_: None
        )
        trainer.checkpoints.close()
        choices = trainer.choices
    del trainer
    torch.cuda.empty_cache()  # A run may need all of the GPU's memory.
    return choices


def _find_others(against: Sequence[str], settings: Settings, mine: Path) -> dict[str, list[Path]]:
    """Name of each other setting -> its models. Raises UserError where some are missing, or predict other tasks."""
    from mmoe_rec.features.pipeline import FeaturePipeline

    others = {}
    for work, name in short_names(against).items():
        folder = Path(work) / "seeds"
        if folder.resolve() == mine.resolve():
            raise UserError(f"--against '{work}' is the folder of these trainings (data.work); give that of others")
        try:
            models: dict[str, str] = json.loads((folder / FILE).read_text(encoding="utf-8"))["models"]
            whole = all(version_of(folder / seed / "model") == version for seed, version in models.items())
        except (OSError, ValueError, KeyError, UserError):
            whole = False
        if not whole:
            raise UserError(
                f"--against '{work}' holds no trainings of several seeds that have all ended: '{folder / FILE}' is "
                "missing or damaged, or the models are not those that it names"
            )
        others[name] = [folder / seed / "model" for seed in models]
        try:
            check_tasks(settings, FeaturePipeline.load(others[name][0] / "features", memories=False).schema)
        except UserError as error:
            raise UserError(f"--against '{work}': {error}") from None
    return others


def _measure(settings: Settings, models: Sequence[Path]) -> list[MeasuredModel]:
    return measured_on_test_rows(settings, [Source(each, str(each)) for each in models])


def _with_seed(settings: Settings, seed: int, folder: Path, features: Path) -> Settings:
    """The settings with a seed and a folder of its own, which has the features of all."""
    own = folder / str(seed)
    own.mkdir(parents=True, exist_ok=True)
    with suppress(FileNotFoundError):
        (own / "features").unlink()
    (own / "features").symlink_to(features.resolve(), target_is_directory=True)
    training = settings.training.model_copy(update={"seed": seed})
    data = settings.data.model_copy(update={"work": str(own)})
    return settings.model_copy(update={"training": training, "data": data})


def share_threads(settings: Settings, at_once: int) -> Settings:
    """The settings of one of several trainings at a time: no more threads together than there are cores."""
    if at_once == 1 or settings.training.threads is not None:
        return settings
    training = settings.training.model_copy(update={"threads": max(1, usable_cores() // at_once)})
    return settings.model_copy(update={"training": training})


def run_each(
    train: Callable[[Task], object], tasks: Sequence[Task], names: Sequence[str], logs: Sequence[Path], at_once: int
) -> None:
    """Runs trainings one after the other in this process, or several at a time, and says which, and how long the rest
    will take. As `run_side_by_side`; names: of the trainings."""
    if at_once == 1:
        begun = time.monotonic()
        for number, (task, name) in enumerate(zip(tasks, names, strict=True)):
            say(f"training {number + 1} of {len(tasks)}: {name}{_time_left(begun, number, len(tasks))}")
            train(task)
        return
    say(f"{len(tasks)} trainings, {at_once} at a time; each prints to a file such as '{logs[0]}'")
    with bar() as progress:
        task_of_bar = progress.add_task(f"trainings, {at_once} at a time", total=len(tasks))
        for number in run_side_by_side(train, tasks, logs, at_once):
            say(f"trained: {names[number]}")
            progress.advance(task_of_bar)


def _time_left(begun: float, done: int, number: int) -> str:
    """What is said of it once a training has ended. begun: on the clock `time.monotonic`."""
    if not done:
        return ""
    seconds = (time.monotonic() - begun) / done * (number - done)
    return f" (some {seconds:.0f} seconds more for all)" if seconds < 90 else f" (some {seconds / 60:.0f} minutes more)"


class LostProcessError(UserError):
    """A process that was killed, or failed without a sentence for the user."""


def run_side_by_side(
    function: Callable[[Task], object],
    tasks: Sequence[Task],
    logs: Sequence[Path],
    at_once: int,
    look: Callable[[], object] = lambda: None,
) -> Iterator[int]:
    """Runs a picklable function on tasks, each in a process and on a card of its own; gives their numbers as they end.

    logs: files to which what each prints is added; at_once: how many run at a time; look: is called meanwhile, twice a
    second. Where one fails, or a signal comes, the others get signals until they have ended: a function that saves what
    it has at the first one, by a `StopRequest`, is not disturbed by others.

    Raises UserError of one that failed, StoppedError where a signal came.
    """
    spawn = multiprocessing.get_context("spawn")  # not forked: torch has threads
    waiting, running = list(range(len(tasks))), dict[int, tuple[int, BaseProcess]]()
    with StopRequest() as stop:
        try:
            while waiting or running:
                for slot in range(at_once):
                    if waiting and slot not in running:
                        number = waiting.pop(0)
                        started = spawn.Process(target=_run, args=(function, tasks[number], slot, logs[number]))
                        started.start()
                        running[slot] = number, started
                wait([process.sentinel for _, process in running.values()], _SECONDS_BETWEEN_LOOKS)
                look()
                if stop.signal is not None:
                    raise StoppedError(f"{stop.signal} came; what there was is saved, go on with --resume")
                for slot, (number, process) in list(running.items()):
                    if process.exitcode is not None:
                        del running[slot]
                        _check_end(process.exitcode, logs[number])
                        yield number
        finally:  # waits until all have saved what they have; where there is nothing to save, signals are ignored
            while alive := [process for _, process in running.values() if process.is_alive()]:
                for process in alive:
                    process.terminate()
                    process.join(_SECONDS_BETWEEN_LOOKS)


def _check_end(code: int, log: Path) -> None:
    """Raises as `run_side_by_side`."""
    if code in (EXIT_CODE, STOPPED_EXIT_CODE):
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        # Libraries may print more while the process ends.
        said = (each for each in reversed(lines) if each.startswith(("error: ", "stopped: ")))
        last = next(said, "").partition(": ")[2]
        raise UserError(f"{last} ('{log}' has what came before)") if code == EXIT_CODE else StoppedError(last)
    if code:
        killed = f"was killed by signal {-code}, as where memory runs out (a lower --at-once takes less)"
        how = killed if code < 0 else "failed"
        raise LostProcessError(
            f"a process {how}; its last words are in '{log}'; the same command goes on (train: with --resume)"
        )


def _run(function: Callable[[Task], object], task: Task, slot: int, log: Path) -> None:
    """Runs a task in a process of its own, which ends as a command does."""
    for each in STOP_SIGNALS:
        # A `StopRequest` notes the first one, and then puts back what was before: a second one, as where both the
        # parent and a cluster send it, would else end the saving.
        signal.signal(each, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["LOCAL_RANK"] = str(slot)  # by which a training picks its card
    with log.open("a", encoding="utf-8") as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(file.fileno(), stream.fileno())
    with exit_with_message():
        function(task)


def _end_with_parent() -> None:
    """Sends signals as the parent would."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    while True:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_SECONDS_BETWEEN_LOOKS)


def _report(
    settings: Settings,
    own: Sequence[Settings],
    mine: Sequence[MeasuredModel],
    others: Mapping[str, Sequence[MeasuredModel]],
) -> TrainingsReport:
    """What trainings are worth, and beside others. Raises UserError where they were not measured on the same rows."""
    from mmoe_rec.evaluation.summary import Objective
    from mmoe_rec.evaluation.trainings import average_trainings, compare_trainings
    from mmoe_rec.report.trainings import TrainingsReport
    from mmoe_rec.training.checkpoint import latest_checkpoint

    rules, sums, first = settings.evaluation, [each.sums for each in mine], mine[0].summary
    units = "rows" if first.each_row_is_a_user else "users"
    checkpoints = [latest_checkpoint(Path(each.data.work) / "checkpoints") for each in own]
    choices = [None if each is None else each.state.choices for each in checkpoints]
    facts = {
        "log": settings.data.log,
        "rows": f"{first.rows:,} test rows",
        "precision": " or ".join(sorted({"unknown" if each is None else each.precision for each in choices})),
        f"resamples of {units}": f"{rules.resamples:,}",
        "command": command(),
    }
    against = {}
    if others:  # whatever they rank by, what a row is worth is the same for all
        weights = first.facts["relevance_weights"]
        facts["relevance"] = ", ".join(f"{weight:g} x {name}" for name, weight in weights.items())
        theirs = {name: [one.sums for one in each] for name, each in others.items()}
        objective = Objective.of(rules.decide_by, sums[0], list(settings.tasks))
        against = compare_trainings(sums, theirs, objective, rules.resamples)
    named = {"these settings": mine, **{f"'{name}'": each for name, each in others.items()}}
    return TrainingsReport(
        title=f"{len(own)} trainings of {settings.name}",
        seeds=tuple(each.training.seed for each in own),
        rows=first.rows,
        units=units,
        summary=average_trainings(sums, rules.resamples),
        against=against,
        warnings=[sentence for name, models in named.items() for sentence in _warnings(name, models)],
        facts=facts,
    )


def _warnings(name: str, models: Sequence[MeasuredModel]) -> Iterator[str]:
    """What is suspicious about the trainings of a setting, each but once. name: of the setting."""
    from mmoe_rec.report.findings import find_in_summary

    sentences: dict[str, list[str]] = {}
    for model in models:
        for each in model.seen:
            sentences.setdefault(each, []).append(f"models of {name} were trained by settings by which each {each}")
        for finding in find_in_summary(model.summary):
            sentences.setdefault(f"{finding.check} {finding.task}", []).append(f"{name}: {finding.message}")
    for same in sentences.values():
        yield same[0] + ("" if len(same) == len(models) else f" ({len(same)} of {len(models)} trainings)")


def _write(folder: Path, report: TrainingsReport, models: Sequence[Path]) -> None:
    """Writes the files, the page last."""
    from mmoe_rec.report.trainings import page

    versions = {str(seed): version_of(model) for seed, model in zip(report.seeds, models, strict=True)}
    tree = {"seeds": report.seeds, "models": versions, "rows": report.rows, **report.summary}
    tree["sentences"] = [*report.sentences, *report.means]
    tree |= {"against": report.against} if report.against else {}
    tree |= {"warnings": list(report.warnings)} if report.warnings else {}
    (folder / PAGE).unlink(missing_ok=True)
    write_text(folder / FILE, json.dumps(tree, indent=1, default=asdict))
    write_text(folder / PAGE, page(report))
