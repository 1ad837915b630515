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
        "liked": {"label": "stars", "objective": "satisfaction", "observed_when": {"column": "answered", "equals": 1}},
    },
    "features": {"item": {"kind": "id", "column": "c"}},
}


def _schema(*features: tuple[str, dict], **sections) -> Schema:
    return kinds.parse_schema({**TREE, **sections, "features": {**TREE["features"], **dict(features)}})


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
        (_feature("id", column="brand"), "candidate"),
        (_feature("id", column="slot"), "placement"),
        (_feature("cross", columns=["u", "store"]), "context"),
        (_feature("cross", columns=["u", "brand"]), "candidate"),
        (_feature("cross", columns=["slot", "page"]), "placement"),
        (_feature("time"), "context"),
        (_feature("history", task="click", of="item"), "user"),
        (_feature("counter", task="click", by=["u"]), "user"),
        (_feature("counter", task="click", by=["u", "c"]), "candidate"),
    ],
)
def test_a_feature_describes_what_its_columns_describe_together(feature, role):
    assert _schema(feature).role_of("f") == role


def _task(label: str, **keys) -> dict:
    return {"label": label, "objective": "engagement", **keys}


def _given(**changes) -> dict:
    """Tasks in which liked is given click, with other keys of liked."""
    return {**TREE["tasks"], "liked": {**TREE["tasks"]["liked"], "conditional_on": "click", **changes}}


LABEL = "feature 'f' reads column 'stars', which is the label of task 'liked'; past labels are read through features"
PLACEMENT = "feature 'f' reads a placement column together with other columns or past labels, but placement is"
MORE_TASKS = {
    "minutes": {"label": "minutes", "kind": "regression", "objective": "engagement"},
    "shared": _task("shared", conditional_on="click"),
}
OUTCOME = "the joint outcome of tasks 'click' and 'liked' has the same name 'click_and_liked' as a task. Rename a task."
NO_GIVEN = "which is not another binary task without `conditional_on`. Name one of:"
NO_CANDIDATE = "is not an id feature of the candidate with a table of its own"
NAME = {"kind": "id", "column": "c"}
BUYS = _feature("counter", events="buys", by=["u"], outputs=["log_count"])
VIEWS = {"views": {"path": "p", "time": "t"}}
CHAIN = ("g", {"kind": "id", "column": "brand", "table": "f"})
OTHERS = (
    ("number", {"kind": "numeric", "column": "brand"}),
    ("guest", {"kind": "id", "column": "brand", "table": "item"}),
    ("tags", {"kind": "ids", "column": "tags"}),
    ("user", {"kind": "id", "column": "u"}),
)
REFUSED: list[tuple[str, list, dict]] = [
    # Roles
    ("column 'age' has two roles, user and context", [], {"roles": {"user": ["age"], "context": ["age"]}}),
    ("column 'c' has two roles, candidate and user", [], {"roles": {"user": ["c"]}}),
    ("reads column 'colour', which has no role. Add the column to roles.user", [_feature("id", column="colour")], {}),
    ("reads column 'stor', which has no role (did you mean 'store'?). Add", [_feature("id", column="stor")], {}),
    *((PLACEMENT, [_feature("cross", columns=["slot", second])], {}) for second in ("c", "u", "store")),
    *((PLACEMENT, [_feature("counter", task="click", by=by)], {}) for by in (["slot"], ["slot", "c"])),
    *(
        (f"columns.user and columns.{name} both name column 'u'", [], {"columns": {**TREE["columns"], name: "u"}})
        for name in ("candidate", "time", "request", "sampling_rate")
    ),
    ("columns.candidate and tasks.click.label both name column 'c'", [], {"tasks": {"click": _task("c")}}),
    # Leaks
    *(
        (LABEL, [feature], sections)
        for sections in ({}, {"roles": {**TREE["roles"], "context": ["store", "stars"]}})
        for feature in (
            _feature("id", column="stars"),
            _feature("cross", columns=["u", "stars"]),
            _feature("counter", task="click", by=["stars"]),
        )
    ),
    ("reads column 's', the sampling rate, which reveals labels", [_feature("numeric", column="s")], {}),
    # Names
    *(("may contain only letters, digits", [(name, NAME)], {}) for name in ("a-b", "a b", "", "a/b", "_", "é.x")),
    ("some names differ only in upper and lower case: rename one of", [("Größe", NAME), ("größe", NAME)], {}),
    *((f"a task can't have the name '{name}'", [], {"tasks": {name: _task("y")}}) for name in ("score", "ranking")),
    # A task that is given another one
    *(
        (
            f"task 'liked' is conditional on '{given}', {NO_GIVEN} click",
            [],
            {"tasks": {**_given(conditional_on=given), **MORE_TASKS}},
        )
        for given in ("buy", "liked", "minutes", "shared")
    ),
    (
        f"is conditional on 'liked', {NO_GIVEN} none",
        [],
        {"tasks": {**_given(), "click": _task("a", conditional_on="liked")}},
    ),
    ("task 'liked' has `conditional_on`, which only a binary task can have", [], {"tasks": _given(kind="regression")}),
    (OUTCOME, [], {"tasks": {**_given(), "click_and_liked": _task("other")}}),
    # Sources of counters and histories
    *(
        ("needs either `task`, for labels of the interaction log, or `events`", [_feature(kind, **own, **keys)], {})
        for kind, own in (("counter", {"by": ["u"]}), ("history", {"of": "item"}), ("cooccurrence", {}))
        for keys in ({}, {"task": "click", "events": "buys"})
    ),
    ("names events 'buys'; logs under data.events are: none, add it", [BUYS], {}),
    ("feature 'f' names events 'buys'; logs under data.events are: views", [BUYS], {"events": VIEWS}),
    ("events have no rate", [_feature("counter", events="views", by=["u"], outputs=["rate"])], {"events": VIEWS}),
    ("feature 'f' names task 'buy'; tasks are click, liked", [_feature("counter", task="buy", by=["u"])], {}),
    ("feature 'f' names task 'buy'; tasks are click, liked", [_feature("history", task="buy", of="item")], {}),
    *(
        (f"of '{of}' {NO_CANDIDATE}; such features are: item", [_feature("history", task="click", of=of), *OTHERS], {})
        for of in ("none", "number", "guest", "tags", "user")
    ),
    (f"attributes 'none' {NO_CANDIDATE}", [_feature("history", task="click", of="item", attributes=["none"])], {}),
    # Tables
    *(
        (f"feature 'f': table '{table}' is not an id feature", [_feature("id", column="brand", table=table)], {})
        for table in ("none", "f")
    ),
    ("feature 'g': table 'f' is not an id feature", [_feature("id", column="brand", table="item"), CHAIN], {}),
    # Values
    ("part 'age' needs a `column`", [_feature("time", parts=["age"])], {}),
    ("lists hour twice", [_feature("time", parts=["hour", "hour"])], {}),
    ("must be a time zone such as UTC or Europe/Berlin", [_feature("time", timezone="Mars/Olympus")], {}),
    ("must be a time zone such as UTC or Europe/Berlin", [_feature("time", timezone="../etc")], {}),
    ("lists u twice", [_feature("cross", columns=["u", "u"])], {}),
    ("lists rate twice", [_feature("counter", task="click", by=["u"], outputs=["rate", "rate"])], {}),
    ("lists null twice", [_feature("counter", task="click", by=["u"], window_days=[None, None])], {}),
    ("greater than 0", [_feature("counter", task="click", by=["u"], window_days=[-1])], {}),
    ("finite", [_feature("counter", task="click", by=["u"], smoothing=float("inf"))], {}),
    ("max_keys", [_feature("counter", task="click", by=["u"], max_keys=9)], {}),
]


@pytest.mark.parametrize(("message", "features", "sections"), REFUSED)
def test_what_does_not_fit_together_is_refused(message, features, sections):
    _refuses(message, *features, **sections)


def test_what_fits_together():
    _schema(("Größe_2", NAME), roles={**TREE["roles"], "user": ["u", "u"]})
    assert _schema(tasks=_given()).tasks["liked"].conditional_on == "click"
    assert _schema().tasks["liked"].conditional_on is None


def test_features_share_a_table():
    history = {"kind": "history", "task": "click", "of": "item"}
    schema = _schema(_feature("ids", column="tags", table="item"), ("h", history))
    assert [schema.table_of(name) for name in ("item", "f", "h")] == ["item", "item", "item"]


# What is read


def test_columns_that_are_read():
    others = ("when", {"kind": "time"}), ("slot", {"kind": "id", "column": "slot"})
    schema = _schema(_feature("counter", task="liked", by=["u", "brand"]), *others)
    roles = {"user": ["u"], "candidate": ["c", "brand"], "context": ["t"], "placement": ["slot"]}
    assert schema.input_columns() == {column: role for role, columns in roles.items() for column in columns}
    assert sorted(column_uses(schema)) == ["answered", "brand", "c", "clicked", "r", "s", "slot", "stars", "t", "u"]
