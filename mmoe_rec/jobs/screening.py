"""Tries alternatives to a setting within a time: many of them at once, fewer from rung to rung, and the best by itself.

The first trainings are of the setting as it is, and tell how long one takes. In each rung, trainings take a drawn part
of the alternatives that are left, each with a seed of its own; a regression tells what each gives
(`mmoe_rec.evaluation.effects`), and the better half goes on (successive halving: Jamieson and Talwalkar, 2016). At last
the best of each part of the settings are taken together, and compared with the setting as it is by trainings and users
that had no say before: the best of many by some users' rows seem to be better by these rows, also where none is.

Tried on drawn scores (20 alternatives of +-.0015, trainings apart by .002, 96 trainings): so .0037 of .0046 are found,
by one alternative after the other, with halving over seeds, .0019; level at 48 trainings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from mmoe_rec.evaluation.effects import draw_design, estimate_effects
from mmoe_rec.evaluation.intervals import Difference, Resampled
from mmoe_rec.jobs.alternatives import Alternative, apply_alternatives
from mmoe_rec.progress import say
from mmoe_rec.settings.sections import Settings

RUNGS = (0.4, 0.6)
"""Shares of the time at which each rung ends; the rest compares the best with the setting as it is."""
TRAININGS_EACH = 3
"""Of the first rung, for each alternative: with fewer, its effect can't be told from the others'."""
LEAST = 12
"""Trainings in all, with fewer of which nothing is tried."""
LAST = (2, 16)
"""Fewest and most trainings of either side in the last comparison."""
MARGIN = 0.001
"""Of the metric, that something simpler may lose with its interval."""
SEEDS = (1000, 2000, 3000)
"""What is added to the file's seed for the trainings of each rung and of the last comparison."""
_MOST = SEEDS[1] - SEEDS[0]  # trainings of a rung
_MADE = 1.3  # times that a training with alternatives takes as long as one without, before any was timed


@dataclass(frozen=True)
class Recipe:
    """A training. made: numbers of the alternatives that it takes; seed: of weights, rows and dropout."""

    made: tuple[int, ...]
    seed: int

    def is_of_last(self, settings: Settings) -> bool:
        """Whether it is of the last comparison. settings: the file's."""
        return self.seed >= settings.training.seed + SEEDS[-1]


@dataclass(frozen=True)
class Trained:
    """What a training gave. metric: that decides, higher is better, when users are redrawn, of half of the users for
    trainings of the last comparison, and of the other half for all others; seconds: that it took."""

    metric: Resampled
    seconds: float


@dataclass
class Notes:
    """What a search has drawn, so that it goes on with it after a kill. save: keeps `values`, which JSON can hold."""

    values: dict[str, Any] = field(default_factory=dict)
    save: Callable[[dict[str, Any]], None] = lambda values: None

    def keep(self, name: str, make: Callable[[], Any]) -> Any:
        """What is noted under a name, or else what is made, which is noted."""
        if name not in self.values:
            self.values[name] = make()
            self.save(self.values)
        return self.values[name]

    def keep_recipes(self, name: str, draw: Callable[[], list[Recipe]]) -> list[Recipe]:
        """Recipes, see `keep`."""
        drawn = self.keep(name, lambda: [[list(each.made), each.seed] for each in draw()])
        return [Recipe(tuple(made), seed) for made, seed in drawn]


@dataclass
class Result:
    """What a search has found.

    alternatives: that were tried; effects: of each, and counts: how many trainings took it; dropped: those that the
    last rung did not try; best: those that were taken together; compared: the best with the setting as it is; sides:
    how many trainings of either; taken: what goes into the file; seconds: of a training by either; spent: of all;
    trainings: in all.
    """

    alternatives: Sequence[Alternative]
    effects: list[Difference] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    dropped: list[int] = field(default_factory=list)
    best: list[int] = field(default_factory=list)
    compared: Difference = Difference(None)  # noqa: RUF009 - it is frozen
    sides: tuple[int, int] = (0, 0)
    taken: list[int] = field(default_factory=list)
    seconds: tuple[float, float] = (0.0, 0.0)
    spent: float = 0.0
    trainings: int = 0


class Screening:
    """Finds better settings.

    train: trains recipes, some at a time, and begins none that would not end by a moment of the clock; read: gives what
    one gave, None where it did not end; clock: in seconds, which begin at what an earlier start has spent; notes: of an
    earlier start, which is gone on with; effective: number of users by their sizes, once some were measured.
    """

    def __init__(
        self,
        settings: Settings,
        alternatives: Sequence[Alternative],
        train: Callable[[Sequence[Recipe], float], None],
        read: Callable[[Recipe], Trained | None],
        clock: Callable[[], float],
        at_once: int,
        notes: Notes | None = None,
        effective: Callable[[], float] = lambda: math.inf,
    ) -> None:
        self.settings, self.train, self.read = settings, train, read
        self.notes = Notes() if notes is None else notes
        self.alternatives, self.clock, self.at_once, self.effective = list(alternatives), clock, at_once, effective
        self.found: dict[Recipe, Trained] = {}
        self._seed = settings.training.seed

    def run(self, minutes: float) -> Result:
        """Tries for so many minutes of the clock."""
        until = 60 * minutes
        self._train([Recipe((), self._seed + number) for number in range(2 * self.at_once)], until)
        # The first training of a process takes longer: it loads what the others have.
        seconds = min((each.seconds for each in self.found.values()), default=math.inf)
        fits = int((until - self.clock()) * self.at_once / max(1e-6, seconds * _MADE))
        most = int(RUNGS[0] * fits / TRAININGS_EACH)
        if not self.found or ("alternatives" not in self.notes.values and (fits < LEAST or not most)):
            return self._finish([], [])
        self.alternatives = self.alternatives[: self.notes.keep("alternatives", lambda: most)]
        names = len(self.alternatives)
        say(
            f"a training takes some {seconds:.0f} s, {self.at_once} at a time: about {fits} fit into {minutes:g} "
            f"minutes. They try {names} alternatives, several at once; then the better half of them; and compare the "
            "best with the file"
        )
        alive = list(range(names))
        for number, end in enumerate(RUNGS):
            recipes = self.notes.keep_recipes(f"rung {number + 1}", partial(self._draw, alive, number, end * until))
            say(f"rung {number + 1}: {len(recipes)} trainings, if time allows, of {len(alive)} alternatives")
            self._train(recipes, end * until)
            effects = self._effects()
            kept = keep_better_half(effects, alive)
            if number < len(RUNGS) - 1:
                alive = kept
        best = self._valid(join_best(self.alternatives, self._effects(), alive))
        if best:
            say(f"the best are compared with the file: {'; '.join(self.alternatives[n].name for n in best)}")
            self._compare(tuple(best), until)
        return self._finish(alive, best)

    def _draw(self, alive: Sequence[int], rung: int, until: float) -> list[Recipe]:
        """As many recipes as end by then, each of which takes a drawn part of the alternatives that are alive."""
        timed = [each.seconds for recipe, each in self.found.items() if recipe.made]
        one = float(np.mean(timed)) if timed else min(each.seconds for each in self.found.values()) * _MADE
        room = max(0, int((until - self.clock()) * self.at_once / one))
        size = min(max(len(alive) + 2, room), _MOST)
        parts: dict[str, list[int]] = {each.part: [] for each in self.alternatives}  # of which one excludes the others
        for number in alive:
            parts[self.alternatives[number].part].append(number)
        groups = [each for each in parts.values() if each]
        design = draw_design(groups, len(self.alternatives), size, self._seed + rung)
        begin = self._seed + SEEDS[rung]
        made = (self._valid(np.flatnonzero(row).tolist()) for row in design)
        return [Recipe(tuple(each), begin + number) for number, each in enumerate(made)]

    def _valid(self, made: Sequence[int]) -> list[int]:
        """The alternatives, without the last ones where they don't go together."""
        for end in range(len(made), 0, -1):
            try:
                apply_alternatives(self.settings, [self.alternatives[number] for number in made[:end]])
            except ValueError:
                continue
            return list(made[:end])
        return []

    def _train(self, recipes: Sequence[Recipe], until: float) -> None:
        self.train(recipes, until)
        for each in recipes:
            if (trained := self.read(each)) is not None:
                self.found[each] = trained

    def _effects(self) -> list[Difference]:
        recipes = [each for each in self.found if not each.is_of_last(self.settings)]
        design = np.array([[n in each.made for n in range(len(self.alternatives))] for each in recipes])
        return estimate_effects(design, [self.found[each].metric for each in recipes], self.effective())

    def _compare(self, best: tuple[int, ...], until: float) -> None:
        """Trains both sides in turn, until the time is over, or they have been trained often enough."""

        def draw() -> list[Recipe]:
            one = float(np.mean([each.seconds for each in self.found.values()]))
            each = min(max(int((until - self.clock()) * self.at_once / (2 * one)), LAST[0]), LAST[1])
            seeds = range(self._seed + SEEDS[-1], self._seed + SEEDS[-1] + each)
            return [Recipe(made, seed) for seed in seeds for made in (best, ())]

        self._train(self.notes.keep_recipes("last", draw), until)

    def _finish(self, alive: Sequence[int], best: list[int]) -> Result:
        names = range(len(self.alternatives))
        # Where no rung told of any, as where time was over, none was tried.
        tried_alternatives = self.alternatives if alive else []
        result = Result(tried_alternatives, best=best, spent=self.clock(), trainings=len(self.found))
        if alive:
            result.effects = self._effects()
            tried = [each for each in self.found if not each.is_of_last(self.settings)]
            result.counts = [sum(number in each.made for each in tried) for number in names]
            result.dropped = [number for number in names if number not in alive]
        last = {recipe: each for recipe, each in self.found.items() if recipe.is_of_last(self.settings)}
        mine, others = sides = [
            [each for recipe, each in last.items() if recipe.made == made] for made in (tuple(best), ())
        ]
        if best and all(len(side) >= LAST[0] for side in sides):
            design = np.array([[True]] * len(mine) + [[False]] * len(others))
            metrics = [each.metric for each in (*mine, *others)]
            (result.compared,) = estimate_effects(design, metrics, self.effective())
            result.sides = len(mine), len(others)
            result.seconds = tuple(float(np.mean([each.seconds for each in side])) for side in sides)  # type: ignore[assignment]
            result.taken = choose_taken(self.alternatives, result.effects, best, result.compared)
        return result


def keep_better_half(effects: Sequence[Difference], alive: Sequence[int]) -> list[int]:
    """Of the alternatives that are alive, the half with the largest effects, at least one; in their order."""
    known = [number for number in alive if effects[number].value is not None]
    best = sorted(known, key=lambda number: effects[number].value or 0.0, reverse=True)[: max(1, -(-len(alive) // 2))]
    return sorted(best)


def join_best(alternatives: Sequence[Alternative], effects: Sequence[Difference], alive: Sequence[int]) -> list[int]:
    """The best alternative of each part of the settings, if it gives more than its standard error, or is simpler and
    gives no less than nothing: the last comparison says what they are worth together."""
    chosen: dict[str, int] = {}
    for number in alive:
        each, effect = alternatives[number], effects[number]
        if effect.value is None or effect.value < 0 or not (each.simpler or effect.value > (effect.error or 0.0)):
            continue
        before = chosen.get(each.part)
        if before is None or effect.value > (effects[before].value or 0.0):
            chosen[each.part] = number
    return sorted(chosen.values())


def choose_taken(
    alternatives: Sequence[Alternative], effects: Sequence[Difference], best: list[int], compared: Difference
) -> list[int]:
    """Of the best, what is taken: all, where together they are shown to be better than the setting as it is, or are
    simpler and not worse; else those that are shown by themselves, unless all together were worse."""
    if compared.value is None or compared.low is None or compared.value < 0:
        return []
    simpler = all(alternatives[number].simpler for number in best)
    if compared.low > 0 or (simpler and compared.low > -MARGIN):
        return best
    return [number for number in best if effects[number].is_significant]
