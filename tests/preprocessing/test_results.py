"""Results that are sent in parts, by block of rows, come back to the rows they belong to; lists are sent once."""

import threading

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmoe_rec.features.vocabulary import Vocabulary
from mmoe_rec.log.parts import LogPart
from mmoe_rec.point_in_time.lists import Ragged, SharedRagged, consecutive
from mmoe_rec.preprocessing import results as module
from mmoe_rec.preprocessing.results import Blocks, ResultExchange, ResultReader


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    senders=st.integers(1, 3),
    lists=st.integers(1, 6),
    share=st.sampled_from([0.2, 0.7, 1.0]),
    seed=st.integers(0, 999),
)
def test_rows_get_their_answers(tmp_path_factory, sizes, senders, lists, share, seed):
    random = np.random.default_rng(seed)
    starts = np.cumsum([0, *sizes])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "ROWS_PER_BLOCK", 16)
        blocks = Blocks.of([LogPart(int(s), n, ()) for s, n in zip(starts, sizes, strict=False)])
    assert sum(blocks.size(block) for block in range(len(blocks))) == starts[-1]
    exchange = ResultExchange(tmp_path_factory.mktemp("answers"), blocks)
    numbers, owner = random.random(starts[-1]).astype(np.float32), random.integers(0, senders, starts[-1])
    lengths = random.integers(0, 4, lists).astype(np.int32)
    held = Ragged(random.integers(0, 100, lengths.sum()), lengths)
    of_row = np.sort(random.integers(0, lists, starts[-1]))  # neighbours share a list
    asked = random.random(starts[-1]) < share
    for sender in range(senders):
        rows = np.flatnonzero((owner == sender) & asked)
        found = {"number": numbers[rows], "list": SharedRagged(held, of_row[rows])}
        if len(rows):
            exchange.send("group", (sender, 0), rows, found)
    reader = ResultReader(exchange, ["group"])
    for start, rows in zip(starts, sizes, strict=False):
        wanted = asked[start : start + rows]
        if wanted.any():
            answers = reader.of(int(start), wanted)
            inside = start + np.flatnonzero(wanted)
            np.testing.assert_array_equal(answers["number"], numbers[inside])
            back, expected = answers["list"].expand(), held.take(of_row[inside])
            np.testing.assert_array_equal(back.lengths, expected.lengths)
            np.testing.assert_array_equal(back.values, expected.values)


def test_a_shared_list_is_sent_once_a_block(tmp_path):
    exchange = ResultExchange(tmp_path, Blocks(np.array([0, 50]), 100))
    rows = np.arange(100)
    exchange.send("group", (0, 0), rows, {"list": SharedRagged(Ragged(np.arange(7), np.array([7])), rows * 0)})
    for block in (0, 1):
        (table,) = exchange.exchange.receive("group", block)
        assert table["list"].to_pylist() == [list(range(7))] + [None] * 49


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 4)), max_size=20))
def test_consecutive_places_are_those_of_a_loop(lists):
    starts, lengths = (np.array([each[index] for each in lists], np.int64) for index in (0, 1))
    expected = [place for start, length in lists for place in range(start, start + length)]
    assert consecutive(starts, lengths).tolist() == expected


def test_threads_may_ask_a_vocabulary_at_once():
    known = pa.array(np.random.default_rng(0).permutation(300_000))
    expected = np.arange(300_000) + 2
    for _ in range(5):
        vocabulary, wrong, start = Vocabulary(known, 1), [], threading.Barrier(4)

        def ask(vocabulary=vocabulary, wrong=wrong, start=start) -> None:
            start.wait()
            wrong.append((vocabulary.encode(known) != expected).sum())

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == [0, 0, 0, 0]
