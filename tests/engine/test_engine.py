"""The engine's public behaviour: queueing, streaming, aborts, stops, statistics."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from graphexec import (
    BackendConfig,
    DeviceError,
    Engine,
    EngineConfig,
    GraphexecError,
    RequestError,
    RequestOutput,
    SamplingParams,
)
from tests.support.checkpoints import make_checkpoint

GREEDY = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("small") / "model")


@pytest.fixture
def engine(checkpoint: Path) -> Iterator[Engine]:
    config = EngineConfig(
        model=str(checkpoint), device="cpu", dtype="float64", max_num_seqs=3, max_model_len=64,
        backend=BackendConfig(verify=False),
    )  # fmt: skip
    with Engine(config) as engine:
        yield engine


def finish(engine: Engine) -> dict[str, RequestOutput]:
    last: dict[str, RequestOutput] = {}
    while engine.has_unfinished():
        last |= {output.request_id: output for output in engine.step()}
    return last


def test_more_requests_than_slots_are_queued(engine: Engine) -> None:
    outputs = engine.generate([[5 + index] for index in range(10)], GREEDY)
    assert [len(output.token_ids) for output in outputs] == [8] * 10
    assert {output.finish_reason for output in outputs} == {"length"}


def test_a_step_returns_nothing_while_the_first_one_runs(engine: Engine) -> None:
    engine.add_request([5, 6], GREEDY)
    assert engine.step() == []
    assert [len(output.new_token_ids) for output in engine.step()] == [1]


def test_an_engine_has_work_until_the_last_step_is_collected(engine: Engine) -> None:
    assert not engine.has_unfinished()
    request_id = engine.add_request([5], GREEDY)
    assert engine.has_unfinished()
    assert finish(engine)[request_id].finished
    assert not engine.has_unfinished()
    assert engine.step() == []


def test_streaming_yields_every_token_once(engine: Engine) -> None:
    pieces = list(engine.stream([5, 6, 7], GREEDY))
    tokens = [token for piece in pieces for token in piece.new_token_ids]
    assert tokens == pieces[-1].token_ids
    assert [piece.finished for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert tokens == engine.generate([5, 6, 7], GREEDY)[0].token_ids


def test_streaming_loses_no_output_of_other_requests(engine: Engine) -> None:
    other = engine.add_request([9, 10], GREEDY)
    streamed = list(engine.stream([5, 6, 7], GREEDY))
    assert streamed[-1].finished
    collected = [output for output in _outputs(engine) if output.request_id == other]
    assert [token for output in collected for token in output.new_token_ids] == collected[-1].token_ids
    assert len(collected[-1].token_ids) == 8


def _outputs(engine: Engine) -> Iterator[RequestOutput]:
    while engine.has_unfinished():
        yield from engine.step()


def test_a_stream_that_is_closed_early_aborts_its_request(engine: Engine) -> None:
    stream = engine.stream([5], SamplingParams(max_tokens=50, temperature=0, ignore_eos=True))
    next(stream)
    stream.close()
    assert finish(engine) == {}
    assert engine.stats().steps < 10
    with pytest.raises(StopIteration):
        next(stream)


def test_a_stream_that_is_closed_before_its_first_output_aborts_its_request(engine: Engine) -> None:
    engine.stream([5], SamplingParams(max_tokens=50, temperature=0, ignore_eos=True)).close()
    assert finish(engine) == {}
    assert engine.stats().steps < 5


def test_a_stream_refuses_a_bad_prompt_at_once(engine: Engine) -> None:
    with pytest.raises(RequestError, match="empty"):
        engine.stream([])


def test_an_interrupted_generate_leaves_no_request_behind(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter(range(100))
    real = engine._advance

    def interrupted() -> list[RequestOutput]:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return real()

    monkeypatch.setattr(engine, "_advance", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.generate([[5], [6]], SamplingParams(max_tokens=40, temperature=0, ignore_eos=True))
    assert finish(engine) == {}
    assert engine.stats().steps < 10
    assert [len(output.token_ids) for output in engine.generate([[5], [6]], GREEDY)] == [8, 8]


def test_streams_side_by_side_and_one_after_the_other_get_all_their_tokens(engine: Engine) -> None:
    prompts = [[5], [6, 7], [8]]
    expected = [output.token_ids for output in engine.generate(prompts, GREEDY)]
    first, second, third = (engine.stream(prompt, GREEDY) for prompt in prompts)
    assert [token for output in first for token in output.new_token_ids] == expected[0]
    assert [token for output in second for token in output.new_token_ids] == expected[1]
    while engine.has_unfinished():  # nobody else takes the outputs of the third
        assert engine.step() == []
    assert [token for output in third for token in output.new_token_ids] == expected[2]
    together: list[list[int]] = [[], []]
    for outputs in zip(engine.stream(prompts[0], GREEDY), engine.stream(prompts[1], GREEDY), strict=False):
        for tokens, output in zip(together, outputs, strict=True):
            tokens += output.new_token_ids
    assert together[0] == expected[0][: len(together[0])]
    assert len(together[1]) >= 1


def test_generate_within_a_stream_takes_nothing_from_it(engine: Engine) -> None:
    expected = engine.generate([[5]], GREEDY)[0].token_ids
    tokens: list[int] = []
    for output in engine.stream([5], GREEDY):
        tokens += output.new_token_ids
        assert len(engine.generate([[6]], GREEDY)[0].token_ids) == 8
    assert tokens == expected


def test_an_interrupt_in_the_middle_of_a_step_ends_the_engine_and_one_while_waiting_does_not(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = engine.generate([[5]], GREEDY)[0].token_ids
    request_id = engine.add_request([5], GREEDY)
    engine.step()
    waiting = engine._in_flight[0].handle
    real = type(waiting).result
    with monkeypatch.context() as patch:
        patch.setattr(type(waiting), "result", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    assert type(waiting).result is real
    assert finish(engine)[request_id].token_ids == expected
    engine.add_request([5], GREEDY)
    monkeypatch.setattr(engine._scheduler, "schedule", _interrupt)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    with pytest.raises(RequestError, match="has failed"):
        engine.add_request([5])
    (output,) = engine.step()
    assert output.finish_reason == "error"
    assert "interrupted in the middle of a step" in (output.error or "")
    assert not engine.has_unfinished()
    with pytest.raises(GraphexecError, match="interrupted in the middle of a step"):
        engine.step()


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_parameters_of_another_kind_are_refused(engine: Engine) -> None:
    with pytest.raises(RequestError, match="SamplingParams, not dict"):
        engine.add_request([5], {"max_tokens": 2})


def test_an_abort_drops_what_the_steps_in_flight_produce(engine: Engine) -> None:
    request_id = engine.add_request([5], GREEDY)
    other = engine.add_request([6], GREEDY)
    engine.step()
    engine.step()
    engine.abort(request_id)
    last = finish(engine)
    assert last[request_id].finish_reason == "abort"
    assert len(last[request_id].token_ids) == 1
    assert len(last[other].token_ids) == 8


def test_requests_that_wait_for_the_slots_of_aborted_ones_run(engine: Engine) -> None:
    victims = [engine.add_request([20 + index], GREEDY) for index in range(3)]
    engine.step()
    waiting = engine.add_request([8], GREEDY)
    for victim in victims:
        engine.abort(victim)
    last: dict[str, RequestOutput] = {}
    for _ in range(40):
        last |= {output.request_id: output for output in engine.step()}
    assert len(last[waiting].token_ids) == 8


def test_an_abort_before_the_first_step_and_of_an_unknown_request_are_harmless(engine: Engine) -> None:
    request_id = engine.add_request([5], GREEDY)
    engine.abort(request_id)
    engine.abort("nobody")
    (output,) = finish(engine).values()
    assert (output.finish_reason, output.token_ids) == ("abort", [])


def test_a_slot_whose_owner_was_aborted_serves_the_next_request(engine: Engine) -> None:
    expected = engine.generate([[8], [9], [10], [11]], GREEDY)
    victims = [engine.add_request([20 + index], GREEDY) for index in range(3)]
    engine.step()
    for victim in victims:
        engine.abort(victim)
    assert [output.token_ids for output in engine.generate([[8], [9], [10], [11]], GREEDY)] == [
        output.token_ids for output in expected
    ]


def test_the_stop_token_is_part_of_the_tokens(engine: Engine) -> None:
    (full,) = engine.generate([5, 6], GREEDY)
    stop = full.token_ids[3]
    (output,) = engine.generate(
        [5, 6], SamplingParams(max_tokens=8, temperature=0, stop_token_ids=[stop], ignore_eos=True)
    )
    assert output.finish_reason == "stop"
    assert output.token_ids == full.token_ids[: full.token_ids.index(stop) + 1]


def test_the_context_limit_ends_a_request(engine: Engine) -> None:
    (output,) = engine.generate([[5] * 60], SamplingParams(max_tokens=50, temperature=0, ignore_eos=True))
    assert output.finish_reason == "length"
    assert len(output.token_ids) == 4


def test_min_tokens_keeps_stop_tokens_from_being_chosen(engine: Engine) -> None:
    everything = list(range(2, 18))
    params = SamplingParams(max_tokens=6, min_tokens=4, temperature=0, stop_token_ids=everything[:15])
    (output,) = engine.generate([5], params)
    assert len(output.token_ids) >= 4
    assert not set(output.token_ids[:4]) & {1, *everything[:15]}


def test_requests_may_be_added_and_aborted_from_other_threads(engine: Engine) -> None:
    added: list[str] = []

    def submit() -> None:
        for index in range(20):
            added.append(engine.add_request([5 + index], GREEDY))
            if index % 5 == 0:
                engine.abort(added[-1])

    threads = [threading.Thread(target=submit) for _ in range(4)]
    for thread in threads:
        thread.start()
    last: dict[str, RequestOutput] = {}
    while any(thread.is_alive() for thread in threads) or engine.has_unfinished():
        last |= {output.request_id: output for output in engine.step()}
    assert set(last) == set(added)
    assert len(set(added)) == 80
    assert all(output.finished for output in last.values())


def test_statistics_account_for_every_step_and_slot(engine: Engine) -> None:
    engine.generate([[5], [6], [7], [8]], GREEDY)
    stats = engine.stats()
    assert stats.replays + sum(stats.eager_steps.values()) == stats.steps
    assert stats.real_slots == 4 * 8
    assert stats.predicted_slots >= stats.real_slots
    assert stats.host_us > 0
    assert stats.wait_us > 0


def test_a_failed_device_names_the_requests_and_stays_failed(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    request_id = engine.add_request([5], GREEDY)
    engine.step()

    def explode(key: object) -> None:
        raise RuntimeError("device on fire")

    monkeypatch.setattr(engine._program, "_forward", explode)
    last = finish(engine)
    assert last[request_id].finish_reason == "error"
    with pytest.raises(DeviceError, match=f"device on fire.*running or waiting: {request_id}"):
        engine.step()


def test_a_closed_engine_refuses_requests(checkpoint: Path) -> None:
    engine = Engine(EngineConfig(model=str(checkpoint), device="cpu", max_num_seqs=1, max_model_len=32))
    engine.close()
    engine.close()
    with pytest.raises(RequestError, match="closed"):
        engine.add_request([5])
