import math
import re
import typing
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from mmoe_rec.errors import UserError
from mmoe_rec.features.kinds import FEATURE_KINDS
from mmoe_rec.features.kinds.counter import CounterFeature
from mmoe_rec.settings.load import check_option_names, describe_settings, load_settings, parse_overrides
from mmoe_rec.settings.log_columns import Section
from mmoe_rec.settings.model import Trees
from mmoe_rec.settings.sections import Settings, dump_yaml
from mmoe_rec.settings.training import Training

CONFIGS = sorted(Path("configs").glob("*.yaml"))
SMALL = {
    "name": "small",
    "data": {"log": "log", "work_dir": "work"},
    "columns": {"user": "u", "candidate": "c", "time": "t", "sampling_rate": "s"},
    "roles": {"candidate": ["brand"], "context": ["store"], "placement": ["slot"]},
    "tasks": {
        "click": {"label": "click", "objective": "engagement"},
        "liked": {"label": "liked", "objective": "satisfaction", "observed_when": {"column": "click", "equals": 1}},
    },
    "features": {
        "item": {"kind": "id", "column": "c"},
        "user": {"kind": "id", "column": "u"},
        "user_brand": {"kind": "counter", "task": "click", "by": ["u", "brand"]},
        "last": {"kind": "history", "task": "click", "of": "item"},
    },
    "split": {"train_end": "2024-01-05", "validation_end": "2024-01-06"},
}


def _tree(**changes) -> dict:
    """The small settings with changes such as `model__experts={"count": 2}` or `**{"model.experts": ...}`."""
    tree = yaml.safe_load(yaml.safe_dump(SMALL))
    for path, value in changes.items():
        *parents, last = path.replace("__", ".").split(".")
        place = tree
        for key in parents:
            place = place.setdefault(key, {})
        if value is _DROPPED:
            del place[last]
        else:
            place[last] = value
    return tree


_DROPPED = object()


def _load(tmp_path, *overrides: str, **changes) -> Settings:
    path = tmp_path / "small.yaml"
    path.write_text(dump_yaml(_tree(**changes)), encoding="utf-8")
    return load_settings(path, overrides)


def _message(tmp_path, *overrides: str, **changes) -> str:
    source = "command line" if overrides else f"{tmp_path}/small.yaml: "
    with pytest.raises(UserError) as caught:
        _load(tmp_path, *overrides, **changes)
    message = str(caught.value)
    assert message.startswith(source)
    assert "\n" not in message
    assert "pydantic" not in message
    assert "Input should" not in message
    return message.removeprefix(source)


# Loading


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_survives_a_round_trip_and_its_keys_are_options(path, tmp_path):
    settings = load_settings(path)
    (tmp_path / "again.yaml").write_text(settings.to_yaml())
    assert load_settings(tmp_path / "again.yaml") == settings

    def names(tree, begin="--"):
        for key, value in tree.items():
            yield f"{begin}{key}"
            if isinstance(value, dict) and key != "search":  # whose keys have dots themselves
                yield from names(value, f"{begin}{key}.")

    check_option_names(names(settings.model_dump(mode="json")))


def test_defaults_and_names():
    settings = Settings.model_validate(SMALL)
    assert settings.model.experts.count == 8
    assert settings.registered_model == "small"
    assert Settings.model_validate({**SMALL, "tracking": {"registered_model": "other"}}).registered_model == "other"
    assert settings.schema_.tasks["liked"].observed_when == settings.tasks["liked"].observed_when
    assert settings.model_choices["tasks"]["click"] == {
        "objective": "engagement",
        "loss_weight": 1.0,
        "score_weight": 1.0,
    }


@pytest.mark.parametrize(
    ("given", "variable", "address"),
    [
        (None, None, "sqlite:///mlflow.db"),
        (None, " ", "sqlite:///mlflow.db"),
        (None, "http://user:secret@there:5000", "http://user:secret@there:5000"),
        ("sqlite:///mlflow.db", "http://there:5000", "sqlite:///mlflow.db"),
        ("http://here:5000", "http://there:5000", "http://here:5000"),
    ],
)
def test_mlflows_variable_counts_where_the_settings_say_nothing(monkeypatch, given, variable, address):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    if variable is not None:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", variable)
    settings = Settings.model_validate({**SMALL, "tracking": {"uri": given}})
    assert settings.tracking.resolved_uri == address
    assert "secret" not in settings.to_yaml()


@pytest.mark.parametrize(
    ("written", "seconds"),
    [
        ("2024-01-02", 1_704_153_600),
        ("2024-01-02T06:30", 1_704_177_000),
        ("2024-01-02 06:30:00.5", 1_704_177_000.5),
        ("2024-01-02T06:30:00+02:00", 1_704_169_800),
        ("'2024-01-02T06:30'", 1_704_177_000),
    ],
)
def test_split_times_may_be_written_as_yaml_or_iso_8601(tmp_path, written, seconds):
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(_tree(split__train_start="START")).replace("START", written))
    for settings in (load_settings(tmp_path / "small.yaml"), _load(tmp_path, "--split.train_start", written)):
        assert settings.split.windows()["train"][0] == seconds * 1e6


# Overrides


def test_overrides_set_any_key(tmp_path):
    words = "--model.experts.count 16 --training.learning_rate 1e-3 --tracking.experiment null --features.item.dim=32 "
    words += "--tasks.click.loss_weight 0.5 --split.test_end 2024-02-01 --data.log a=b.parquet"
    settings = _load(tmp_path, *words.split(), "--model.experts.units=[8, 4]", model=None)
    assert settings.model.experts.count == 16
    assert settings.model.experts.units == (8, 4)
    assert settings.training.learning_rate == 1e-3
    assert settings.tracking.experiment is None
    assert settings.features["item"].dim == 32
    assert settings.tasks["click"].loss_weight == 0.5
    assert settings.split.test_end is not None
    assert settings.data.log == "a=b.parquet"


def test_the_last_override_wins_and_a_negative_value_is_a_value(tmp_path):
    assert _load(tmp_path, "--training.seed", "1", "--training.seed=2").training.seed == 2
    assert list(parse_overrides(["--a.b", "-1", "--c=-2.5"])) == [(["a", "b"], -1), (["c"], -2.5)]
    assert "'training.seed' must be greater than or equal to 0, found -1" in _message(tmp_path, "--training.seed", "-1")


def test_an_override_leaves_a_feature_out(tmp_path):
    actual = _load(tmp_path, "--features.user_brand.smoothing", "3", "--features.user_brand", "null").features
    assert set(actual) == set(_load(tmp_path).features) - {"user_brand"}
    with pytest.raises(UserError, match=r"'--features.user_brands null' removes .*; did you mean 'user_brand'"):
        _load(tmp_path, "--features.user_brands", "null")
    assert "of 'item' is not an id feature" in _message(tmp_path, "--features.item", "null")  # a history reads its ids


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--training.epochs", "0"],
            "(--training.epochs): 'training.epochs' must be auto, or a whole number of at least 1, found",
        ),
        (
            ["--training", "{epochs: 0}"],
            "(--training): 'training.epochs' must be auto, or a whole number of at least 1, found 0",
        ),
        (
            ["--features.item.pooling", "mean"],
            "(--features.item.pooling): unknown key 'features.item.pooling'; val",
        ),
        (
            ["--columns.user", "null", "--training.epochs", "2"],
            "(--columns.user, --training.epochs): feature 'last' needs columns.user",
        ),
    ],
)
def test_a_wrong_override_is_blamed_on_the_command_line(tmp_path, words, message):
    assert _message(tmp_path, *words).lstrip().startswith(message)


def test_a_wrong_file_is_blamed_whatever_is_overridden(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(dump_yaml(_tree(training={"epochs": 0})), encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load_settings(path, ["--training.seed", "2"])
    assert str(caught.value) == f"{path}: 'training.epochs' must be auto, or a whole number of at least 1, found 0"
    assert load_settings(path, ["--training.epochs", "1"]).training.epochs == 1


@pytest.mark.parametrize(
    ("words", "near"),
    [
        ("--device cpu", "--training.device"),
        ("--sedes 5", "--seeds"),
        ("--features.item.mincount=3", "--features.NAME.min_count"),
        ("--tasks.click.lable x", "--tasks.NAME.label"),
        ("--features.item.kind id --model {} --seeds 3 --split.train_end 2024-01-01 --data.lgo x", "--data.log"),
    ],
)
def test_an_option_that_there_is_not_is_named_with_the_nearest(words, near):
    wrong = words.split()[-2] if words.endswith(" x") else words.replace("=", " ").split()[0]
    with pytest.raises(UserError) as caught:
        check_option_names(words.split(), ["seeds", "resume", "config"])
    assert str(caught.value) == f"command line: there is no option or setting '{wrong}'. Did you mean '{near}'?"


def test_an_option_like_no_other_leads_to_the_help():
    with pytest.raises(UserError, match=r"setting '--qqq'\. Run the command with --help to list options and set"):
        check_option_names(["--qqq"])
    check_option_names([*re.findall(r"^  (--\S+)", describe_settings(), re.MULTILINE), "-h", "--", "x", "-1"])


def test_an_override_of_an_unknown_name_suggests_the_nearest(tmp_path):
    name = next(iter(_tree()["tasks"]))
    message = _message(tmp_path, f"--tasks.{name}x.label", "clicked")
    assert f"has no 'tasks.{name}x'; did you mean '{name}'?" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model.experts.count", "16"], "'model.experts.count' is not a setting; write --section.key value"),
        (["--model.experts.count"], "'--model.experts.count' needs a value"),
        (["--a..b", "5"], "there is no option or setting '--a..b'"),
        (["--model..b", "5"], "there is no option or setting '--model..b'"),
        (["--training.epochs", "--training.seed", "5"], "'--training.epochs' needs a value"),
        (["--split.train_start", "2024-02-30"], "the value '2024-02-30' of '--split.train_start' is not valid YAML"),
        (["--model.experts.units", "[1"], "the value '[1' of '--model.experts.units' is not valid YAML"),
        (["--name.x", "1"], "'--name.x' is not a setting, because 'name' is a single value"),
    ],
)
def test_a_bad_override(tmp_path, arguments, message):
    with pytest.raises(UserError) as caught:
        _load(tmp_path, *arguments)
    assert message in str(caught.value)


# Unknown, missing and ill-typed keys

USER_ID = {"kind": "id", "column": "u"}
CROSS = {"kind": "cross", "columns": ["u", "c"], "buckets": 2**31 + 1}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("int", 1, "unknown key {}; valid are name, data, columns, roles, "),
        ("features.item.float", 1, "unknown key {}; valid are dim, column, min_count, "),
        ("modle", {}, "unknown key {}; did you mean 'model'?"),
        ("features.item.mincount", 3, "unknown key {}; did you mean 'min_count'?"),
        ("tasks.liked.observed_when.equal", 1, "unknown key {}; did you mean 'equals'?"),
        ("split", _DROPPED, "key {} is missing"),
        (
            "columns.user",
            _DROPPED,
            "feature 'last' needs columns.user, because it lists events of a user",
        ),
        (
            "columns.time",
            _DROPPED,
            "feature 'last' needs columns.time, because it reads events before ",
        ),
        ("split.train_end", _DROPPED, "'split': train_end is missing. Set the times, or set `column` for a table"),
        ("features.last.of", _DROPPED, "key {} is missing; `mmoe-rec settings` lists all keys"),
        (
            "features.item.kind",
            _DROPPED,
            "'features.item.kind' must be one of id, ids, numeric, vector, time, cross, m",
        ),
        ("features.last.task", _DROPPED, "'features.last': needs either `task`, for labels of the interaction log"),
        ("features", {}, "{}: section should have at least 1 item"),
        (
            "data.work_dir",
            "s3://b",
            "{} must be a local or mounted folder, found 's3://b'",
        ),
        ("split.train_end", "2024-03-01", "'split': train_end (2024-03-01 00:00) must be before valid"),
        ("features.x", CROSS, "'features.x.buckets' must be less than or equal to 2147483648"),
        ("features.x", {**USER_ID, "max_size": 2**31}, "'features.x.max_size' must be less than 2147483648"),
    ],
)
def test_an_unknown_missing_or_unfit_key(tmp_path, key, value, message):
    assert message.format(f"'{key}'") in _message(tmp_path, **{key: value})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model.experts.count", "many", "{} must be a whole number, found 'many'"),
        ("model.experts.count", -1, "{} must be greater than or equal to 0, found -1"),
        ("model.experts.units", 64, "{} must be a list, found 64"),
        ("model.experts.units", [64, 0], "'model.experts.units.1' must be greater than or equal to 1, found 0"),
        ("model", None, "{} must contain keys (bottom, experts, gates, towers, placement, trees)"),
        ("tasks", ["click"], "{} must contain keys (NAME)"),
        ("features", {1: {"kind": "id", "column": "c"}}, "'features.1' must be text"),
        ("training.device", "gpu", "{} must be 'auto', 'cpu' or 'cuda', found 'gpu'; did you mean 'cpu'?"),
        ("training.learning_rate", float("nan"), "{} must be a finite number, found nan"),
        ("training.learning_rate", True, "{} must be a number, found true"),
        ("data.skip_bad_files", "true", "{} must be true or false, found 'true'"),
        (
            "features.item.kind",
            "idd",
            "{} must be one of " + ", ".join(FEATURE_KINDS) + ", found 'idd'; did you mean 'id'?",
        ),
        ("features.user_brand.window_days", ["week"], "'features.user_brand.window_days.0' must be a number, f"),
        ("features.user_brand.window_days", [7, 7], "{} lists 7.0 twice"),
        ("tasks.liked.observed_when.equals", [1], "{} must be true or false, found [1]"),
        ("columns.user", 2024, "{} must be text, found 2024"),
        *(
            ("split.train_start", value, f"{{}} must be a time such as 2024-01-31 or 2024-01-31T18:00:00, {actual}")
            for value, actual in (
                (20240102, "found 20240102"),
                (True, "found true"),
                *((text, f"found '{text}'") for text in ("20240102", "2024-1-2", "2024-02-30")),
            )
        ),
    ],
)
def test_an_ill_typed_value_says_what_is_expected_and_found(tmp_path, key, value, message):
    assert message.format(f"'{key}'") in _message(tmp_path, **{key: value})


def test_numbers_of_yaml_are_those_that_people_write(tmp_path):
    path = tmp_path / "small.yaml"
    text = yaml.safe_dump(_tree(training={"learning_rate": 0.5}, features__item__max_size=100))
    path.write_text(text.replace("0.5", "1e-3").replace("100", "1_000"))
    settings = load_settings(path, ["--training.table_learning_rate", "5E-2", "--training.weight_decay=0"])
    training = settings.training
    assert (training.learning_rate, training.table_learning_rate, training.weight_decay) == (1e-3, 5e-2, 0.0)
    assert settings.features["item"].max_size == 1000
    for odd in ("017", "1:30"):  # fifteen and ninety in YAML 1.1
        assert f"must be a whole number, found '{odd}'" in _message(tmp_path, "--training.seed", odd)
    odd = ["1e-3", "017", "1:30", "1.5", "2024-01-02", "true", "null", "0x1f", "é: 1"]
    (tmp_path / "again.yaml").write_text(_load(tmp_path, roles__context=["store", *odd]).to_yaml(), encoding="utf-8")
    assert load_settings(tmp_path / "again.yaml").roles.context == ("store", *odd)


def test_a_table_has_as_many_rows_as_32_bit_ids_can_distinguish(tmp_path):
    _load(tmp_path, features__x={**CROSS, "buckets": 2**31}, features__y={**USER_ID, "max_size": 2**31 - 17})


def test_attention_has_its_bounds(tmp_path):
    history = {"kind": "history", "task": "click", "of": "item", "length": 512, "pooling": "attention"}
    features = {"item": {"kind": "id", "column": "c"}, "seen": history}
    assert _load(tmp_path, features=features).features["seen"].pooling == "attention"
    longer = features | {"seen": history | {"length": 513}}
    assert "attention looks at no more than 512 events: set `length` lower" in _message(tmp_path, features=longer)


def test_every_mistake_is_reported_at_once(tmp_path):
    message = _message(tmp_path, modle={}, name=5, tasks__click__kind="binry")
    assert "'modle'" in message
    assert "'name'" in message
    assert "did you mean 'binary'" in message


# Files


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1\nb: 2", "expected ',' or ']', but got ':' in \"<unicode string>\", line 2, column 2"),
        ("name: a\nname: b\n", "key 'name' is written twice in \"<unicode string>\", line 2, column 1"),
        ("a: 2024-02-30", "can't be read as YAML: day is out of range"),
        ("", "must contain keys such as name, data, columns, tasks, features, split"),
    ],
)
def test_a_file_that_is_no_settings_file(tmp_path, text, message):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(UserError, match=r"settings file '.*x\.yaml'") as caught:
        load_settings(tmp_path / "x.yaml")
    assert message in str(caught.value)


def test_yaml_merge_keys_work(tmp_path):
    text = yaml.safe_dump(SMALL)
    text = text.replace("  item:\n    column: c\n    kind: id\n", "  item: &id {column: c, kind: id}\n")
    text = text.replace("  user:\n    column: u\n    kind: id\n", "  user: {<<: *id, column: u}\n")
    (tmp_path / "x.yaml").write_text(text)
    assert load_settings(tmp_path / "x.yaml") == Settings.model_validate(SMALL)


def test_a_missing_file_a_folder_and_another_encoding(tmp_path):
    with pytest.raises(
        UserError, match=r"does not exist; mmoe-rec init writes one, or start from configs/template\.yaml"
    ):
        load_settings(tmp_path / "none.yaml")
    with pytest.raises(UserError, match=r"can't be read as YAML: .* Is a directory"):
        load_settings(tmp_path)
    (tmp_path / "x.yaml").write_bytes(b"name: \xe9\n")
    with pytest.raises(UserError, match="can't be read as YAML"):
        load_settings(tmp_path / "x.yaml")


def test_a_correction_needs_the_rate(tmp_path):
    correction = {"training__sampling_correction": "weights"}
    assert _load(tmp_path, **correction).training.sampling_correction == "weights"
    message = _message(tmp_path, columns__sampling_rate=_DROPPED, **correction)
    assert "training.sampling_correction needs a sampling rate: set columns.sampling_rate" in message


# Documentation


def _models(model: type[BaseModel], seen: list[type[BaseModel]]) -> list[type[BaseModel]]:
    """A settings model and all that its fields hold."""
    if model not in seen:
        seen.append(model)
        for field in model.model_fields.values():
            waiting = [field.annotation]
            while waiting:
                annotation = waiting.pop()
                if isinstance(annotation, type) and issubclass(annotation, BaseModel):
                    _models(annotation, seen)
                waiting += typing.get_args(annotation)
    return seen


def test_every_setting_is_documented():
    models = _models(Settings, [])
    assert CounterFeature in models
    text = describe_settings()
    for model in models:
        assert issubclass(model, Section)
        assert model.__doc__
        assert model is Settings or model.__doc__.strip() in text
        for name, field in model.model_fields.items():
            held = [item for item in models if item in (field.annotation, *typing.get_args(field.annotation))]
            names_kind = name == "kind" and field.is_required()
            if not held and name not in ("tasks", "features", "events") and not names_kind:
                assert field.description, (model, name)
                assert field.description in text, (model, name)
    assert "--model.experts.count  <whole number> (default: 8)" in text
    assert "--columns.time_unit  <s | ms | us | ns | null> (default: null)" in text
    assert "--features.NAME.window_days  <list of number | null> (default: [null])" in text


def test_the_template_mentions_every_key():
    tree = yaml.safe_load(Path("configs/template.yaml").read_text())

    def keys(value) -> set[str]:
        if isinstance(value, dict):
            return set(value).union(*map(keys, value.values()))
        return set()

    used = {kind: set() for kind in FEATURE_KINDS}
    for feature in tree["features"].values():
        used[feature["kind"]] |= set(feature)
    for model in _models(Settings, []):
        if "kind" in model.model_fields and model.model_fields["kind"].is_required():
            (kind,) = typing.get_args(model.model_fields["kind"].annotation)
            # `ids` takes the keys of `id`, as the template says.
            shared = used["id"] if kind == "ids" else set()
            assert set(model.model_fields) - used[kind] - shared == set(), kind
        else:
            assert set(model.model_fields) - keys(tree) == set(), model
    assert {task.get("kind") for task in tree["tasks"].values()} >= {"binary", "regression"}


def test_the_templates_defaults_are_the_defaults():
    """Sections that may be left out stand in the template with their defaults; trees are on."""
    template = load_settings("configs/template.yaml")
    assert template.model.trees == Trees()
    template = template.model_copy(update={"model": template.model.model_copy(update={"trees": None})})
    for section in ("model", "training", "evaluation", "serving", "tracking"):
        assert getattr(template, section) == type(getattr(template, section))(), section


@given(rows=st.integers(1, 10**10), epochs=st.integers(1, 20))
def test_an_automatic_batch_makes_about_a_thousand_steps(rows, epochs):
    sizes = [64, 128, 256, 512, 1024, 2048, 4096]
    nearest = min(sizes, key=lambda size: abs(math.log(rows * epochs / size / 1000)))
    actual = Training(epochs=epochs).resolve_batch_size(rows)
    assert math.isclose(*(abs(math.log(rows * epochs / size / 1000)) for size in (actual, nearest)), abs_tol=1e-9)
    assert Training(epochs=epochs, batch_size=700).resolve_batch_size(rows) == 700
    assert Training().resolve_batch_size(rows) == Training(epochs=2).resolve_batch_size(rows)


@pytest.mark.parametrize(("batch_size", "actual"), [(1, "1"), ("many", "'many'"), (True, "true"), (2.5, "2.5")])
def test_a_batch_is_auto_or_a_number_of_rows(tmp_path, batch_size, actual):
    sentence = f"'training.batch_size' must be auto, or a whole number of at least 2, found {actual}"
    assert _message(tmp_path, training__batch_size=batch_size) == sentence
