"""A request as the engine keeps it, and its output as the user sees it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from graphexec.engine.detokenizer import Detokenizer
from graphexec.engine.logprobs import TokenLogprobs
from graphexec.engine.params import SamplingParams
from graphexec.engine.stop_strings import StopMatch, StopStrings
from graphexec.kernels.sample import SamplerVariant

__all__ = ["FinishReason", "Request", "RequestOutput"]

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(eq=False, slots=True)
class Request:
    """State of one request. Owned by the engine's thread once it is queued; token lists only ever grow."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    stop_ids: tuple[int, ...]
    seed: int
    max_len: int
    detokenizer: Detokenizer | None
    stop_strings: StopStrings | None = None
    biases: tuple[tuple[int, float], ...] = ()
    index: int = 0
    """Which of the samples of its prompt."""
    output_token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=lambda: [None])
    finish_reason: FinishReason | None = None
    error: str | None = None
    slot: int | None = None
    blocks: list[int] = field(default_factory=list)
    computed: int = 0
    """Tokens that are cached, or whose computation was scheduled, while the prompt is being computed."""
    entered: int = 0
    """Blocks that the prefix cache knows, from the first on."""
    chain: int = 0
    """What the prefix cache calls the tokens in them."""
    samples: tuple[RequestOutput, ...] = ()
    """Last outputs of all samples of the prompt, in the first of them, once `generate` has them."""
    text_tokens: int | None = None
    """Output tokens whose text is shown, once a stop token or sequence has ended it; None for all."""
    text_length: int | None = None
    """Characters that are shown, once a stop string has ended it; None for all."""

    @property
    def variant(self) -> SamplerVariant:
        """The cheapest sampler that serves it."""
        params = self.params
        if params.logprobs is not None:
            return SamplerVariant.LOGPROBS
        if params.penalizes or self.biases:
            return SamplerVariant.SHAPED
        if params.temperature == 0:
            return SamplerVariant.GREEDY
        return SamplerVariant.SHAPED if params.top_k or params.top_p < 1 else SamplerVariant.SAMPLED

    @property
    def key(self) -> tuple[str, int]:
        """Tells it from every other request, and from the other samples of its prompt."""
        return self.request_id, self.index

    @property
    def reads_prefix_cache(self) -> bool:
        """Whether cached blocks may stand in for its first tokens.

        Not where the device must see the ids of all tokens, and not where logits of the prompt are asked for.
        """
        params = self.params
        return not (params.penalizes or params.stop_sequences or params.prompt_logprobs is not None)

    def wants_prompt_logprobs(self, begin: int) -> bool:
        """Whether a chunk that begins at that position reports log-probabilities that the user asked for."""
        return self.params.prompt_logprobs is not None and begin < len(self.prompt_token_ids) - 1

    @property
    def num_tokens(self) -> int:
        """Tokens known to the host: prompt and collected output."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    def tokens(self, begin: int, end: int) -> list[int]:
        """Tokens `begin` to `end - 1` of prompt and output."""
        prompt = len(self.prompt_token_ids)
        if end <= prompt:
            return list(self.prompt_token_ids[begin:end])
        return [*self.prompt_token_ids[begin:], *self.output_token_ids[max(begin - prompt, 0) : end - prompt]]

    def finish(self, reason: FinishReason, error: str | None = None) -> None:
        self.finish_reason = reason
        self.error = error

    def finish_at_stop_token(self) -> None:
        """Ends it by its last token: a stop token, or the last one of a stop sequence (the longest, of several)."""
        self.finish_reason = "stop"
        output = self.output_token_ids
        sequences = (tuple(sequence) for sequence in self.params.stop_sequences)
        hidden = [len(each) for each in sequences if tuple(output[-len(each) :]) == each]
        if output[-1] in self.stop_ids:
            hidden.append(1)
        self.text_tokens = len(output) - max(hidden)
        if self.stop_strings is not None:
            match = self.stop_strings.find(output[: self.text_tokens], final=True)
            self.text_length = None if match is None else match.begin

    def safe_tokens(self, end: int) -> int:
        """Of the first `end` output tokens, those that cannot become part of a stop sequence."""
        sequences = [tuple(sequence) for sequence in self.params.stop_sequences]
        longest = max(map(len, sequences), default=0)
        for count in range(min(longest - 1, end), 0, -1):
            tail = tuple(self.output_token_ids[end - count : end])
            if any(len(sequence) > count and sequence[:count] == tail for sequence in sequences):
                return end - count
        return end

    def finish_at_stop_string(self, match: StopMatch) -> None:
        """Ends it where a stop string was found."""
        self.finish_reason = "stop"
        self.text_length = match.begin


class RequestOutput:
    """What a request has produced up to one step. Cheap to make: everything is looked up when it is asked for."""

    __slots__ = ("_begin", "_end", "_request", "finished")

    def __init__(self, request: Request, begin: int, end: int, finished: bool) -> None:
        self._request = request
        self._begin = begin
        self._end = end
        self.finished = finished

    @classmethod
    def of_samples(cls, outputs: Sequence[RequestOutput]) -> RequestOutput:
        """The first of several samples of one prompt, which also holds them all."""
        first = outputs[0]
        first._request.samples = tuple(outputs)
        return first

    def __repr__(self) -> str:
        state = self.finish_reason or "running"
        error = f", error={self.error!r}" if self.error else ""
        return f"RequestOutput({self.request_id!r}, {state}, new_token_ids={self.new_token_ids}{error})"

    def joined(self, later: RequestOutput) -> RequestOutput:
        """One output in the place of this one and the `later` one of the same request."""
        return RequestOutput(self._request, self._begin, later._end, later.finished)

    @property
    def key(self) -> tuple[str, int]:
        """Request id and index."""
        return self._request.key

    @property
    def request_id(self) -> str:
        return self._request.request_id

    @property
    def index(self) -> int:
        """Which of the `n` samples of its prompt this is."""
        return self._request.index

    @property
    def samples(self) -> tuple[RequestOutput, ...]:
        """All samples of the prompt, in what `generate` returns; elsewhere this one alone."""
        return self._request.samples or (self,)

    @property
    def prompt_token_ids(self) -> list[int]:
        return list(self._request.prompt_token_ids)

    @property
    def token_ids(self) -> list[int]:
        """Output tokens so far, with the stop token."""
        return self._request.output_token_ids[: self._end]

    @property
    def new_token_ids(self) -> list[int]:
        """Output tokens since this request's last output."""
        return self._request.output_token_ids[self._begin : self._end]

    @property
    def text(self) -> str:
        """Text of the output so far, without what stopped it; empty if the model has no tokenizer.

        While the request runs, an incomplete character at the end is held back, and what may become a stop string or
        sequence: what was shown once stays.
        """
        request = self._request
        if request.detokenizer is None:
            return ""
        end = self._end
        if not self.finished:
            end = request.safe_tokens(end)
        elif request.text_tokens is not None:
            end = request.text_tokens
        text = request.detokenizer.text(request.output_token_ids, end, final=self.finished)
        if request.stop_strings is None:
            return text
        return text[: request.text_length if self.finished else request.stop_strings.safe_length(text)]

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the request ended; None while it runs."""
        return self._request.finish_reason if self.finished else None

    @property
    def logprobs(self) -> list[TokenLogprobs] | None:
        """One entry for each output token, or None if none were asked for."""
        return None if self._request.params.logprobs is None else self._request.logprobs[: self._end]

    @property
    def prompt_logprobs(self) -> list[TokenLogprobs | None] | None:
        """One entry for each prompt token, None for the first; None if none were asked for, or before any output."""
        asked = self._request.params.prompt_logprobs is not None and self._end > 0
        return list(self._request.prompt_logprobs) if asked else None

    @property
    def error(self) -> str | None:
        """What went wrong, for finish_reason "error"."""
        return self._request.error if self.finished else None
