"""The ladder of captured sizes: a bound gets the smallest size that holds it, or none."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphexec.capture.buckets import BucketTable, default_ladder, row_ladder
from graphexec.errors import ConfigError


@given(sizes=st.sets(st.integers(1, 300), min_size=1), bound=st.integers(1, 320))
def test_a_bound_gets_the_smallest_size_that_holds_it(sizes: set[int], bound: int) -> None:
    holding = [size for size in sizes if size >= bound]
    assert BucketTable.of(list(sizes), 300).fit(bound) == min(holding, default=None)


@pytest.mark.parametrize("bound", [0, -1])
def test_an_empty_step_has_no_bucket(bound: int) -> None:
    with pytest.raises(ValueError, match="empty step"):
        BucketTable((1, 2)).fit(bound)


def test_sizes_are_sorted_whatever_order_they_come_in() -> None:
    assert BucketTable.of([8, 1, 4], 8).sizes == (1, 4, 8)


@pytest.mark.parametrize(
    ("sizes", "says"),
    [([], "capture_sizes is empty"), ([0, 4], r"\[0\]"), ([4, 9], r"\[9\].*between 1 and 8"), ([4, 2, 4], "twice")],
)
def test_impossible_sizes_are_refused_with_the_reason(sizes: list[int], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        BucketTable.of(sizes, 8)


def test_the_message_names_the_setting_that_is_wrong() -> None:
    with pytest.raises(ConfigError, match="prefill_sizes"):
        BucketTable.of([9], 8, "prefill_sizes")


@given(max_num_seqs=st.integers(1, 4096))
def test_the_default_ladder_serves_every_batch_and_wastes_little(max_num_seqs: int) -> None:
    table = BucketTable.of(default_ladder(max_num_seqs), max_num_seqs)
    assert table.sizes[-1] == max_num_seqs
    padding = [table.fit(bound) - bound for bound in range(1, max_num_seqs + 1)]
    assert max(padding[:256]) <= 7
    assert max(padding) <= 15


def test_the_default_ladder_begins_as_documented() -> None:
    assert default_ladder(40) == (1, 2, 4, 8, 16, 24, 32, 40)
    assert default_ladder(300)[-4:] == (256, 272, 288, 300)
    assert default_ladder(3) == (1, 2, 3)


@given(max_rows=st.integers(1, 20000))
def test_the_row_ladder_serves_every_chunk(max_rows: int) -> None:
    table = BucketTable.of(row_ladder(max_rows), max_rows, "prefill_sizes")
    assert table.sizes[-1] == max_rows
    for rows in {1, 15, 16, 17, 255, 257, 1023, 1025, max_rows} & set(range(1, max_rows + 1)):
        fit = table.fit(rows)
        assert rows <= fit <= rows + 255
        assert fit - rows <= max(15, rows // 4)
