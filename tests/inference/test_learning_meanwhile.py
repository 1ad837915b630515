"""A ranker that learns in one thread while others rank: each answer is that of one moment, and nothing is lost."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.inference import ranker as rankers
from mmoe_rec.inference.ranker import Ranker
from mmoe_rec.inference.reader import RequestReader
from mmoe_rec.inference.scorer import Scorer
from mmoe_rec.log.rows import Stored
from tests.inference.small_model import ITEMS, USER, SmallModel
from tests.inference.test_learning import TIMES, later_log

ASKED = {"user": {"user": USER}, "context": {"time": TIMES[1]}, "candidates": {"item": ITEMS}}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallModel:
    return SmallModel(tmp_path_factory.mktemp("small"))


def answer(ranker: Ranker) -> dict[str, Any]:
    return ranker.rank(**ASKED, explain=True).to_dict()


def meanwhile(function: Callable[[], object]) -> None:
    """Has another thread do something, and waits for it."""
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()


@pytest.mark.parametrize(
    ("part", "method"), [(RequestReader, "rows"), (FeaturePipeline, "request_inputs"), (Scorer, "score")]
)
def test_a_pass_that_is_under_way_answers_as_before(
    small: SmallModel, monkeypatch: pytest.MonkeyPatch, part: type, method: str
) -> None:
    """Whatever part of the pass comes before, and after, what another thread learns."""
    ranker, told = Ranker.load(small.folder), list[str]()
    before, real = answer(ranker), getattr(part, method)

    def learns_first(self: Any, *words: Any, **more: Any) -> Any:
        if not told:
            told.append("learnt")
            meanwhile(lambda: ranker.learn(later_log(3)))
        return real(self, *words, **more)

    def learns_then(self: Any, *words: Any, **more: Any) -> Any:
        found = real(self, *words, **more)
        if not told:
            told.append("learnt")
            meanwhile(lambda: ranker.learn(later_log(4)))
        return found

    for learns in (learns_first, learns_then):
        told.clear()
        monkeypatch.setattr(part, method, learns)
        assert answer(ranker) == before
        assert told == ["learnt"]
        monkeypatch.undo()
        now = answer(ranker)
        assert now["explanations"] != before["explanations"]
        assert now["scores"] != before["scores"]
        before = now


def test_rows_that_are_scored_in_parts_are_of_one_moment(small: SmallModel, monkeypatch: pytest.MonkeyPatch) -> None:
    ranker, (_, rows) = Ranker.load(small.folder), small.later_rows()
    monkeypatch.setattr(rankers, "ROWS_AT_A_TIME", 5)
    before, score, told = ranker.score(rows)[1], Scorer.score, list[str]()

    def learns(self: Scorer, *words: Any) -> Any:
        if not told:
            told.append("learnt")
            meanwhile(lambda: ranker.learn(later_log(3)))
        return score(self, *words)

    monkeypatch.setattr(Scorer, "score", learns)
    np.testing.assert_array_equal(ranker.score(rows)[1], before)
    assert (ranker.score(rows)[1] != before).any()


def test_threads_that_learn_at_once_lose_nothing(small: SmallModel, monkeypatch: pytest.MonkeyPatch) -> None:
    ranker, table = Ranker.load(small.folder), later_log(3)
    prepare, others = Ranker.prepare, list[threading.Thread]()

    def slow(self: Ranker, *words: Any) -> Any:
        found = prepare(self, *words)
        if not others:
            others.append(threading.Thread(target=lambda: ranker.learn(table.slice(60))))
            others[0].start()
            others[0].join(0.3)  # it can't go before, so it waits
        return found

    monkeypatch.setattr(Ranker, "prepare", slow)
    ranker.learn(table.slice(0, 60))
    others[0].join()
    monkeypatch.undo()
    assert ranker.live_rows == len(table)
    one_after_the_other = Ranker.load(small.folder)
    one_after_the_other.learn(table.slice(0, 60))
    one_after_the_other.learn(table.slice(60))
    assert answer(ranker) == answer(one_after_the_other)


def test_what_is_known_stays_with_who_asked(small: SmallModel) -> None:
    """Latest values are never changed in place, however many steps they come in."""
    ranker, table = Ranker.load(small.folder), later_log(3)
    items = {"item": table["item"].combine_chunks()}

    def brands(reader: RequestReader) -> list[Any]:
        found = reader.candidates.completed(items)["brand"]
        assert isinstance(found, Stored)
        return found.array().to_pylist()

    kept = []
    for start in range(0, len(table), 9):
        kept.append((ranker.reader, brands(ranker.reader)))
        ranker.learn(table.slice(start, 9))
    for reader, found in kept:
        assert brands(reader) == found
    assert len({str(found) for _, found in kept}) > len(kept) // 2
