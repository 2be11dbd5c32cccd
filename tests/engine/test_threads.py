"""One engine in many threads: everybody gets what is theirs, whole and in order; nothing is used after it is freed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from graphexec import Engine, GraphexecError, GraphKey, RequestError, SamplingParams, StepPlan
from graphexec.runtime import CpuRuntime, Event
from graphexec.runtime.cpu import CpuEvent, CpuStream
from tests.support.symbolic_program import symbolic_engine, tokens_alone

THREADS = 4


@pytest.fixture(params=[0, 1, 3])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    with symbolic_engine(depth=request.param) as engine:
        yield engine


def params(tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)


def streamed(engine: Engine, number: int) -> list[int]:
    """Tokens of a stream, whose pieces are checked to follow each other."""
    tokens: list[int] = []
    for output in engine.stream([number % 90, number % 7], params(3 + number % 5)):
        tokens += output.new_token_ids
        assert output.token_ids == tokens, "a piece was lost, doubled or out of order"
    return tokens


def generated(engine: Engine, number: int) -> list[int]:
    first, second = engine.generate([[number % 90, number % 7], [3]], params(3 + number % 5))
    assert second.token_ids == tokens_alone([3], 3 + number % 5)
    return list(first.token_ids)


@pytest.mark.parametrize("ask", [streamed, generated])
def test_streams_and_generations_in_several_threads_get_their_own_tokens(
    engine: Engine, ask: Callable[[Engine, int], list[int]]
) -> None:
    numbers = range(80)
    with ThreadPoolExecutor(THREADS) as pool:
        outcomes = list(pool.map(lambda number: ask(engine, number), numbers))
    for number, tokens in zip(numbers, outcomes, strict=True):
        assert tokens == tokens_alone([number % 90, number % 7], 3 + number % 5)
    assert not engine.has_unfinished()
    assert engine._readers == {}


def test_a_loop_of_steps_beside_streams_gets_the_requests_that_were_added_and_no_other(engine: Engine) -> None:
    stop = threading.Event()
    received: dict[str, list[int]] = {}

    def loop() -> None:
        while not stop.is_set() or engine.has_unfinished():
            for output in engine.step():
                received.setdefault(output.request_id, []).extend(output.new_token_ids)

    stepping = threading.Thread(target=loop)
    stepping.start()
    with ThreadPoolExecutor(THREADS) as pool:
        streams = pool.map(lambda number: streamed(engine, number), range(60))
        added = {engine.add_request([index], params(4)): tokens_alone([index], 4) for index in range(40)}
        outcomes = list(streams)
    stop.set()
    stepping.join(30)
    assert outcomes == [tokens_alone([number % 90, number % 7], 3 + number % 5) for number in range(60)]
    assert received == added


def test_closing_an_engine_ends_the_streams_of_other_threads_with_an_error(engine: Engine) -> None:
    begun = threading.Barrier(THREADS + 1)
    errors: list[str] = []

    def read() -> None:
        stream = engine.stream([5], params(70))
        next(stream)
        begun.wait(10)
        try:
            for _ in stream:
                pass
        except GraphexecError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=read) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    begun.wait(10)
    engine.close()
    for thread in threads:
        thread.join(10)
    assert not any(thread.is_alive() for thread in threads)
    assert set(errors) <= {"The engine is closed."}
    with pytest.raises(RequestError, match="closed"):
        engine.add_request([5])


class _StrictRuntime(CpuRuntime):
    """Notes where CUDA would use what was destroyed: an error would only fail the engine, and be forgotten."""

    def __init__(self) -> None:
        super().__init__()
        self.used_after_free: list[str] = []

    def event(self) -> CpuEvent:
        return _StrictEvent(self.used_after_free)

    def stream(self, name: str) -> CpuStream:
        return _StrictStream(name, self)


class _StrictEvent(CpuEvent):
    def __init__(self, used_after_free: list[str]) -> None:
        super().__init__()
        self._closed = False
        self._used_after_free = used_after_free

    def check(self, use: str) -> None:
        if self._closed:
            self._used_after_free.append(use)

    def query(self) -> bool:
        self.check("queried")
        return super().query()

    def wait(self, timeout_s: float) -> bool:
        self.check("waited for by the host")
        return super().wait(timeout_s)

    def close(self) -> None:
        self._closed = True


class _StrictStream(CpuStream):
    def record(self, event: Event) -> None:
        if isinstance(event, _StrictEvent):
            event.check("recorded")
        super().record(event)

    def wait(self, event: Event) -> None:
        if isinstance(event, _StrictEvent):
            event.check("waited for by a stream")
        super().wait(event)


@pytest.mark.parametrize("attempt", range(6))
def test_closing_while_another_thread_steps_uses_nothing_that_was_freed(
    monkeypatch: pytest.MonkeyPatch, attempt: int
) -> None:
    runtime = _StrictRuntime()
    engine = symbolic_engine(depth=2, runtime=runtime)
    launcher = engine._backend._launcher
    choose = launcher.step

    def choose_slowly(key: GraphKey, plan: StepPlan) -> Callable[[], None]:
        """In the middle of a submit, before its events are recorded."""
        time.sleep(0.004)
        return choose(key, plan)

    monkeypatch.setattr(launcher, "step", choose_slowly)
    for number in range(4):
        engine.add_request([number], params(70))
    ended: list[BaseException] = []

    def loop() -> None:
        try:
            while True:
                engine.step()
        except BaseException as error:
            ended.append(error)

    stepping = threading.Thread(target=loop)
    stepping.start()
    time.sleep(0.01 + 0.002 * attempt)
    engine.close()
    stepping.join(10)
    assert not stepping.is_alive()
    assert [str(error) for error in ended] == ["The engine is closed."]
    assert runtime.used_after_free == []


def test_a_stream_that_is_dropped_in_the_middle_of_a_step_does_not_wait_for_that_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The garbage collector may close it in any thread, that one included which holds the engine's lock."""
    with symbolic_engine() as engine:
        dropped = engine.stream([5], params(70))
        schedule = engine._scheduler.schedule

        def drop_and_schedule(step: int, collected: int) -> object:
            dropped.close()
            return schedule(step, collected)

        monkeypatch.setattr(engine._scheduler, "schedule", drop_and_schedule)
        assert streamed(engine, 3) == tokens_alone([3, 3], 6)
        assert list(dropped) == []
        while engine.has_unfinished():
            assert engine.step() == []
        assert engine._readers == {}
