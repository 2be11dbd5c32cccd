"""The collector: hands what a step reported to the requests that its slots had, and ends those that are done."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from graphexec.engine.generation import Generation, Live
from graphexec.engine.outputs.logprobs import LogprobRows, PromptChunk, PromptLogprobRows
from graphexec.engine.outputs.output import AnyOutput, RequestOutput
from graphexec.engine.program import DecoderProgram
from graphexec.engine.scheduling.scheduler import ScheduledStep, Scheduler
from graphexec.plan import FinishCode, StepResult

__all__ = ["Collector"]

_RUNNING = int(FinishCode.RUNNING)  # numpy takes its time over an enum


class Collector:
    """Turns results into outputs. Tokens belong to the owners that the slots had when the step was submitted.

    Args:
        scheduler: learns who has ended.
        program: knows what the extra words of a record mean.
        live: those that end are taken out.
    """

    def __init__(self, scheduler: Scheduler, program: DecoderProgram, live: Live) -> None:
        self._scheduler = scheduler
        self._program = program
        self._live = live

    def take(self, scheduled: ScheduledStep, result: StepResult, outputs: list[RequestOutput]) -> None:
        """Appends what the requests of a step get from it to `outputs`."""
        if scheduled.whole_prompts:
            self._scheduler.vouch(scheduled, result)
        owners, finish, num_tokens = scheduled.owners, result.finish, result.num_tokens
        logprobs = None if result.extra is None else self._take_logprobs(scheduled, result)
        # Nearly every request in nearly every step: one token more. This loop is what the host costs.
        is_plain, token_lists = self._scheduler.plain_slots(scheduled)
        is_plain &= (num_tokens == 1) & (finish == _RUNNING)
        slots = np.flatnonzero(is_plain)
        put = outputs.append
        for slot, token in zip(slots.tolist(), result.tokens[slots, 0].tolist(), strict=True):
            known = token_lists[slot]
            known.append(token)
            put(RequestOutput(owners[slot], len(known)))  # type: ignore[arg-type]  # a plain slot has an owner
        others = np.flatnonzero((num_tokens >= 0) & ~is_plain).tolist() if len(slots) < result.real_bsz else ()
        for slot in others:
            generation = owners[slot]
            if generation is not None and generation.finish_reason is None:  # else the host ended it meanwhile
                new = result.tokens[slot, : num_tokens[slot]].tolist()
                self._take_one(generation, new, slot, int(finish[slot]), logprobs, outputs)

    def _take_one(
        self,
        generation: Generation,
        new: list[int],
        slot: int,
        code: int,
        logprobs: LogprobRows | None,
        outputs: list[RequestOutput],
    ) -> None:
        """Gives a request its tokens of one step, and ends it where the device (`code`) or a stop string says so."""
        known, top = generation.token_ids, generation.request.params.logprobs
        begin = len(known)
        if new:
            known += new
            if logprobs is not None and top is not None:
                generation.logprobs.append(logprobs.of(slot, top))
        goes_on = code in (FinishCode.RUNNING, FinishCode.PARKED)  # parked: until its block arrives
        if code == FinishCode.NAN and self._scheduler.retire_at_nan(generation):
            return  # it is computed again
        try:
            _finish(generation, code, goes_on)
        except Exception as failure:  # a tokenizer raises what it likes, and only this request needs it
            generation.finish("error", f"The tokenizer cannot decode the output: {type(failure).__name__}: {failure}")
        finished = generation.finish_reason is not None
        if goes_on and finished:
            self._scheduler.abort(generation)  # the device does not know, and steps in flight still run it
        elif finished and code != FinishCode.NAN:
            self._scheduler.retire(generation)
        if finished:
            self._forget(generation)
        if new or finished:
            outputs.append(AnyOutput(generation, begin, len(known), finished))

    def _take_logprobs(self, scheduled: ScheduledStep, result: StepResult) -> LogprobRows:
        """Hands out the log-probabilities of prompts; returns those of output tokens."""
        assert result.extra is not None
        if scheduled.prompt_chunks:
            rows = PromptLogprobRows(
                self._program.unpack_prompt_logprobs(result.extra), scheduled.prompt_chunks, result
            )
            _take_prompt_logprobs(rows, scheduled.owners)
        return LogprobRows(self._program.unpack_logprobs(result.extra), result)

    def _forget(self, generation: Generation) -> None:
        request = generation.request
        samples = self._live[request.request_id]
        del samples[request.index]
        if not samples:
            del self._live[request.request_id]


def _finish(generation: Generation, code: int, goes_on: bool) -> None:
    """Ends a request where the device says so, or where its new tokens complete a stop string.

    Tokens behind a stop string are never delivered. A stop token comes before the strings in its text.
    """
    if code == FinishCode.NAN:
        generation.finish("error", "The model's logits hold no number to choose a token from.")
    elif code == FinishCode.STOP:
        generation.finish_at_stop_token()
    else:
        strings = generation.stop_strings
        match = None if strings is None else strings.find(generation.token_ids, final=not goes_on)
        if match is not None:
            generation.finish_at_stop_string(match)
        elif not goes_on:
            generation.finish("length")


def _take_prompt_logprobs(rows: PromptLogprobRows, owners: Sequence[Generation | None]) -> None:
    """Gives the owners the log-probabilities of the prompt tokens behind each row of their chunks."""
    for slot, chunk, first_row in rows.first_rows():
        generation = owners[slot]
        if generation is not None and generation.request.params.prompt_logprobs is not None:
            _take_chunk(rows, first_row, chunk, generation, generation.request.params.prompt_logprobs)


def _take_chunk(rows: PromptLogprobRows, first_row: int, chunk: PromptChunk, generation: Generation, top: int) -> None:
    prompt_len = len(generation.request.prompt_token_ids)
    found = generation.prompt_logprobs
    # After a preemption the prompt is computed again, to the same end.
    for position in range(max(chunk.begin, len(found) - 1), min(chunk.end, prompt_len - 1)):
        found.append(rows.of(first_row + position - chunk.begin, top))
