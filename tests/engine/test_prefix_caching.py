"""Prefix caching: what is computed only once, and that it is what each request would have computed itself.

Over a symbolic program, to which a KV entry of other tokens, or of none, is always another number.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphexec import Engine, SamplingParams
from graphexec.engine.scheduling.prefix_cache import Prefix, PrefixCache
from tests.support.symbolic_program import VOCABULARY, symbolic_engine, tokens_alone
from tests.support.traffic import Arrival, replay, shared_prompts, traffic

BLOCK = 8


def greedy(max_tokens: int, **others: object) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0, **others)


def run(engine: Engine, *prompts: list[int], max_tokens: int = 4) -> int:
    """Runs prompts at once, checks their tokens, and returns how many tokens the cache had."""
    before = engine.stats().prefix_cached_tokens
    expected = {engine.add_request(prompt, greedy(max_tokens)): tokens_alone(prompt, max_tokens) for prompt in prompts}
    assert finish(engine) == expected
    return engine.stats().prefix_cached_tokens - before


def finish(engine: Engine) -> dict[str, list[int]]:
    """Runs all requests to their end, and returns their tokens."""
    tokens = {}
    for _ in range(500):
        tokens |= {output.request_id: output.token_ids for output in engine.step()}
        if not engine.has_unfinished():
            return tokens
    raise AssertionError("the engine makes no progress")


def assert_none_lost(engine: Engine) -> None:
    """Whoever shared a block has given it back."""
    assert not engine.has_unfinished()
    assert engine._scheduler._allocator.free == engine.num_kv_blocks


@pytest.fixture
def engine() -> Iterator[Engine]:
    with symbolic_engine() as engine:
        yield engine
        assert_none_lost(engine)


@pytest.mark.parametrize("length", [1, 7, 8, 9, 15, 16, 17, 40])
def test_the_second_time_only_the_tail_of_a_prompt_is_computed(engine: Engine, length: int) -> None:
    prompt = list(range(length))
    assert run(engine, prompt, max_tokens=1) == 0
    assert run(engine, prompt, max_tokens=1) == (length - 1) // BLOCK * BLOCK


@pytest.mark.parametrize("common", [0, 7, 8, 9, 16, 23])
def test_two_prompts_share_the_whole_blocks_of_what_they_have_in_common(engine: Engine, common: int) -> None:
    run(engine, list(range(30)))
    assert run(engine, [*range(common), *range(50, 60)]) == common // BLOCK * BLOCK


def test_what_was_computed_behind_a_shared_prefix_is_found_behind_it_and_nowhere_else(engine: Engine) -> None:
    first, second, third, own = list(range(8)), list(range(8, 16)), list(range(16, 24)), [90]
    run(engine, first + own)
    assert run(engine, first + second + own) == BLOCK
    assert run(engine, first + second + third + own) == 2 * BLOCK
    assert run(engine, first + second + third + own) == 3 * BLOCK
    assert run(engine, third + own) == 0
    assert run(engine, second + own) == 0
    assert run(engine, first + third + own) == BLOCK


@pytest.mark.parametrize("outputs", [1, 2, 7, 8, 9, 20])
def test_a_conversation_goes_on_from_the_output_but_for_the_newest_token(engine: Engine, outputs: int) -> None:
    prompt = list(range(10))
    run(engine, prompt, max_tokens=outputs)
    turn = [*prompt, *tokens_alone(prompt, outputs), *range(60, 70)]
    assert run(engine, turn) == (10 + outputs - 1) // BLOCK * BLOCK  # the KV of the newest token was never written


def test_requests_that_are_admitted_in_one_step_share(engine: Engine) -> None:
    """Four prompts of 12 rows that are not shared need four steps of 16 rows; one of 12 and three of 4 need two."""
    prompt = list(range(12))
    assert run(engine, *[prompt] * 4, max_tokens=1) == 3 * BLOCK
    assert engine.stats().steps == 2


def test_a_prompt_of_which_only_the_last_token_is_computed_runs_as_a_decode_step(engine: Engine) -> None:
    prompt = list(range(17))
    run(engine, prompt)
    steps = engine.stats().steps
    assert run(engine, prompt, max_tokens=1) == 16
    assert engine.stats().steps == steps + 1


def test_with_the_switch_off_nothing_is_shared() -> None:
    with symbolic_engine(prefix_caching=False) as engine:
        for _ in range(2):
            assert run(engine, *[list(range(20))] * 2) == 0
        assert_none_lost(engine)


@pytest.mark.parametrize("depth", [0, 1, 2, 4])
def test_a_preempted_request_comes_back_from_the_cache(depth: int) -> None:
    """Two requests end with 8 blocks each, so of 20, they leave 4 to the third: its prompt, and output of its own."""
    prompts = [[*range(start, start + 20)] for start in (0, 30, 60)]
    with symbolic_engine(depth=depth, num_kv_blocks=20) as engine:
        assert run(engine, *prompts, max_tokens=40) == 4 * BLOCK
        assert engine.stats().preemptions == 1
        assert_none_lost(engine)


@pytest.mark.parametrize("depth", [0, 1, 2, 4])
@pytest.mark.parametrize("steps", range(1, 14))
def test_what_an_aborted_request_leaves_is_what_it_was_known_to_have_computed(depth: int, steps: int) -> None:
    """Steps in flight go on writing into its blocks, and the device may be a whole block ahead of the host."""
    prompt = list(range(21))
    with symbolic_engine(depth=depth, num_kv_blocks=8) as engine:
        request_id = engine.add_request(prompt, greedy(30))
        for _ in range(steps):
            engine.step()
        engine.abort(request_id)
        continued = [*prompt, *tokens_alone(prompt, 20)]
        (last,) = [output for output in engine.step() if output.finished]
        known = len(prompt) + len(last.token_ids)
        assert run(engine, continued) == (known - 1) // BLOCK * BLOCK
        run(engine, list(range(30, 90)))  # through every block
        run(engine, prompt)
        assert_none_lost(engine)


def test_a_waiting_request_is_not_looked_up_in_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = list(range(40))
    with symbolic_engine(num_kv_blocks=11) as engine:
        engine.add_request(prompt[:20], greedy(50))
        for _ in range(6):
            engine.step()
        lookups: list[int] = []
        find = PrefixCache.find

        def counted_find(self: PrefixCache, tokens: bytes, sound_only: bool = False) -> Prefix:
            lookups.append(engine.stats().steps)
            return find(self, tokens, sound_only)

        monkeypatch.setattr(PrefixCache, "find", counted_find)
        waiting = engine.add_request([*range(60, 80), *prompt], greedy(4))
        assert finish(engine)[waiting] == tokens_alone([*range(60, 80), *prompt], 4)
        assert engine.stats().steps > 40
        assert len(lookups) < 5


def test_admissions_that_share_more_blocks_than_a_delta_holds_take_several_steps() -> None:
    prompt = list(range(90)) * 5
    with symbolic_engine(max_num_seqs=40, max_model_len=500, max_num_batched_tokens=64, num_kv_blocks=400) as engine:
        run(engine, prompt, max_tokens=1)
        assert run(engine, *[prompt] * 40, max_tokens=2) == 40 * 448
        assert_none_lost(engine)


# depth, KV blocks (24 hold three long requests of eight, 12 little more than one)
@pytest.fixture(scope="module", params=[(0, 24), (1, 12), (1, 24), (1, 200), (2, 12), (4, 24)])
def busy(request: pytest.FixtureRequest) -> Iterator[Engine]:
    depth, blocks = request.param
    with symbolic_engine(depth=depth, num_kv_blocks=blocks) as engine:
        yield engine


def params_with_stops() -> st.SearchStrategy[SamplingParams]:
    stops = st.lists(st.integers(0, VOCABULARY - 1), max_size=8, unique=True)
    return st.builds(greedy, st.integers(1, 24), stop_token_ids=stops)


@settings(max_examples=20)
@given(arrivals=traffic(max_requests=12, prompts=shared_prompts(), params=params_with_stops()))
def test_caching_changes_no_token_and_loses_no_block(busy: Engine, arrivals: list[Arrival]) -> None:
    for arrival, outcome in zip(arrivals, replay(busy, arrivals), strict=True):
        expected = tokens_alone(arrival.prompt, arrival.params.max_tokens)
        stops = [index for index, token in enumerate(expected) if token in arrival.params.stop_token_ids]
        expected = expected[: stops[0] + 1] if stops else expected
        if outcome.finish_reason == "abort":
            expected = expected[: len(outcome.tokens)]
        assert list(outcome.tokens) == expected
    assert_none_lost(busy)
