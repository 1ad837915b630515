"""`mmoe-rec init` on logs that it was not made for: no wrong guess without a mark, and what it writes can be used."""

import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmoe_rec.profiling import profile
from mmoe_rec.settings.load import load_settings
from mmoe_rec.settings.sections import Settings
from tests.commands import exit_code, read_metrics, refuse, run
from tests.profiling.held_out import LOGS
from tests.profiling.worlds import Answers, HeldOut, Label

WORKING = [name for name, make in LOGS.items() if not make(0).answers.refused]


def marked(text: str, name: str, within: str | None = None) -> bool:
    """Whether a line that names a column asks for a check, or the comments above it. within: a section of the settings.
    What is listed under `roles` has its marks where it is read."""
    word, section, above = re.compile(rf"(?<![\w-]){re.escape(name)}(?![\w-])"), "", ""
    for line in text.splitlines():
        section = line.partition(":")[0] if line[:1].isalpha() else section
        whole = above + line
        if (section == within if within else section != "roles") and "# check" in whole and word.search(whole):
            return True
        above = whole + "\n" if line.lstrip().startswith("#") else ""
    return False


def judge(text: str, settings: Settings, answers: Answers) -> Iterator[str]:
    """What is wrong without a mark, and every feature that tells a label."""
    yield from _judge_columns(text, settings, answers)
    yield from _judge_tasks(text, settings, answers)
    yield from _judge_roles(text, settings, answers)
    yield from _judge_kinds(text, settings, answers)
    for name in (*answers.leaks, *answers.outcomes):
        if readers := [feature for feature, columns in _reads(settings).items() if name in columns]:
            yield f"{', '.join(readers)}: {name} is known only afterwards"


def _judge_columns(text: str, settings: Settings, answers: Answers) -> Iterator[str]:
    tree = settings.model_dump(mode="json")
    for key in ("user", "candidate", "request", "time", "time_unit", "sampling_rate", "weight"):
        actual = tree["columns"].get(key) or "-"
        right = answers.columns.get(key, "-")
        asked = marked(text, key, "columns") or (len(right) > 2 and marked(text, right))
        if actual not in right.split("|") and not asked:
            yield f"columns.{key}: {actual}, not {right}"
    for path, right in answers.settings.items():
        values = [tree]
        for step in path.split("."):
            values = [value for first in values for value in (first.values() if step == "*" else [first.get(step)])]
        if values != [right] and not marked(text, step):
            yield f"{path}: {values}, not {right}"


def _judge_tasks(text: str, settings: Settings, answers: Answers) -> Iterator[str]:
    actual = {task.label: task for task in settings.tasks.values()}
    for label in actual.keys() - answers.tasks.keys() - set(answers.outcomes):
        if not marked(text, label):
            yield f"tasks: {label} is none"
    for label, right in answers.tasks.items():
        task = actual.get(label)
        if task is None:
            if not marked(text, label):
                yield f"tasks: {label} is missing"
            continue
        observed = None if task.observed_when is None else task.observed_when.column
        is_right = task.kind == right.kind and observed in right.observed
        is_right &= right.days[0] <= task.label_delay_days <= right.days[1]
        if not is_right and not marked(text, label):
            days = task.label_delay_days
            yield f"tasks.{label}: {task.kind}, observed by {observed}, after {days:g} days, not {right}"


def _reads(settings: Settings) -> dict[str, set[str]]:
    return {name: set(feature.reads()) for name, feature in settings.schema_.features.items()}


def _judge_roles(text: str, settings: Settings, answers: Answers) -> Iterator[str]:
    roles = settings.roles.model_dump()
    read = set().union(*_reads(settings).values())
    for column, right in ((column, right) for right, some in answers.roles.items() for column in some.split()):
        listed = {role for role, columns in roles.items() if column in columns}
        actual = "".join(listed) if column in read else ""
        if actual not in right.split("|") and not marked(text, column):
            yield f"roles: {column} {actual or 'is not read'}, not {right or 'none'}"


def _judge_kinds(text: str, settings: Settings, answers: Answers) -> Iterator[str]:
    for column, right in answers.kinds.items():
        of_one = set()
        for feature in settings.features.values():
            if getattr(feature, "column", None) == column:
                of_one |= {
                    feature.kind,
                    "id" if getattr(feature, "values", None) else feature.kind,
                }  # learnt values are ids
        if of_one and not of_one & set(right.split("|")) and not marked(text, column):
            yield f"features: {column} is {' and '.join(sorted(of_one))}, not {right}"


def init(folder: Path, held_out: HeldOut, *more: str) -> str:
    """The settings that `init` writes, to `folder`/settings.yaml."""
    words = held_out.write(folder)
    run("init", *words, "--out", folder / "settings.yaml", *more)
    return (folder / "settings.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", WORKING)
def test_no_guess_is_wrong_without_a_mark(name: str, tmp_path: Path) -> None:
    held_out = LOGS[name](0)
    text = init(tmp_path, held_out)
    wrong = list(judge(text, load_settings(tmp_path / "settings.yaml"), held_out.answers))
    assert not wrong, "\n".join([*wrong, text])


def test_scores_differ_where_every_label_is_unwanted(tmp_path: Path) -> None:
    init(tmp_path, LOGS["guests"](0))
    assert load_settings(tmp_path / "settings.yaml").tasks["is_canceled"].score_weight == 1


def test_the_weight_of_a_thing_is_not_that_of_its_rows(tmp_path: Path) -> None:
    init(tmp_path, LOGS["returns"](0))
    settings = load_settings(tmp_path / "settings.yaml")
    assert settings.columns.weight is None
    assert "weight" in settings.roles.candidate


def test_the_judge_finds_what_is_wrong(tmp_path: Path) -> None:
    held_out = LOGS["own_numbers"](0)
    text = init(tmp_path, held_out)
    settings, bare = load_settings(tmp_path / "settings.yaml"), text.replace("# check", "#")
    right = held_out.answers
    others = [
        Answers(right.columns | {"user": "list_no"}, {}, right.tasks),
        Answers(right.columns, {"candidate": "diet"}, right.tasks),
        Answers(right.columns, {}, {"cooked": Label("regression")}),
        Answers(right.columns, {}, {"cooked": Label(days=(20, 30))}),
        Answers(right.columns, {}, right.tasks | {"vegan": Label()}),
        Answers(right.columns, {}, right.tasks, kinds={"minutes": "vector"}),
        Answers(right.columns, {}, right.tasks, leaks=("minutes",)),
    ]
    for wrong, counted in zip(others, (1, 1, 1, 1, 1, 1, 1), strict=True):
        assert len(list(judge(bare, settings, wrong))) == counted, wrong


@pytest.mark.parametrize("name", [name for name in LOGS if name not in WORKING])
def test_what_cannot_be_known_is_said(name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    held_out = LOGS[name](0)
    code = exit_code("init", *held_out.write(tmp_path), "--out", tmp_path / "settings.yaml")
    said = re.sub(r"\S*/\S*", "", "".join(capsys.readouterr()))  # whatever folders are called
    (sentence,) = [
        line
        for line in said.splitlines()
        if line.startswith(("error: ", "warning: ")) and held_out.answers.refused in line
    ]
    assert (tmp_path / "settings.yaml").exists() == (code == 0), sentence


@pytest.mark.parametrize("name", ["terse_news", pytest.param("tienda", marks=pytest.mark.thorough)])
def test_files_row_groups_and_memory_change_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held_out = LOGS[name](0)
    monkeypatch.chdir(tmp_path)
    texts = []
    whole = pa.concat_tables(held_out.files.values())
    cuts = [0, 17, whole.num_rows // 3, whole.num_rows]
    parts = {f"{9 - n}.parquet": whole.slice(a, b - a) for n, (a, b) in enumerate(pairwise(cuts))}
    for turn, (files, group) in enumerate([(held_out.files, 1000), (held_out.files, 1000), (parts, 333)]):
        monkeypatch.chdir((folder := tmp_path / str(turn)).mkdir() or folder)
        if turn == 2:
            monkeypatch.setattr(profile, "MAX_ROWS_IN_MEMORY", 10)  # as of a log that is read again for each question
        run("init", *HeldOut(files, held_out.answers).write(Path(), group), "--out", "settings.yaml")
        texts.append((folder / "settings.yaml").read_text(encoding="utf-8"))
    assert texts[0] == texts[1] == texts[2]


@pytest.mark.thorough
@pytest.mark.parametrize("name", WORKING)
def test_what_is_written_makes_features(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    init(tmp_path, LOGS[name](0))
    run("features", "--config", "settings.yaml")


@pytest.mark.thorough
def test_what_is_written_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    init(tmp_path, held_out := LOGS["own_numbers"](0))
    run("train", "--config", "settings.yaml")
    run("evaluate", "--config", "settings.yaml", "--model", "settings_work/model", "--out", "measured")
    actual = read_metrics(tmp_path / "measured")["tasks"]["cooked"]["auc"]["value"]
    assert held_out.best is not None
    assert actual - 0.5 > 0.5 * (held_out.best - 0.5)  # of few rows


def _a_log(folder: Path) -> Path:
    LOGS["own_numbers"](0).write(folder)
    return folder / "log"


def test_bad_input_ends_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    log, out = _a_log(tmp_path), tmp_path / "settings.yaml"
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.csv").write_text("user,item\n1,2\n")
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "a.csv").write_text("user,item\n1,2\n")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "rowless").mkdir()
    pq.write_table(pq.read_table(log).slice(0, 0), tmp_path / "rowless" / "a.parquet")
    (tmp_path / "there.yaml").write_text("mine: 1\n")
    before = sorted(tmp_path.rglob("*"))
    for words, named in (
        ((tmp_path / "nowhere",), "nowhere"),
        ((tmp_path / "empty",), "empty"),
        ((tmp_path / "a.csv",), "a.csv"),
        ((tmp_path / "csv",), "csv"),
        ((tmp_path / "broken",), "a.parquet"),
        ((tmp_path / "rowless",), "row"),
        ((log, "--user", "customer"), "customer"),
        ((log, "--task", "sold"), "sold"),
        ((log, "--user", "member_no", "--candidate", "member_no"), "both name"),
        ((log, "--timezone", "Mars/X"), f"{out}: 'features.request_time.timezone'"),
        ((log, "--time", "status_at"), "status_at"),
        ((log, "--events", tmp_path / "empty"), "empty"),
        ((log, "--out", tmp_path / "there.yaml"), "there.yaml"),
        ((log, "--out", log / "x.yaml"), "log"),
        ((log, "--out", tmp_path / "a.csv" / "x.yaml"), "a.csv"),
    ):
        given = words if "--out" in words else (*words, "--out", out)
        assert named in refuse(capsys, "init", *given)
        assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "there.yaml").read_text() == "mine: 1\n"
