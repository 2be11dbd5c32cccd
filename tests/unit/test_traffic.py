"""Histograms of traffic: counted on the step path, kept in a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from graphexec.capture.traffic import Traffic, TrafficCounter
from graphexec.errors import ConfigError


def test_steps_are_counted_by_their_size_and_those_with_chunks_coarsely() -> None:
    counter = TrafficCounter(max_slots=12, max_rows=100)
    for slots in (1, 3, 3):
        counter.count_decode(slots, rows=slots, launched_rows=8)
    for rows, slots in ((17, 1), (32, 8), (33, 9), (100, 12), (97, 12)):
        counter.count_chunks(slots, rows, launched_rows=rows + 5)
    # 112 rows and 16 slots would be more than the program has, and no graph's.
    assert counter.traffic() == Traffic({1: 1, 3: 2}, {(32, 8): 2, (48, 12): 1, (100, 12): 2})
    assert (counter.rows, counter.launched_rows) == (7 + 279, 3 * 8 + 279 + 5 * 5)


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    traffic = Traffic({1: 5, 12: 3}, {(32, 8): 2, (100, 12): 1})
    traffic.write(tmp_path / "traffic.json")
    assert Traffic.read(tmp_path / "traffic.json") == traffic
    assert traffic.steps == 11


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "Cannot read"),
        ("{", "no histogram of traffic"),
        ("[]", "no histogram of traffic"),
        ('{"decode": {"0": 1}, "chunks": []}', "0 where a number from 1 on belongs"),
        ('{"decode": {"1": -1}, "chunks": []}', "-1.0 where a number from 0 on belongs"),
        ('{"decode": {"1": NaN}, "chunks": []}', "nan where a number from 0 on belongs"),
        ('{"decode": {}, "chunks": [[1, 2]]}', "no histogram of traffic"),
        ('{"decode": {"1": 0}, "chunks": []}', "counts no step"),
    ],
)
def test_what_is_no_histogram_is_refused_by_name(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "other.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=f"{message}.*other.json|other.json.*{message}"):
        Traffic.read(path)


def test_traffic_that_nobody_knows_has_every_size_alike_and_as_many_steps_with_chunks_as_without() -> None:
    traffic = Traffic.uniform(max_slots=12, max_rows=40)
    assert set(traffic.decode) == set(range(1, 13))
    assert set(traffic.chunks) == {(16, 8), (16, 12), (32, 8), (32, 12), (40, 8), (40, 12)}
    assert sum(traffic.decode.values()) == pytest.approx(sum(traffic.chunks.values()))
