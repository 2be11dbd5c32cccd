"""A request as the engine keeps it, and its output as the user sees it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from graphexec.engine.detokenizer import Detokenizer
from graphexec.engine.logprobs import TokenLogprobs
from graphexec.engine.params import SamplingParams
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
    output_token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
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

    @property
    def variant(self) -> SamplerVariant:
        """The cheapest sampler that serves it."""
        if self.params.logprobs is not None:
            return SamplerVariant.LOGPROBS
        return SamplerVariant.GREEDY if self.params.temperature == 0 else SamplerVariant.SAMPLED

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


class RequestOutput:
    """What a request has produced up to one step. Cheap to make: everything is looked up when it is asked for."""

    __slots__ = ("_begin", "_end", "_request", "finished")

    def __init__(self, request: Request, begin: int, end: int, finished: bool) -> None:
        self._request = request
        self._begin = begin
        self._end = end
        self.finished = finished

    def __repr__(self) -> str:
        state = self.finish_reason or "running"
        error = f", error={self.error!r}" if self.error else ""
        return f"RequestOutput({self.request_id!r}, {state}, new_token_ids={self.new_token_ids}{error})"

    def joined(self, later: RequestOutput) -> RequestOutput:
        """One output in the place of this one and the `later` one of the same request."""
        return RequestOutput(self._request, self._begin, later._end, later.finished)

    @property
    def request_id(self) -> str:
        return self._request.request_id

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
        """Text of the output so far, without the stop token; empty if the model has no tokenizer.

        While the request runs, an incomplete character at the end is held back.
        """
        request = self._request
        if request.detokenizer is None:
            return ""
        stopped = self.finished and request.finish_reason == "stop"
        end = self._end - 1 if stopped else self._end
        return request.detokenizer.text(request.output_token_ids, end, final=self.finished)

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the request ended; None while it runs."""
        return self._request.finish_reason if self.finished else None

    @property
    def logprobs(self) -> list[TokenLogprobs] | None:
        """One entry for each output token, or None if none were asked for."""
        return None if self._request.params.logprobs is None else self._request.logprobs[: self._end]

    @property
    def error(self) -> str | None:
        """What went wrong, for finish_reason "error"."""
        return self._request.error if self.finished else None
