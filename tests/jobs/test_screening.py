"""The search within a time, on drawn scores: what it finds, within its time, and after kills."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmoe_rec.evaluation.intervals import Difference, Resampled
from mmoe_rec.features.pipeline import largest_layout
from mmoe_rec.jobs.alternatives import Alternative, apply_alternatives, keys_of, leave_out, list_alternatives, widen
from mmoe_rec.jobs.presets import take_half
from mmoe_rec.jobs.screening import Notes, Recipe, Result, Screening, Trained, choose_taken, join_best, keep_better_half
from mmoe_rec.settings.editing import edit_settings
from mmoe_rec.settings.load import load_settings
from mmoe_rec.settings.sections import Settings, dump_yaml

CONFIGS = [
    pytest.param(path, marks=() if path.stem == "synthetic" else pytest.mark.thorough, id=path.stem)
    for path in sorted(Path("configs").glob("*.yaml"))
]
SECONDS = 10.0


class Killed(BaseException):
    """In the place of a signal that nobody can answer."""


class World:
    """Scores that alternatives add to, with noise by the seed; each of two trainings at a time takes SECONDS."""

    def __init__(self, effects: Sequence[float], noise: float = 0.001) -> None:
        self.effects, self.noise, self.time, self.ended = effects, noise, 0.0, dict[Recipe, Trained]()
        self.kill_after: int | None = None

    def train(self, recipes: Sequence[Recipe], until: float) -> None:
        for each in recipes:
            if each in self.ended or self.time + SECONDS / 2 > until:
                continue
            if len(self.ended) == self.kill_after:
                raise Killed
            random = np.random.default_rng([each.seed, *each.made])
            value = 0.7 + sum(self.effects[n] for n in each.made) + self.noise * random.normal()
            users = random.normal(0, 0.001, 50) / 50
            redrawn = value + 7 * np.random.default_rng(5).normal(size=(100, 50)) @ users
            self.ended[each] = Trained(Resampled(value, redrawn, users), SECONDS)
            self.time += SECONDS / 2

    def search(self, minutes: float, notes: Notes | None = None, simpler: bool = False) -> Result:
        names = [f"a{n}" for n in range(len(self.effects))]
        tried = [Alternative(each, each, {"training.patience": 9}, simpler=simpler) for each in names]
        settings = load_settings("configs/synthetic.yaml")
        search = Screening(settings, tried, self.train, self.ended.get, lambda: self.time, 2, notes, lambda: 50.0)
        return search.run(minutes)


def test_it_takes_what_is_better_within_its_time() -> None:
    wrong = 0
    for seed in range(3):
        effects = np.random.default_rng(seed).permutation([0.004, 0.003] + [-0.003] * 5 + [0.0] * 3)
        world = World(effects.tolist())
        result = world.search(20)
        assert world.time <= 20 * 60
        assert result.trainings == len(world.ended)
        good = set(np.flatnonzero(effects > 0).tolist())
        assert result.taken
        assert good <= set(result.best)
        assert not any(effects[n] < 0 for n in result.best)
        assert result.compared.value == pytest.approx(0.007, abs=0.0015)
        shown = {n for n, each in enumerate(result.effects) if each.is_significant}
        assert shown >= set(np.flatnonzero(effects).tolist())
        wrong += len(shown - set(np.flatnonzero(effects).tolist()))
    assert wrong <= 1


def test_where_nothing_is_better_the_setting_is_kept() -> None:
    assert not World([-0.002] * 4 + [0.0] * 4).search(15).taken


def test_what_the_choosing_users_like_by_chance_is_seldom_called_better() -> None:
    """Alternatives that are worth nothing, but something to these users: those that choose can't tell that."""
    settings, users, count = load_settings("configs/synthetic.yaml"), 200, 14
    redraws = np.random.default_rng(1).multinomial(users, np.full(users, 1 / users), 100).T - 1
    tried = [Alternative(f"a{n}", f"a{n}", {"training.patience": 9}) for n in range(count)]
    half, compared = take_half(users, is_last=True), []
    for seed in range(6):
        liked = np.random.default_rng(seed).normal(0, 0.03, (count, users))
        ended: dict[Recipe, Trained] = {}

        def train(recipes: Sequence[Recipe], until: float, liked: Any = liked, ended: Any = ended) -> None:
            for each in recipes[: int(until / 10) - len(ended)]:
                noise = np.random.default_rng(each.seed).normal(0, 0.01, users)
                of_users, its = liked[list(each.made)].sum(0) + noise, half == each.is_of_last(settings)
                value = float(of_users[its].mean())
                influence = np.where(its, of_users - value, 0) / its.sum()
                ended[each] = Trained(Resampled(value, value + influence @ redraws, influence), 10.0)

        result = Screening(settings, tried, train, ended.get, lambda ended=ended: 10.0 * len(ended), 1).run(20)
        assert result.best
        compared.append(result.compared)
    assert sum(each.low is not None and each.low > 0 for each in compared) <= 1
    assert sum((each.value or 0.0) > 0 for each in compared) < len(compared)


def test_what_is_simpler_is_taken_where_nothing_is_lost() -> None:
    result = World([0.0002] * 3, noise=0.0003).search(15, simpler=True)
    assert result.taken
    assert result.compared.low is not None


def test_too_little_time_tries_nothing() -> None:
    result = World([0.01] * 5).search(0.5)
    assert not result.taken
    assert not result.effects
    assert result.trainings == 4


def test_where_no_training_ends_nothing_is_tried() -> None:
    world = World([0.01] * 5)
    world.train = lambda recipes, until: None  # type: ignore[method-assign]
    for notes in ({}, {"alternatives": 3}):
        assert world.search(10, Notes(dict(notes))).trainings == 0


def test_few_trainings_try_the_first_alternatives_alone() -> None:
    result = World([0.0] * 12).search(4)
    assert 0 < len(result.alternatives) < 12
    assert [each.name for each in result.alternatives] == [f"a{n}" for n in range(len(result.alternatives))]


@pytest.mark.parametrize("after", [1, 15, 40, 75])
def test_a_search_that_was_killed_goes_on_to_the_same_end(after: int) -> None:
    effects = [0.004, -0.003, 0.0, 0.002, -0.001, 0.0]
    whole = World(effects).search(12)
    world, kept = World(effects), dict[str, object]()
    world.kill_after = after
    notes = Notes({}, kept.update)
    with pytest.raises(Killed):
        world.search(12, notes)
    world.kill_after = None
    again = world.search(12, Notes(dict(kept), kept.update))
    assert (again.best, again.taken, again.trainings) == (whole.best, whole.taken, whole.trainings)
    assert again.compared == whole.compared


def effect(value: float | None, error: float = 0.001) -> Difference:
    return Difference(value, error=error)


def test_the_better_half_goes_on() -> None:
    effects = [effect(0.1), effect(None), effect(-0.1), effect(0.3), effect(0.2)]
    assert keep_better_half(effects, [0, 1, 2, 3, 4]) == [0, 3, 4]
    assert keep_better_half(effects, [2]) == [2]


def test_of_each_part_the_best_alternative_is_joined() -> None:
    def of(part: str, simpler: bool = False) -> Alternative:
        return Alternative(part, part, simpler=simpler)

    tried = [of("a"), of("a"), of("b"), of("c", True), of("d", True), of("e")]
    effects = [effect(0.002), effect(0.003), effect(0.0005), effect(0.0001), effect(-0.0001), effect(0.005)]
    assert join_best(tried, effects, [0, 1, 2, 3, 4]) == [1, 3]


@pytest.mark.parametrize(
    ("low", "value", "simpler", "taken"),
    [
        (0.001, 0.002, [False, False], [0, 1]),
        (-0.0005, 0.001, [True, False], [1]),
        (-0.0005, 0.001, [True, True], [0, 1]),
        (-0.0005, -0.0001, [True, True], []),
        (-0.002, 0.001, [True, True], [1]),
        (None, 0.001, [True, True], []),
    ],
)
def test_what_is_taken(low: float | None, value: float, simpler: list[bool], taken: list[int]) -> None:
    """All that is shown together; or what is simpler and not worse; or what is shown by itself, here the second."""
    tried = [Alternative(str(n), str(n), simpler=each) for n, each in enumerate(simpler)]
    effects = [Difference(0.001, p_corrected=0.2), Difference(0.002, p_corrected=0.01)]
    assert choose_taken(tried, effects, [0, 1], Difference(value, low)) == taken


class Everything(set[str]):
    """Holds every name."""

    def __contains__(self, name: object) -> bool:
        return True


@pytest.mark.parametrize("config", CONFIGS)
def test_each_alternative_gives_settings_and_a_file_with_its_comments(config: Path) -> None:
    settings, text = load_settings(config), config.read_text(encoding="utf-8")
    tried = [*list_alternatives(settings, 100_000, "large", Everything()), *widen(settings)]
    assert len({each.name for each in tried}) == len(tried) > 10
    assert {each.name for each in list_alternatives(settings, 100_000, "small")} < {each.name for each in tried}
    for each in tried:
        changed, without = apply_alternatives(settings, [each])
        target = leave_out(changed, without)
        assert target != settings
        edited = edit_settings(text, each.values, keys_of(settings, without), target)
        assert edited != target.to_yaml(), f"{each.name} loses the comments"
        assert edited.splitlines()[0] == text.splitlines()[0]
        assert sum(line not in text for line in edited.splitlines()) <= 4 + len(each.values)


def test_a_file_that_can_not_be_edited_is_written_whole() -> None:
    text = "a: &one {x: 1}\nb: *one\n"
    target = load_settings("configs/synthetic.yaml")
    assert edit_settings(text, {"training.epochs": 2}, (), target) == target.to_yaml()


def test_comments_go_with_the_feature_and_headings_stay_with_their_group() -> None:
    tree = load_settings("configs/template.yaml").model_dump(mode="json") | {"tuning": {}}
    tree["features"] = {name: {"kind": "id", "column": tree["columns"]["user"]} for name in ("one", "two", "three")}
    entry = f"{{kind: id, column: {tree['columns']['user']}}}"
    lines = ["", "  # whom", "  # check: one", f"  one: {entry}", "  # of two", f"  two: {entry}"]
    lines += ["", "  # check: three", f"  three: {entry}", ""]
    text = dump_yaml({**tree, "features": 0}).replace("features: 0\n", "\n".join(["features:", *lines]))
    settings = Settings.model_validate(tree)
    kept_and_gone = {"one": ("# whom", "# check: one"), "two": ("# check: one", "# of two")}
    for name, (kept, gone) in {**kept_and_gone, "three": ("# of two", "# check: three")}.items():
        edited = edit_settings(text, {}, [["features", name]], leave_out(settings, [name]))
        assert kept in edited
        assert edit_settings(text, {f"features.{name}": None}, (), leave_out(settings, [name])) == edited
        assert gone not in edited


def test_alternatives_that_leave_no_input_do_not_go_together() -> None:
    settings = load_settings("configs/template.yaml")
    names = [name for name in settings.features if settings.schema_.role_of(name) != "placement"]
    with pytest.raises(ValueError, match="no feature of user, candidate or context is left"):
        apply_alternatives(settings, [Alternative("all", "some", without=(name,)) for name in names])


def test_ids_that_others_read_stay_or_go_with_them() -> None:
    settings = load_settings("configs/complete_journey.yaml")
    for each in list_alternatives(settings, 100_000, "small"):
        rest = set(settings.features) - set(each.without)
        reads = {getattr(settings.features[name], "of", None) for name in rest} - {None}
        assert reads <= rest, each.name


def test_a_training_does_not_see_the_inputs_that_the_changed_file_lacks() -> None:
    """Of counters with several outputs, all of them."""

    def inputs_of(settings: Settings) -> set[str]:
        layout = largest_layout(settings.schema_)
        return {each.name for each in (*layout.ids, *layout.dense)}

    settings = load_settings("configs/cluster.yaml")
    inputs = inputs_of(settings)
    tried = [each for each in list_alternatives(settings, 100_000, "large", inputs) if each.values and each.without]
    assert {each.part for each in tried} == {"recency", "windows"}
    for each in tried:
        changed, _ = apply_alternatives(settings, [each])
        assert inputs - inputs_of(changed) == {*each.without}, each.name


def test_placement_is_never_left_out() -> None:
    settings = load_settings("configs/synthetic.yaml")
    assert isinstance(settings, Settings)
    assert all("position" not in each.without for each in list_alternatives(settings, 100_000, "large"))
