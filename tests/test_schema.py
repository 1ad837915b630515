import pytest
from pydantic import ValidationError

from mmoe_rec.features import kinds
from mmoe_rec.log.columns import column_uses
from mmoe_rec.settings.schema import Schema

TREE = {
    "columns": {"user": "u", "candidate": "c", "time": "t", "request": "r", "sampling_rate": "s"},
    "roles": {"user": ["age"], "candidate": ["brand", "tags"], "context": ["store"], "placement": ["slot", "page"]},
    "tasks": {
        "click": {"label": "clicked", "objective": "engagement"},
        "liked": {
            "label": "stars",
            "objective": "satisfaction",
            "observed_when": {"column": "answered", "equals": True},
        },
    },
    "features": {"item": {"kind": "id", "column": "c"}},
}


def _schema(*features: tuple[str, dict], **sections) -> Schema:
    return kinds.schema_of({**TREE, **sections, "features": {**TREE["features"], **dict(features)}})


def _refuses(message: str, *features: tuple[str, dict], **sections) -> None:
    with pytest.raises(ValidationError) as caught:
        _schema(*features, **sections)
    assert message in str(caught.value)


def _feature(kind: str, **keys) -> tuple[str, dict]:
    return "f", {"kind": kind, **keys}


# Roles


@pytest.mark.parametrize(
    ("feature", "role"),
    [
        (_feature("id", column="u"), "user"),
        (_feature("id", column="age"), "user"),
        (_feature("id", column="brand"), "candidate"),
        (_feature("id", column="store"), "context"),
        (_feature("id", column="slot"), "placement"),
        (_feature("cross", columns=["u", "store"]), "context"),
        (_feature("cross", columns=["u", "brand"]), "candidate"),
        (_feature("cross", columns=["store", "brand"]), "candidate"),
        (_feature("cross", columns=["slot", "page"]), "placement"),
        (_feature("time"), "context"),
        (_feature("history", task="click", of="item"), "user"),
        (_feature("counter", task="click", by=["u"]), "user"),
        (_feature("counter", task="click", by=["u", "c"]), "candidate"),
    ],
)
def test_a_feature_describes_what_its_columns_describe_together(feature, role):
    assert _schema(feature).role_of("f") == role


def test_a_column_with_two_roles():
    roles = {"user": ["age"], "context": ["age"]}
    _refuses("column 'age' has two roles, user and context; leave it in one", roles=roles)
    _refuses("column 'c' has two roles, candidate and user", roles={"user": ["c"]})
    _schema(roles={"user": ["u", "u"]})


def test_a_column_without_a_role():
    _refuses(
        "feature 'f' reads column 'colour', which has no role; list it under roles.user",
        _feature("id", column="colour"),
    )


@pytest.mark.parametrize("other", ["c", "u", "store"])
def test_placement_mixed_with_anything_else(other):
    message = (
        "feature 'f' reads placement together with other columns or past labels, but placement is absent in serving"
    )
    _refuses(message, _feature("cross", columns=["slot", other]))
    _refuses(message, _feature("counter", task="click", by=["slot", other]))


def test_placement_in_a_counter():
    _refuses("feature 'f' reads placement together with", _feature("counter", task="click", by=["slot"]))


def test_one_column_for_two_purposes():
    for purpose in ("candidate", "time", "request", "sampling_rate"):
        message = f"columns.user and columns.{purpose} both name column 'u'"
        _refuses(message, columns={**TREE["columns"], purpose: "u"})
    tasks = {"click": {"label": "c", "objective": "engagement"}}
    _refuses("the label of task 'click' is column 'c', which is columns.candidate too", tasks=tasks)


# Leaks


@pytest.mark.parametrize(
    "feature",
    [
        _feature("id", column="stars"),
        _feature("cross", columns=["u", "stars"]),
        _feature("counter", task="click", by=["stars"]),
    ],
)
def test_a_label_as_an_input(feature):
    message = (
        "feature 'f' reads column 'stars', which is the label of task 'liked'; past labels are read through features"
    )
    _refuses(message, feature)
    _refuses(message, feature, roles={**TREE["roles"], "context": ["store", "stars"]})


def test_the_sampling_rate_as_an_input():
    _refuses(
        "feature 'f' reads column 's', the sampling rate, which gives labels away", _feature("numeric", column="s")
    )


# References


def test_a_counter_or_history_has_one_source():
    for keys in ({}, {"task": "click", "events": "buys"}):
        _refuses("give either `task`, to read the log's labels, or `events`", _feature("counter", by=["u"], **keys))
        _refuses("give either `task`, to read the log's labels, or `events`", _feature("history", of="item", **keys))
    buys = _feature("counter", events="buys", by=["u"], outputs=["rows"])
    _refuses("feature 'f' names events 'buys'; logs under data.events are: none, add it", buys)
    events = {"views": {"path": "p", "time": "t"}}
    _refuses("feature 'f' names events 'buys'; logs under data.events are: views", buys, events=events)
    rate = _feature("counter", events="views", by=["u"], outputs=["positives", "rate"])
    _refuses("events have no rate", rate, events=events)


def test_a_task_that_is_not_there():
    for feature in (_feature("counter", task="buy", by=["u"]), _feature("history", task="buy", of="item")):
        _refuses("feature 'f' names task 'buy'; tasks are click, liked", feature)


@pytest.mark.parametrize("of", ["none", "number", "guest", "tags", "user"])
def test_a_history_of_what_is_no_id_feature_of_the_candidate(of):
    others = (
        ("number", {"kind": "numeric", "column": "brand"}),
        ("guest", {"kind": "id", "column": "brand", "table": "item"}),
        ("tags", {"kind": "ids", "column": "tags"}),
        ("user", {"kind": "id", "column": "u"}),
    )
    message = (
        f"feature 'f': of '{of}' is not an id feature of the candidate with a table of its own; such features are: item"
    )
    _refuses(message, _feature("history", task="click", of=of), *others)


def test_a_table_that_is_not_there_or_not_ones_own():
    _refuses("feature 'f': table 'none' is not an id feature", _feature("id", column="brand", table="none"))
    _refuses("feature 'f': table 'f' is not an id feature", _feature("id", column="brand", table="f"))
    chain = ("g", {"kind": "id", "column": "brand", "table": "f"})
    _refuses("feature 'g': table 'f' is not an id feature", _feature("id", column="brand", table="item"), chain)
    schema = _schema(
        _feature("ids", column="tags", table="item"), ("h", {"kind": "history", "task": "click", "of": "item"})
    )
    assert [schema.table_of(name) for name in ("item", "f", "h")] == ["item", "item", "item"]


def test_names_are_words():
    for name in ("a-b", "a b", "", "a/b", "_", "é.x"):
        _refuses("may hold letters, digits and underscores only", (name, {"kind": "id", "column": "c"}))
    _schema(("Größe_2", {"kind": "id", "column": "c"}))


def test_names_differ_in_more_than_case():
    _refuses(
        "features 'Größe' and 'größe' differ only in upper and lower case",
        ("Größe", {"kind": "id", "column": "c"}),
        ("größe", {"kind": "id", "column": "c"}),
    )


@pytest.mark.parametrize(
    ("feature", "message"),
    [
        (_feature("time", parts=["age"]), "part 'age' needs a `column`"),
        (_feature("time", parts=["hour", "hour"]), "lists hour twice"),
        (_feature("time", timezone="Mars/Olympus"), "must be a time zone such as UTC or Europe/Berlin"),
        (_feature("time", timezone="../etc"), "must be a time zone such as UTC or Europe/Berlin"),
        (_feature("cross", columns=["u", "u"]), "lists u twice"),
        (_feature("counter", task="click", by=["u"], outputs=["rate", "rate"]), "lists rate twice"),
        (_feature("counter", task="click", by=["u"], window_days=[None, None]), "lists null twice"),
        (
            _feature("counter", task="click", by=["u"], window_days=[1, 0.0416667, 0.04166667]),
            "lists 0.0416667 and 0.04166667, but windows are named by their first six digits",
        ),
        (_feature("counter", task="click", by=["u"], window_days=[-1]), "greater than 0"),
        (_feature("counter", task="click", by=["u"], smoothing=float("inf")), "finite"),
        (
            _feature("counter", task="click", by=["u"], window_days=[None, 91, 7], forget_after_days=60),
            "forgets after 60 days, before its window of 91 days is over: set forget_after_days to 91 or more",
        ),
        (_feature("counter", task="click", by=["u"], forget_after_days=0), "greater than 0"),
        (_feature("counter", task="click", by=["u"], max_keys=9), "max_keys"),
    ],
)
def test_feature_values_that_make_no_sense(feature, message):
    _refuses(message, feature)


# What is read


def test_columns_that_are_read():
    schema = _schema(
        _feature("counter", task="liked", by=["u", "brand"]),
        ("when", {"kind": "time"}),
        ("slot", {"kind": "id", "column": "slot"}),
    )
    assert schema.input_columns() == {
        "u": "user",
        "c": "candidate",
        "t": "context",
        "brand": "candidate",
        "slot": "placement",
    }
    assert sorted(column_uses(schema)) == ["answered", "brand", "c", "clicked", "r", "s", "slot", "stars", "t", "u"]


@pytest.mark.parametrize("name", ["score", "ranking"])
def test_a_task_may_not_have_the_name_of_a_part_of_the_metrics(name):
    _refuses(f"a task may not be called '{name}'", tasks={name: {"label": "y", "objective": "engagement"}})


# A task that is given another one


def _given(**changes) -> dict:
    """Tasks in which liked is given click, with other keys of liked."""
    return {**TREE["tasks"], "liked": {**TREE["tasks"]["liked"], "given": "click", **changes}}


def test_a_task_may_be_given_an_engagement():
    assert _schema(tasks=_given()).tasks["liked"].given == "click"
    assert _schema().tasks["liked"].given is None


@pytest.mark.parametrize("given", ["buy", "liked", "stars", "shared"])
def test_a_task_is_given_another_binary_task_without_given(given):
    tasks = _given(given=given)
    tasks["minutes"] = {"label": "minutes", "kind": "regression", "objective": "engagement"}
    tasks["shared"] = {"label": "shared", "objective": "satisfaction", "given": "click"}
    message = (
        f"task 'liked' is given '{given}', which is not another binary task without `given`; such tasks are: click"
    )
    _refuses(message, tasks=tasks)


def test_two_tasks_given_each_other():
    tasks = _given()
    tasks["click"] = {**tasks["click"], "given": "liked"}
    _refuses(
        "task 'click' is given 'liked', which is not another binary task without `given`; such tasks are: none",
        tasks=tasks,
    )


def test_a_regression_is_not_given_anything():
    _refuses("task 'liked' has `given`, which only a binary task can have", tasks=_given(kind="regression"))


def test_what_two_tasks_are_together_has_a_name_of_its_own():
    tasks = {**_given(), "click_and_liked": {"label": "other", "objective": "satisfaction"}}
    _refuses(
        "the outcome of tasks 'click' and 'liked' together is called 'click_and_liked', as is a task; rename one",
        tasks=tasks,
    )
