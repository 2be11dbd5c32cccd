"""A generation: what has come of a request so far. The engine's thread appends to it, and its consumer reads it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from graphexec.deltas import as_words
from graphexec.engine.outputs.logprobs import TokenLogprobs
from graphexec.engine.request import Request
from graphexec.engine.text.output_text import OutputText
from graphexec.engine.text.stop_strings import StopMatch, StopStrings

__all__ = ["FinishReason", "Generation", "Live"]

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(eq=False, slots=True)
class Generation:
    """The output of one request. Token lists only ever grow, until a stop string takes its own tokens off the end.

    Attributes:
        text: for the consumer; None for a model without tokenizer.
        stop_strings: for the engine, which searches by itself.
        token_ids: output tokens that were collected.
        prompt_logprobs: one entry for each prompt token that was computed, None for the first.
        text_tokens: output tokens whose text is shown, once a stop token or sequence has ended it; None for all.
        text_length: characters that are shown, once a stop string has ended it; None for all.
        is_plain: whether each token of it is just a token: it runs, and nothing is to be searched or reported beside.
    """

    request: Request
    text: OutputText | None = None
    stop_strings: StopStrings | None = None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=lambda: [None])
    finish_reason: FinishReason | None = None
    error: str | None = None
    text_tokens: int | None = None
    text_length: int | None = None
    is_plain: bool = field(init=False)

    def __post_init__(self) -> None:
        self.is_plain = self.stop_strings is None and self.request.params.logprobs is None

    @property
    def num_tokens(self) -> int:
        """Tokens known to the host: prompt and collected output."""
        return len(self.request.prompt_token_ids) + len(self.token_ids)

    def words(self) -> bytes:
        """All tokens known to the host as int32 words."""
        return self.request.prompt_words + as_words(self.token_ids) if self.token_ids else self.request.prompt_words

    def finish(self, reason: FinishReason, error: str | None = None) -> None:
        self.finish_reason = reason
        self.error = error
        self.is_plain = False

    def finish_at_stop_token(self) -> None:
        """Ends it by its last token: a stop token, or the last one of a stop sequence (the longest, of several)."""
        output = self.token_ids
        sequences = (tuple(sequence) for sequence in self.request.params.stop_sequences)
        hidden = [len(each) for each in sequences if tuple(output[-len(each) :]) == each]
        if output[-1] in self.request.stop_ids:
            hidden.append(1)
        self.text_tokens = len(output) - max(hidden)
        if self.stop_strings is not None:
            match = self.stop_strings.find(output[: self.text_tokens], final=True)
            self.text_length = None if match is None else match.begin
        self.finish("stop")

    def finish_at_stop_string(self, match: StopMatch) -> None:
        """Ends it where a stop string was found; the tokens behind those of the match are dropped."""
        del self.token_ids[match.tokens :]
        del self.logprobs[match.tokens :]
        self.text_length = match.begin
        self.finish("stop")


Live = dict[str, dict[int, Generation]]
"""The requests that have not ended, by request id and sample."""
