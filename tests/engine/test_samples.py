"""Several samples of one prompt are as many requests with seeds of their own, under one id."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from graphexec import BackendConfig, Engine, EngineConfig, SamplingParams

PARAMS = SamplingParams(n=3, max_tokens=12, seed=11, temperature=1.5, ignore_eos=True, logprobs=1)


@pytest.fixture(scope="module", params=[0, 2])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    config = EngineConfig(
        model="tiny-random", device="cpu", dtype="float64", max_num_seqs=4, max_model_len=64,
        overlap_depth=request.param, backend=BackendConfig(verify=False),
    )  # fmt: skip
    with Engine(config) as engine:
        yield engine


def test_sample_i_is_what_its_seed_gives_alone(engine: Engine) -> None:
    first, other = engine.generate(["x = ", "y"], [PARAMS, SamplingParams(max_tokens=3, temperature=0)])
    assert [sample.index for sample in first.samples] == [0, 1, 2]
    assert len({sample.request_id for sample in first.samples}) == 1
    assert first.samples[0] is first
    assert other.samples == (other,)
    for index, sample in enumerate(first.samples):
        params = SamplingParams(max_tokens=12, seed=11 + index, temperature=1.5, ignore_eos=True, logprobs=1)
        (alone,) = engine.generate("x = ", params)
        assert sample.token_ids == alone.token_ids
        assert [entry.rank for entry in sample.logprobs or ()] == [entry.rank for entry in alone.logprobs or ()]
    assert len({tuple(sample.token_ids) for sample in first.samples}) == 3


def test_a_stream_of_several_samples_ends_with_the_last_of_them(engine: Engine) -> None:
    tokens: dict[int, list[int]] = {0: [], 1: [], 2: []}
    finished = set()
    for output in engine.stream("x = ", PARAMS):
        tokens[output.index] += output.new_token_ids
        finished |= {output.index} if output.finished else set()
    assert finished == {0, 1, 2}
    (together,) = engine.generate("x = ", PARAMS)
    assert [tokens[index] for index in range(3)] == [sample.token_ids for sample in together.samples]


def test_a_stream_whose_samples_end_one_by_one_goes_on_to_the_last(engine: Engine) -> None:
    params = SamplingParams(n=3, max_tokens=60, seed=5, temperature=3.0, stop_token_ids=range(100, 115))
    outputs = [output for output in engine.stream("x", params) if output.finished]
    assert sorted(output.index for output in outputs) == [0, 1, 2]
    assert len({len(output.token_ids) for output in outputs}) == 3


def test_an_abort_ends_every_sample_once(engine: Engine) -> None:
    request_id = engine.add_request("x = ", PARAMS)
    for _ in range(4):
        engine.step()
    engine.abort(request_id)
    ended = []
    while engine.has_unfinished():
        ended += [(output.index, output.finish_reason) for output in engine.step() if output.finished]
    assert sorted(ended) == [(index, "abort") for index in range(3)]


def test_a_refused_prompt_is_one_error_however_many_samples_it_wanted(engine: Engine) -> None:
    good, bad = engine.generate([[5], [-1]], PARAMS)
    assert len(good.samples) == 3
    assert (len(bad.samples), bad.finish_reason) == (1, "error")


def test_more_samples_than_slots_all_run(engine: Engine) -> None:
    (output,) = engine.generate("x", SamplingParams(n=9, max_tokens=5, seed=1, ignore_eos=True))
    assert [len(sample.token_ids) for sample in output.samples] == [5] * 9


def test_samples_without_a_seed_differ(engine: Engine) -> None:
    (output,) = engine.generate("x", SamplingParams(n=3, max_tokens=12, temperature=2.0, ignore_eos=True))
    assert len({tuple(sample.token_ids) for sample in output.samples}) == 3
