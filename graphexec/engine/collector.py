"""The collector: hands what a step reported to the requests that its slots had, and ends those that are done."""

from __future__ import annotations

import numpy as np

from graphexec.engine.logprobs import LogprobRows, take_prompt_logprobs
from graphexec.engine.program import DecoderProgram
from graphexec.engine.request import Request, RequestOutput
from graphexec.engine.scheduler import ScheduledStep, Scheduler
from graphexec.plan import FinishCode, StepResult

__all__ = ["Collector"]


class Collector:
    """Turns results into outputs. Tokens belong to the owners that the slots had when the step was submitted.

    Args:
        scheduler: learns who has ended.
        program: knows what the extra words of a record mean.
        live: the samples of each prompt that still run, by request id; those that end are taken out.
    """

    def __init__(self, scheduler: Scheduler, program: DecoderProgram, live: dict[str, list[Request]]) -> None:
        self._scheduler = scheduler
        self._program = program
        self._live = live

    def take(self, scheduled: ScheduledStep, result: StepResult, outputs: list[RequestOutput]) -> None:
        """Appends what the requests of a step get from it to `outputs`."""
        self._scheduler.missed(scheduled, result)
        ends = {slot: int(result.finish[slot]) for slot in np.flatnonzero(result.finish).tolist()}
        logprobs = self._take_logprobs(scheduled, result)
        ran = np.flatnonzero(result.num_tokens >= 0)
        counts, tokens = result.num_tokens[ran], result.tokens[ran]
        if ends or logprobs is not None or (counts != 1).any():
            for slot, count, new in zip(ran.tolist(), counts.tolist(), tokens.tolist(), strict=True):
                self._take_one(scheduled.owners[slot], new[:count], slot, ends.get(slot), logprobs, outputs)
            return
        # Nearly every step, and nearly every request in it: one token more. This loop is what the host costs.
        owners = scheduled.owners
        for slot, token in zip(ran.tolist(), tokens[:, 0].tolist(), strict=True):
            request = owners[slot]
            if request is None or request.finish_reason is not None or request.stop_strings is not None:
                self._take_one(request, [token], slot, None, None, outputs)
                continue
            known = request.output_token_ids
            begin = len(known)
            known.append(token)
            # Arguments by position: with names, making these objects takes half as long again.
            outputs.append(RequestOutput(request, begin, begin + 1, False))

    def _take_one(
        self,
        request: Request | None,
        new: list[int],
        slot: int,
        code: int | None,
        logprobs: LogprobRows | None,
        outputs: list[RequestOutput],
    ) -> None:
        """Gives a request its tokens of one step, and ends it where the device (`code`) or a stop string says so."""
        if request is None or request.finish_reason is not None:  # the host ended it while the step ran
            return
        known = request.output_token_ids
        begin = len(known)
        if new:
            known += new
            if logprobs is not None and request.params.logprobs is not None:
                request.logprobs.append(logprobs.of(slot, request.params.logprobs))
        found_stop = request.stop_strings is not None and self._found_stop(request, code)
        if code is not None and not found_stop:
            self._end(request, code)
        finished = request.finish_reason is not None
        if new or finished:
            outputs.append(RequestOutput(request, begin, len(known), finished))

    def _take_logprobs(self, scheduled: ScheduledStep, result: StepResult) -> LogprobRows | None:
        """Hands out the log-probabilities of prompts; returns those of output tokens."""
        if result.extra is None:
            return None
        if scheduled.prompt_chunks:
            rows = self._program.unpack_prompt_logprobs(result.extra)
            take_prompt_logprobs(rows, scheduled.prompt_chunks, scheduled.owners, result)
        return LogprobRows(self._program.unpack_logprobs(result.extra), result)

    def _found_stop(self, request: Request, code: int | None) -> bool:
        """Ends the request if its new tokens complete a stop string; those behind that are never delivered.

        `code` says how the device ended it, None if it did not. A stop token comes before the strings in its text.
        """
        if code == FinishCode.STOP:
            return False
        assert request.stop_strings is not None
        goes_on = code is None or code == FinishCode.PARKED
        match = request.stop_strings.find(request.output_token_ids, final=not goes_on)
        if match is None:
            return False
        del request.output_token_ids[match.tokens :]
        del request.logprobs[match.tokens :]
        request.finish_at_stop_string(match)
        if goes_on:
            self._scheduler.abort(request)  # the device does not know, and steps in flight still run it
        else:
            self._scheduler.retire(request)
        self._forget(request)
        return True

    def _end(self, request: Request, code: int) -> None:
        if code == FinishCode.PARKED:  # it goes on when its block arrives
            return
        if code == FinishCode.STOP:
            request.finish_at_stop_token()
        elif code == FinishCode.LENGTH:
            request.finish("length")
        else:
            request.finish("error", "The model's logits hold no number to choose a token from.")
        self._scheduler.retire(request)
        self._forget(request)

    def _forget(self, request: Request) -> None:
        samples = self._live[request.request_id]
        samples.remove(request)
        if not samples:
            del self._live[request.request_id]
