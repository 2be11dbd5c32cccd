"""An output: what the user sees of a request up to one step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, overload

from graphexec.engine.generation import FinishReason, Generation
from graphexec.engine.outputs.logprobs import TokenLogprobs

__all__ = ["AnyOutput", "RequestOutput", "TokenIds"]


class TokenIds(Sequence[int]):
    """The tokens of an output, unchangeable: a view, since a copy for each step would cost more than the step.

    Equal to any list or tuple of the same ids, and added to one a list; `list(token_ids)` where a list is needed, e.g.
    for JSON.
    """

    __slots__ = ("_output",)

    def __init__(self, output: RequestOutput) -> None:
        self._output = output

    def __len__(self) -> int:
        return self._output._end

    @overload
    def __getitem__(self, index: int) -> int: ...

    @overload
    def __getitem__(self, index: slice) -> list[int]: ...

    def __getitem__(self, index: int | slice) -> int | list[int]:
        if isinstance(index, slice):
            return self._list()[index]
        count = self._output._end
        if not -count <= index < count:
            raise IndexError(f"There are {count} tokens; index {index} is none of theirs.")
        return self._output._generation.token_ids[index if index >= 0 else count + index]

    def __iter__(self) -> Iterator[int]:
        return iter(self._list())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, (list, tuple, TokenIds)):
            return NotImplemented
        return len(other) == self._output._end and self._list() == list(other)

    def __add__(self, other: Iterable[int]) -> list[int]:
        return [*self, *other]

    def __radd__(self, other: Iterable[int]) -> list[int]:
        return [*other, *self]

    __hash__ = None  # type: ignore[assignment]  # like a list, to which it can be equal

    def __repr__(self) -> str:
        return repr(self._list())

    def _list(self) -> list[int]:
        return self._output._generation.token_ids[: self._output._end]


class RequestOutput:
    """What a request has produced up to one step. Cheap to make: everything is looked up when it is asked for.

    This class is what nearly every step gives nearly every request: one token more, and no end. AnyOutput is the rest.
    """

    __slots__ = ("_end", "_generation")

    finished = False
    """Whether it is the request's last one."""

    def __init__(self, generation: Generation, end: int) -> None:
        self._generation = generation
        self._end = end

    def _first_new(self) -> int:
        """Tokens that earlier outputs had."""
        return self._end - 1

    def __repr__(self) -> str:
        state = self.finish_reason or "running"
        error = f", error={self.error!r}" if self.error else ""
        return f"RequestOutput({self.request_id!r}, {state}, new_token_ids={self.new_token_ids}{error})"

    def joined(self, later: RequestOutput) -> RequestOutput:
        """One output in the place of this one and the `later` one of the same request."""
        return AnyOutput(self._generation, self._first_new(), later._end, later.finished)

    @property
    def key(self) -> tuple[str, int]:
        """Request id and index."""
        return self._generation.request.key

    @property
    def request_id(self) -> str:
        return self._generation.request.request_id

    @property
    def index(self) -> int:
        """Which of the `n` samples of its prompt this is."""
        return self._generation.request.index

    @property
    def samples(self) -> tuple[RequestOutput, ...]:
        """All samples of the prompt, in what `generate` returns; elsewhere this one alone."""
        return (self,)

    @property
    def prompt_token_ids(self) -> list[int]:
        return list(self._generation.request.prompt_token_ids)

    if TYPE_CHECKING:

        @property
        def token_ids(self) -> TokenIds: ...

    else:  # without a function between the two, which would take half as long again
        token_ids = property(TokenIds, doc="Output tokens so far, with the stop token; a view, which copies nothing.")

    @property
    def new_token_ids(self) -> list[int]:
        """Output tokens since this request's last output."""
        return self._generation.token_ids[self._first_new() : self._end]

    @property
    def text(self) -> str:
        """Text of the output so far, without what stopped it; empty if the model has no tokenizer.

        While the request runs, an incomplete character at the end is held back, and what may become a stop string or
        sequence: what was shown once stays. Each reading puts the whole text together: see `new_text`.
        """
        text = self._generation.text
        return "" if text is None else text.between(0, self._shown())

    @property
    def new_text(self) -> str:
        """Text since this request's last output; one after the other, they are `text`. Costs what is new of it."""
        text, token_ids = self._generation.text, self._generation.token_ids
        return "" if text is None else text.between(text.shown(token_ids, self._first_new()), self._shown())

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the request ended; None while it runs. "error" too where its text could not be decoded when read."""
        if not self.finished:
            return None
        return "error" if self._text_failure() else self._generation.finish_reason

    @property
    def logprobs(self) -> list[TokenLogprobs] | None:
        """One entry for each output token, or None if none were asked for."""
        generation = self._generation
        return None if generation.request.params.logprobs is None else generation.logprobs[: self._end]

    @property
    def prompt_logprobs(self) -> list[TokenLogprobs | None] | None:
        """One entry for each prompt token, None for the first; None if none were asked for, or before any output."""
        asked = self._generation.request.params.prompt_logprobs is not None and self._end > 0
        return list(self._generation.prompt_logprobs) if asked else None

    @property
    def error(self) -> str | None:
        """What went wrong, for finish_reason "error"."""
        return (self._generation.error or self._text_failure()) if self.finished else None

    def _shown(self) -> int:
        """Characters of the output's text that are shown."""
        generation, end = self._generation, self._end
        assert generation.text is not None
        if not self.finished:
            return generation.text.shown(generation.token_ids, end)
        if generation.text_tokens is not None:
            end = generation.text_tokens
        return generation.text.shown_at_end(generation.token_ids, end, generation.text_length)

    def _text_failure(self) -> str | None:
        return None if self._generation.text is None else self._generation.text.failure


class AnyOutput(RequestOutput):
    """An output of any number of tokens, which may be the last."""

    __slots__ = ("_begin", "_samples", "finished")

    def __init__(self, generation: Generation, begin: int, end: int, finished: bool) -> None:
        super().__init__(generation, end)
        self._begin = begin
        self.finished = finished
        self._samples: tuple[RequestOutput, ...] = ()

    @classmethod
    def last_of(cls, generation: Generation) -> AnyOutput:
        """The output that says no more than how a request has ended."""
        end = len(generation.token_ids)
        return cls(generation, end, end, True)

    @classmethod
    def of_samples(cls, outputs: Sequence[RequestOutput]) -> AnyOutput:
        """The last output of the first of several samples of one prompt, which also holds those of all."""
        first = outputs[0]
        assert isinstance(first, AnyOutput), "only the last output of a request has samples"
        first._samples = tuple(outputs)
        return first

    def _first_new(self) -> int:
        return self._begin

    @property
    def samples(self) -> tuple[RequestOutput, ...]:
        return self._samples or (self,)
