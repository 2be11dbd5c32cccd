"""Traffic for engine tests: staggered arrivals with stops, aborts and every kind of sampling; and who replays it."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import strategies as st

from graphexec import Engine, RequestOutput, SamplingParams
from graphexec.engine.outputs.logprobs import TokenLogprobs

__all__ = [
    "Arrival",
    "Outcome",
    "PlainLogprob",
    "any_params",
    "any_prompts",
    "replay",
    "shared_prompts",
    "traffic",
]

PlainLogprob = tuple[int, float, int]
"""Token, log-probability, rank."""

_VOCABULARY = 96
_tokens = st.integers(0, _VOCABULARY - 1)


@dataclass(frozen=True)
class Arrival:
    """One request: when it comes (in steps), what it asks, and after how many steps it is aborted, if at all."""

    at_step: int
    prompt: tuple[int, ...]
    params: SamplingParams
    abort_after: int | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of a request: its tokens, why it ended, and log-probabilities if asked for."""

    tokens: tuple[int, ...]
    finish_reason: str | None
    logprobs: tuple[PlainLogprob, ...] | None
    prompt_logprobs: tuple[PlainLogprob | None, ...] | None = None

    @classmethod
    def of(cls, output: RequestOutput) -> Outcome:
        logprobs, prompt_logprobs = output.logprobs, output.prompt_logprobs
        return cls(
            tuple(output.token_ids),
            output.finish_reason,
            None if logprobs is None else tuple(map(_plain, logprobs)),
            None if prompt_logprobs is None else (None, *map(_plain, prompt_logprobs[1:])),
        )


def _plain(entry: TokenLogprobs) -> PlainLogprob:
    return entry.token_id, entry.logprob, entry.rank


def any_params() -> st.SearchStrategy[SamplingParams]:
    """Every kind of sampling, with stops, and outputs of up to 24 tokens."""
    return st.builds(
        _build_params,
        max_tokens=st.integers(1, 24),
        min_tokens=st.integers(0, 6),
        temperature=st.sampled_from([0.0, 0.0, 0.7, 1.5]),
        top_k=st.sampled_from([0, 0, 1, 5, 40]),
        top_p=st.sampled_from([1.0, 1.0, 0.5, 0.95]),
        min_p=st.sampled_from([0.0, 0.0, 0.05, 0.4]),
        repetition_penalty=st.sampled_from([1.0, 1.0, 1.3, 0.8]),
        presence_penalty=st.sampled_from([0.0, 0.0, 0.9, -0.7]),
        frequency_penalty=st.sampled_from([0.0, 0.0, 0.6, -0.3]),
        logit_bias=st.just({}) | st.dictionaries(_tokens, st.floats(-9, 9), max_size=3),
        bad_token_ids=st.just([]) | st.lists(_tokens, max_size=3, unique=True),
        seed=st.integers(0, 2**63 - 1),
        # With several stop tokens of a vocabulary of 96, sequences end at every position.
        stop_token_ids=st.lists(_tokens, max_size=8, unique=True),
        # The first token of a pair is drawn as often as the output holds it.
        stop_sequences=st.lists(st.lists(_tokens, min_size=1, max_size=2), max_size=3),
        ignore_eos=st.booleans(),
        logprobs=st.sampled_from([None, None, 0, 3]),
        prompt_logprobs=st.sampled_from([None, None, None, 2]),
    )


def _build_params(max_tokens: int, min_tokens: int, **others: object) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, min_tokens=min(min_tokens, max_tokens), **others)


def any_prompts() -> st.SearchStrategy[tuple[int, ...]]:
    """1 to 40 tokens, so that some take several chunks of 16."""
    return st.lists(st.integers(2, _VOCABULARY - 1), min_size=1, max_size=40).map(tuple)


def shared_prompts() -> st.SearchStrategy[tuple[int, ...]]:
    """The beginnings of three texts, cut at and beside the ends of KV blocks of 8 tokens; then tokens of their own.

    Two texts begin alike, and the third with what stands in the middle of the first.
    """
    texts = st.sampled_from([tuple(range(10, 50)), (*range(10, 26), *range(60, 84)), tuple(range(18, 58))])
    lengths = st.sampled_from([1, 7, 8, 9, 15, 16, 17, 23, 24, 25, 40]) | st.integers(1, 40)
    own = st.lists(st.integers(2, _VOCABULARY - 1), max_size=9)
    return st.builds(lambda text, length, tail: (*text[:length], *tail), texts, lengths, own)


def traffic(
    max_requests: int = 8,
    prompts: st.SearchStrategy[tuple[int, ...]] | None = None,
    params: st.SearchStrategy[SamplingParams] | None = None,
) -> st.SearchStrategy[list[Arrival]]:
    """Up to `max_requests` requests; None for any prompts and any parameters."""
    arrival = st.builds(
        Arrival,
        at_step=st.integers(0, 20),
        prompt=any_prompts() if prompts is None else prompts,
        params=any_params() if params is None else params,
        abort_after=st.none() | st.none() | st.none() | st.integers(0, 12),
    )
    return st.lists(arrival, min_size=1, max_size=max_requests)


def replay(engine: Engine, arrivals: list[Arrival]) -> list[Outcome]:
    """Runs the traffic through `engine`, and checks on the way that outputs arrive once, in order and completely."""
    ids: dict[str, int] = {}
    delivered: dict[str, list[int]] = {}
    outcomes: dict[int, Outcome] = {}
    step = 0
    while len(outcomes) < len(arrivals):
        for index, arrival in enumerate(arrivals):
            if arrival.at_step == step:
                request_id = engine.add_request(list(arrival.prompt), arrival.params)
                ids[request_id] = index
                delivered[request_id] = []
        for request_id, index in ids.items():
            after = arrivals[index].abort_after
            if after is not None and arrivals[index].at_step + after == step:
                engine.abort(request_id)
        for output in engine.step():
            request_id = output.request_id
            assert ids[request_id] not in outcomes, "an output after the last one"
            delivered[request_id] += output.new_token_ids
            assert output.token_ids == delivered[request_id]
            if output.finished:
                outcomes[ids[request_id]] = Outcome.of(output)
        step += 1
        assert step < 5000, "the engine makes no progress"
    while engine.has_unfinished():
        assert engine.step() == []
    return [outcomes[index] for index in range(len(arrivals))]
