"""The engine: takes prompts, keeps the device `overlap_depth` steps ahead of itself, and gives tokens back."""

from __future__ import annotations

import itertools
import operator
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np

from graphexec.backends import BackendStats, Progress
from graphexec.capture.manifest import Manifest
from graphexec.config import EngineConfig
from graphexec.engine.assemble import Assembly, assemble
from graphexec.engine.blocks import BlockAllocator
from graphexec.engine.detokenizer import Detokenizer
from graphexec.engine.params import SamplingParams
from graphexec.engine.request import Request, RequestOutput, TokenLogprobs
from graphexec.engine.scheduler import ScheduledStep, Scheduler
from graphexec.errors import DeviceError, GraphexecError, RequestError
from graphexec.plan import FinishCode, FloatArray, Int32Array, StepHandle, StepResult

__all__ = ["Engine", "EngineStats"]

Prompt = str | Sequence[int]


@dataclass(frozen=True)
class EngineStats:
    """Counts since the start.

    Attributes:
        steps: steps submitted.
        replays: of them, those that ran as a captured graph.
        eager_steps: of them, those that did not, by reason.
        padding_rows: launched slots that were padding, summed over the steps.
        predicted_slots: sum of the bounds that steps were launched with.
        real_slots: sum of the slots that really ran.
        preemptions: requests sent back to the queue for want of KV blocks.
        host_us: time that the step loop computed, microseconds, waits excluded.
        wait_us: time that it waited for the device, microseconds.
    """

    steps: int
    replays: int
    eager_steps: dict[str, int]
    padding_rows: int
    predicted_slots: int
    real_slots: int
    preemptions: int
    host_us: float
    wait_us: float


class _InFlight(NamedTuple):
    """A submitted step with the mapping that was true when it was submitted: slots may change hands before it ends."""

    handle: StepHandle
    scheduled: ScheduledStep


class Engine:
    """Serves a decoder model. One thread owns `step`; `add_request` and `abort` may be called from any.

    Args:
        config: what to serve and how.
        progress: called while graphs are captured.
        parts: an engine put together by hand, e.g. around a program or a backend of one's own; None to assemble it.

    Raises:
        ConfigError: the configuration, the checkpoint or the machine does not allow it.
        CaptureError: a step cannot be captured.
    """

    def __init__(self, config: EngineConfig, progress: Progress | None = None, parts: Assembly | None = None) -> None:
        self.config = config
        parts = parts or assemble(config, progress)
        self.resolved = parts.resolved
        self.manifest: Manifest = parts.manifest
        self.num_kv_blocks = parts.num_blocks - 1
        self.tokenizer = parts.tokenizer
        self._backend = parts.backend
        self._program = parts.program
        self._eos_token_ids = parts.eos_token_ids
        self._limits = parts.limits
        self._vocab_size = parts.vocab_size
        self._depth = config.backend.overlap_depth
        self._scheduler = Scheduler(
            parts.limits, BlockAllocator(parts.num_blocks), self.resolved.max_num_batched_tokens, self._depth + 1
        )
        self._ids = itertools.count()
        self._live: dict[str, Request] = {}
        self._arrivals: deque[Request] = deque()
        self._aborts: deque[str] = deque()
        self._in_flight: deque[_InFlight] = deque()
        self._undelivered: list[RequestOutput] = []
        self._stepping = threading.Lock()
        self._submitted = 0
        self._collected = -1
        self._after_mixed = False
        self._host_s = 0.0
        self._failure: GraphexecError | None = None
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def add_request(self, prompt: Prompt, params: SamplingParams | None = None) -> str:
        """Queues a request and returns its id. May be called from any thread.

        Args:
            prompt: text, or token ids.
            params: how to sample it; None for the defaults.

        Raises:
            RequestError: the prompt or its parameters do not fit the model or the engine. Nothing was queued.
        """
        if self._closed:
            raise RequestError("The engine is closed.")
        request = self._make_request(prompt, params or SamplingParams())
        self._live[request.request_id] = request
        self._arrivals.append(request)
        return request.request_id

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The prompt, as token ids, that the model's chat template makes of a conversation.

        Args:
            messages: turns with the keys "role" and "content", the oldest first.

        Raises:
            RequestError: the model has no chat template, or it refuses the conversation.
        """
        if self.tokenizer is None or not getattr(self.tokenizer, "chat_template", None):
            raise RequestError("The model has no chat template.")
        try:
            text = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except Exception as failure:  # a template is a program of the checkpoint's, and raises what it likes
            raise RequestError(f"The model's chat template refuses the conversation: {failure}") from failure
        return self.tokenizer.encode(text, add_special_tokens=False)

    def abort(self, request_id: str) -> None:
        """Ends a request; its last output, with finish_reason "abort", comes from the next step. From any thread.

        An id that is unknown or has finished is ignored, since a request may end while the caller decides.
        """
        self._aborts.append(request_id)

    def has_unfinished(self) -> bool:
        """Whether `step` has anything to do: true until the last step is collected and its outputs are returned."""
        return bool(self._live or self._in_flight or self._undelivered)

    def step(self) -> list[RequestOutput]:
        """Submits one step and collects the one `overlap_depth` before it. May return nothing while the first runs.

        Raises:
            DeviceError, StepTimeout, BucketOverflowError: the engine cannot go on; the message lists its requests.
        """
        with self._stepping:
            started, waited = time.perf_counter(), self._waited_us()
            try:
                return self._step()
            except GraphexecError as failure:
                raise self._fail(failure) from failure
            finally:
                self._host_s += time.perf_counter() - started - (self._waited_us() - waited) / 1e6

    def _step(self) -> list[RequestOutput]:
        self._raise_if_failed()
        outputs, self._undelivered = self._undelivered, []
        self._take_requests(outputs)
        self._drain_if_needed(outputs)
        scheduled = self._scheduler.schedule(self._submitted, self._collected)
        if scheduled is not None:
            self._submit(scheduled)
        ahead = self._depth if scheduled is not None else 0  # nothing to run: flush the last steps at once
        while len(self._in_flight) > ahead:
            self._collect(outputs)
        return outputs

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[RequestOutput]:
        """Runs prompts to their end and returns their last outputs in order.

        Args:
            prompts: one prompt or several; each is text or a list of token ids.
            params: one for all, or one for each.

        A prompt that is refused gets an output with finish_reason "error"; the others run.
        """
        batch = _as_batch(prompts)
        if isinstance(params, SamplingParams) or params is None:
            params = [params or SamplingParams()] * len(batch)
        if len(params) != len(batch):
            raise RequestError(f"There are {len(batch)} prompts and {len(params)} sampling parameters.")
        results: dict[str, RequestOutput] = {}
        ids = [self._add_or_refuse(prompt, each, results) for prompt, each in zip(batch, params, strict=True)]
        wanted = set(ids)
        others: list[RequestOutput] = []
        while len(results) < len(wanted):
            for output in self.step():
                if output.request_id not in wanted:
                    others.append(output)
                elif output.finished:
                    results[output.request_id] = output
        self._undelivered = others + self._undelivered
        return [results[request_id] for request_id in ids]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[RequestOutput]:
        """Yields the outputs of one request as they come; closing the iterator early aborts it.

        Outputs of other requests that run meanwhile are kept for the next `step`.
        """
        request_id = self.add_request(prompt, params)
        finished = False
        try:
            while not finished:
                mine: list[RequestOutput] = []
                others: list[RequestOutput] = []
                for output in self.step():
                    (mine if output.request_id == request_id else others).append(output)
                self._undelivered = others + self._undelivered
                for output in mine:
                    finished = output.finished
                    yield output
        finally:
            if not finished:
                self.abort(request_id)

    def stats(self) -> EngineStats:
        """Counts since the start; never touches the device."""
        backend: BackendStats = self._backend.stats()
        controller = backend.controller
        return EngineStats(
            steps=self._submitted,
            replays=backend.replays,
            eager_steps=controller.eager_steps,
            padding_rows=controller.padding_slots,
            predicted_slots=controller.predicted_slots,
            real_slots=controller.real_slots,
            preemptions=self._scheduler.preemptions,
            host_us=self._host_s * 1e6,
            wait_us=backend.wait_us,
        )

    def close(self) -> None:
        """Waits for the device and frees what it used. Requests that still run are dropped."""
        if not self._closed:
            self._closed = True
            self._backend.close()

    def _make_request(self, prompt: Prompt, params: SamplingParams) -> Request:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise RequestError("The model has no tokenizer: give the prompt as a list of token ids.")
            prompt = self.tokenizer.encode(prompt)
        try:
            token_ids = tuple(map(operator.index, prompt))
        except TypeError as failure:
            raise RequestError(f"A prompt is a text or a list of token ids: {failure}.") from failure
        self._check_prompt(token_ids)
        number = next(self._ids)
        eos = () if params.ignore_eos else self._eos_token_ids
        stop_ids = tuple(dict.fromkeys((*eos, *params.stop_token_ids)))
        if len(stop_ids) > self._limits.max_stop_ids:
            raise RequestError(
                f"The request has {len(stop_ids)} stop tokens, the model's own included; the engine holds "
                f"{self._limits.max_stop_ids}. Raise max_stop_token_ids."
            )
        max_len = min(len(token_ids) + params.max_tokens, self._limits.max_tokens)
        blocks = -(-(max_len - 1) // self._limits.block_size)
        if blocks > self.num_kv_blocks:
            raise RequestError(
                f"The request may need {blocks} KV blocks, and the cache has {self.num_kv_blocks}. "
                "Lower max_tokens, or raise num_kv_blocks."
            )
        return Request(
            request_id=str(number),
            prompt_token_ids=token_ids,
            params=params,
            stop_ids=stop_ids,
            # Knuth's multiplier spreads consecutive requests over the seeds; any odd number would do.
            seed=params.seed if params.seed is not None else (self.config.seed + 1 + number) * 2654435761 % 2**63,
            max_len=max_len,
            detokenizer=Detokenizer(self.tokenizer) if self.tokenizer is not None else None,
        )

    def _check_prompt(self, token_ids: tuple[int, ...]) -> None:
        if not token_ids:
            raise RequestError("The prompt is empty: it must have at least one token.")
        if len(token_ids) >= self._limits.max_tokens:
            raise RequestError(
                f"The prompt has {len(token_ids)} tokens; with max_model_len={self._limits.max_tokens} "
                "it may have one less than that."
            )
        wrong = next((token for token in token_ids if not 0 <= token < self._vocab_size), None)
        if wrong is not None:
            raise RequestError(f"Token id {wrong} is outside the vocabulary of {self._vocab_size} entries.")

    def _add_or_refuse(self, prompt: Prompt, params: SamplingParams, results: dict[str, RequestOutput]) -> str:
        try:
            return self.add_request(prompt, params)
        except RequestError as refusal:
            request = Request(f"refused-{next(self._ids)}", (), params, (), 0, 0, None)
            request.finish("error", str(refusal))
            results[request.request_id] = RequestOutput(request, 0, 0, finished=True)
            return request.request_id

    def _take_requests(self, outputs: list[RequestOutput]) -> None:
        while self._arrivals:
            self._scheduler.add(self._arrivals.popleft())
        while self._aborts:
            request = self._live.get(self._aborts.popleft())
            if request is not None:
                self._scheduler.abort(request)
                request.finish("abort")
                del self._live[request.request_id]
                end = len(request.output_token_ids)
                outputs.append(RequestOutput(request, end, end, finished=True))

    def _drain_if_needed(self, outputs: list[RequestOutput]) -> None:
        """Collects everything in flight where the next step must not overlap, or needs a preemption."""
        serial = not self.config.backend.overlap_prefill and (self._after_mixed or self._scheduler.wants_chunks)
        starved = self._scheduler.short_of_blocks()
        if serial or starved:
            while self._in_flight:
                self._collect(outputs)
            self._scheduler.preempt_for_blocks()

    def _submit(self, scheduled: ScheduledStep) -> None:
        self._in_flight.append(_InFlight(self._backend.submit(scheduled.plan), scheduled))
        self._submitted += 1
        self._after_mixed = scheduled.is_mixed

    def _collect(self, outputs: list[RequestOutput]) -> None:
        """Takes the oldest step in flight. Its tokens belong to the owners that its slots had when it was submitted."""
        handle, scheduled = self._in_flight[0]
        result = handle.result()
        self._in_flight.popleft()
        self._collected = handle.step
        self._scheduler.missed(scheduled, result)
        ends = {slot: int(result.finish[slot]) for slot in np.flatnonzero(result.finish).tolist()}
        logprobs = None if result.extra is None else _LogprobRows(self._program.unpack_extra(result.extra), result)
        ran = np.flatnonzero(result.num_tokens >= 0)
        counts, tokens = result.num_tokens[ran].tolist(), result.tokens[ran].tolist()
        for slot, count, new in zip(ran.tolist(), counts, tokens, strict=True):
            request = scheduled.owners[slot]
            if request is None or request.finish_reason is not None:  # it was aborted while the step ran
                continue
            known = request.output_token_ids
            begin = len(known)
            if count:
                known += new[:count]
                if logprobs is not None and request.params.logprobs is not None:
                    request.logprobs.append(logprobs.of(slot, request.params.logprobs))
            if slot in ends:
                self._end(request, ends[slot])
            if count or request.finish_reason is not None:
                outputs.append(RequestOutput(request, begin, begin + count, request.finish_reason is not None))

    def _end(self, request: Request, code: int) -> None:
        if code == FinishCode.STOP:
            self._scheduler.finish(request, "stop")
        elif code == FinishCode.LENGTH:
            self._scheduler.finish(request, "length")
        elif code == FinishCode.NAN:
            self._scheduler.finish(request, "error", "The model's logits hold no number to choose a token from.")
        else:  # parked: it goes on when its block arrives
            return
        del self._live[request.request_id]

    def _waited_us(self) -> float:
        return self._backend.stats().wait_us

    def _raise_if_failed(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._closed:
            raise GraphexecError("The engine is closed.")

    def _fail(self, failure: GraphexecError) -> GraphexecError:
        if isinstance(failure, DeviceError) and self._failure is None:
            ids = ", ".join(request.request_id for request in self._scheduler.unfinished) or "none"
            failure = DeviceError(f"{failure} Requests that were running or waiting: {ids}.")
            self._failure = failure
        return failure


class _LogprobRows:
    """Log-probabilities of one step, by slot. The device packs them by the index of the active slot."""

    def __init__(self, arrays: tuple[FloatArray, Int32Array, Int32Array], result: StepResult) -> None:
        self._logprobs, self._ids, self._ranks = arrays
        self._index = np.cumsum(result.num_tokens >= 0) - 1

    def of(self, slot: int, top: int) -> TokenLogprobs:
        row = int(self._index[slot])
        values, ids = self._logprobs[row, : 1 + top].tolist(), self._ids[row, : 1 + top].tolist()
        pairs = tuple(zip(ids[1:], values[1:], strict=True))
        return TokenLogprobs(ids[0], values[0], int(self._ranks[row]), pairs)


def _as_batch(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    if len(prompts) > 0 and all(isinstance(entry, Integral) for entry in prompts):
        return [prompts]  # type: ignore[list-item]  # a list of ints is one prompt
    return list(prompts)  # type: ignore[arg-type]  # and anything else is a list of prompts
