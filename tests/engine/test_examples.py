"""The example that is not a language model runs, on every backend and depth."""

from __future__ import annotations

import pytest

from examples.collatz import run


def orbit(number: int) -> list[int]:
    values = []
    while number != 1:
        number = number // 2 if number % 2 == 0 else 3 * number + 1
        values.append(number)
    return values


@pytest.mark.parametrize("backend", ["eager", "cudagraph"])
@pytest.mark.parametrize("depth", [0, 1, 4])
def test_a_state_machine_runs_on_the_same_api(backend: str, depth: int) -> None:
    assert run(range(1, 60), backend=backend, depth=depth) == {number: orbit(number) for number in range(1, 60)}
