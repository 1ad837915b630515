"""What is measured, and in which columns it stands: by a settings file, or by the words of a command line."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches

from mmoe_rec.errors import UserError
from mmoe_rec.evaluation.rows import MeasuredTask
from mmoe_rec.evaluation.slices import SliceBy
from mmoe_rec.inference.ranking import ROW
from mmoe_rec.settings.columns import outcome_name
from mmoe_rec.settings.sections import ErrorOrKeep, Settings

JOINED, WEIGHT = "+", "weight"


@dataclass(frozen=True)
class Asked:
    """Tasks, and the columns that rows have.

    request: one column, or several whose values together tell requests apart; score, candidate: None where nothing was
    said of them, so that the files need not have them; usual_candidate: the column that is taken then, if it is there;
    usual_weight: the log's name of weights, which files of this project call `WEIGHT`; by_log: whether users, requests
    and candidates are called as in the log, so that files which call them `user`, `request` and `candidate` are meant;
    predicted, labels: task -> column; optional: tasks that are measured where the files have their columns; duplicates:
    whether a request may hold a candidate twice; slices: by what rows are sliced.
    """

    tasks: tuple[MeasuredTask, ...]
    user: str = "user"
    request: tuple[str, ...] = ("request",)
    score: str | None = None
    candidate: str | None = None
    usual_candidate: str = "candidate"
    weight: str | None = None
    usual_weight: str | None = None
    by_log: bool = False
    predicted: dict[str, str] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    optional: frozenset[str] = frozenset()
    duplicates: ErrorOrKeep = "error"
    slices: tuple[SliceBy, ...] = ()

    def told(self) -> dict[str, str | None]:
        """Part -> column, as `with_columns` takes them."""
        found = {name: getattr(self, name) for name in ("user", "candidate", "score", "weight")}
        found["request"] = JOINED.join(self.request)
        for task in self.tasks:
            found[f"predicted_{task.name}"] = self.predicted[task.name]
            found[f"label_{task.name}"] = self.labels[task.name]
        return found

    def with_columns(self, words: Sequence[str]) -> Asked:
        """With other columns, each as PART=COLUMN. Raises UserError for words that say something else."""
        changed = self
        for word in words:
            part, equals, column = word.partition("=")
            if not equals or not part or not column:
                raise UserError(f"--columns takes PART=COLUMN, such as user=customer_id; found '{word}'")
            changed = changed._with(part, column)
        return changed

    def _with(self, part: str, column: str) -> Asked:
        if part in ("user", "score", "candidate", "weight"):
            return replace(self, **{part: column}, by_log=self.by_log and part in ("score", "weight"))  # type: ignore[arg-type]
        if part == "request":
            return replace(self, request=tuple(column.split(JOINED)), by_log=False)
        for kind in ("predicted", "label"):
            task = part.removeprefix(f"{kind}_")
            if task != part and task in self.predicted:
                if kind == "predicted":
                    return replace(self, predicted=self.predicted | {task: column})
                return replace(self, labels=self.labels | {task: column})
        parts = ["user", "request", "candidate", "score", "weight"]
        parts += [f"{kind}_{task}" for task in self.predicted for kind in ("predicted", "label")]
        near = get_close_matches(part, parts, 1)
        meant = f"; did you mean '{near[0]}'?" if near else f"; there are {', '.join(parts)}"
        raise UserError(f"--columns {part}={column}: rows have no part '{part}'{meant}")

    def by_usual_names(self, there: Collection[str]) -> Asked:
        """For files with these columns: where they lack the log's, by the names that `evaluate --predictions` gives."""
        lacking = {self.user, *self.request} - set(there)
        if not (self.by_log and lacking and {"user", "request"} <= set(there)):
            return self
        return replace(self, user="user", request=("request",), usual_candidate="candidate")

    def without(self, tasks: Sequence[str]) -> Asked:
        """Without some of the tasks."""
        return replace(self, tasks=tuple(task for task in self.tasks if task.name not in tasks))


def _asked(tasks: Sequence[MeasuredTask], optional: Sequence[str] = ()) -> Asked:
    names = [task.name for task in tasks]
    predicted, labels = ({name: f"{kind}_{name}" for name in names} for kind in ("predicted", "label"))
    return Asked(tuple(tasks), predicted=predicted, labels=labels, optional=frozenset(optional))


def asked_by_settings(settings: Settings) -> Asked:
    """The tasks of settings, their outcomes, and the log's names of users, requests and candidates."""
    tasks = [MeasuredTask(name, task.kind, task.score_weight) for name, task in settings.tasks.items()]
    outcomes = [outcome_name(task.given, name) for name, task in settings.tasks.items() if task.given is not None]
    asked = _asked([*tasks, *(MeasuredTask(name, "binary", 0.0) for name in outcomes)], outcomes)
    names = settings.schema_.columns
    user = names.user if names.has_user else names.request or ROW
    if names.request is None:
        # A row of a plain table is a user of its own, and a user of a log without times makes one request.
        request: tuple[str, ...] = (user, names.time) if names.has_time and names.has_user else (user,)
    else:
        request = (names.user, names.request) if names.request_scope == "user" else (names.request,)
    return replace(
        asked,
        user=user,
        request=request,
        usual_candidate=names.candidate,
        weight=names.weight,
        usual_weight=names.weight,
        duplicates=settings.data.duplicates,
        by_log=True,
    )


def asked_by_words(words: Sequence[str]) -> Asked:
    """Tasks as NAME, NAME:regression, NAME=WEIGHT or NAME:regression=WEIGHT. Raises UserError for anything else."""
    tasks = []
    for word in words:
        named, equals, weight = word.partition("=")
        name, colon, kind = named.partition(":")
        try:
            tasks.append(MeasuredTask(name, kind if colon else "binary", float(weight) if equals else 1.0))  # type: ignore[arg-type]
        except ValueError as error:
            raise UserError(
                f"--tasks takes NAME, NAME:regression and NAME=WEIGHT, such as bought or stars:regression=0.2; "
                f"found '{word}' ({error})"
            ) from None
    names = [task.name for task in tasks]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"--tasks names '{twice}' twice")
    return _asked(tasks)
