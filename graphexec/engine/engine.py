"""The engine: takes prompts, keeps the device `overlap_depth` steps ahead of itself, and gives tokens back."""

from __future__ import annotations

import gc
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import NamedTuple, Self

from graphexec.backends import Progress
from graphexec.capture.manifest import Manifest
from graphexec.config import EngineConfig
from graphexec.engine.assemble import Assembly, assemble
from graphexec.engine.blocks import BlockAllocator
from graphexec.engine.collector import Collector
from graphexec.engine.intake import Intake, Prompt, as_batch
from graphexec.engine.outbox import Outbox
from graphexec.engine.params import SamplingParams
from graphexec.engine.prefix_cache import PrefixCache
from graphexec.engine.request import Request, RequestOutput
from graphexec.engine.scheduler import ScheduledStep, Scheduler
from graphexec.engine.stats import EngineStats
from graphexec.engine.stream import RequestStream
from graphexec.errors import DeviceError, GraphexecError, RequestError, StepTimeout
from graphexec.plan import StepHandle

__all__ = ["Engine"]


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
        self._depth = config.backend.overlap_depth
        allocator = BlockAllocator(parts.num_blocks, PrefixCache() if config.prefix_caching else None)
        self._scheduler = Scheduler(parts.limits, allocator, self.resolved.max_num_batched_tokens, self._depth + 1)
        self._intake = Intake(
            parts.tokenizer, parts.limits, self.num_kv_blocks, parts.vocab_size, parts.eos_token_ids, config.seed
        )
        self._live: dict[str, list[Request]] = {}  # the samples of each prompt that still run
        self._collector = Collector(self._scheduler, self._program, self._live)
        self._in_flight: deque[_InFlight] = deque()
        self._outbox = Outbox()
        self._abandoned: set[str] = set()
        self._stepping = threading.Lock()
        self._submitted = 0
        self._collected = -1
        self._after_mixed = False
        self._committing = False  # host and device have been told different things; no time for an interrupt
        self._host_s = 0.0
        self._failure: GraphexecError | None = None
        self._closed = False
        self._froze = _freeze_heap()

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
        if self._failure is not None:
            raise RequestError(f"The engine has failed: {self._failure}")
        if params is not None and not isinstance(params, SamplingParams):
            raise RequestError(f"Sampling parameters are a SamplingParams, not {type(params).__name__}.")
        return self._intake.submit(prompt, params or SamplingParams(), self._live)

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The prompt, as token ids, that the model's chat template makes of a conversation.

        Args:
            messages: turns with the keys "role" and "content", the oldest first.

        Raises:
            RequestError: the model has no chat template, or it refuses the conversation.
        """
        return self._intake.chat(messages)

    def abort(self, request_id: str) -> None:
        """Ends a request; its last output, with finish_reason "abort", comes from the next step. From any thread.

        An id that is unknown or has finished is ignored, since a request may end while the caller decides.
        """
        self._intake.abort(request_id)

    def has_unfinished(self) -> bool:
        """Whether `step` has anything to do: true until the last step is collected and its outputs are returned."""
        return bool(self._live or self._in_flight or self._outbox)

    def step(self) -> list[RequestOutput]:
        """Submits one step and collects the one `overlap_depth` before it. May return nothing while the first runs.

        Raises:
            StepTimeout: the device has not answered in time. No output is lost, and the call can be repeated.
            GraphexecError: any other failure ends the engine; the message lists the requests that it held.
        """
        outputs = self._advance()
        return [*self._outbox.take_all(), *outputs] if self._outbox else outputs

    def _advance(self) -> list[RequestOutput]:
        with self._stepping:
            self._raise_if_failed()
            started, waited = time.perf_counter(), self._backend.wait_us
            outputs: list[RequestOutput] = []
            try:
                self._committing = True
                self._step(outputs)
            except StepTimeout:
                self._outbox.put(outputs)
                raise
            except Exception as failure:  # host and device no longer agree on what has been submitted
                self._outbox.put(outputs)
                self._failure = self._explain(failure)
                raise self._failure from failure
            except BaseException:  # an interrupt, which is harmless only while waiting for the device
                self._outbox.put(outputs)
                if self._committing:
                    self._failure = GraphexecError(
                        "The engine was interrupted in the middle of a step, and host and device no longer agree. "
                        "Create a new one."
                    )
                raise
            finally:
                self._committing = False
                self._host_s += time.perf_counter() - started - (self._backend.wait_us - waited) / 1e6
            return outputs

    def _step(self, outputs: list[RequestOutput]) -> None:
        self._collect_down_to(self._depth, outputs)  # nothing to do, unless the last call ended in a StepTimeout
        self._take_requests(outputs)
        self._drain_if_needed(outputs)
        scheduled = self._scheduler.schedule(self._submitted, self._collected)
        if scheduled is not None:
            try:
                handle = self._backend.submit(scheduled.plan)
            except StepTimeout as late:  # a wait within submit, e.g. of a lazy capture: the plan cannot be made again
                raise DeviceError(f"A step could not be submitted: {late}") from late
            self._in_flight.append(_InFlight(handle, scheduled))
            self._submitted += 1
            self._after_mixed = scheduled.is_mixed
        # Nothing to run: flush the last steps at once.
        self._collect_down_to(self._depth if scheduled is not None else 0, outputs)

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[RequestOutput]:
        """Runs prompts to their end and returns their last outputs in order, one for each prompt.

        Args:
            prompts: one prompt or several; each is text or a list of token ids.
            params: one for all, or one for each.

        A prompt that is refused gets an output with finish_reason "error"; the others run. Where `n` asks for several
        samples, the output is the first one's, and its `samples` holds them all. Outputs of other requests that run
        meanwhile are kept for the next `step`.
        """
        batch = as_batch(prompts)
        if isinstance(params, SamplingParams) or params is None:
            params = [params or SamplingParams()] * len(batch)
        if len(params) != len(batch):
            raise RequestError(f"There are {len(batch)} prompts and {len(params)} sampling parameters.")
        self._raise_if_failed()
        results: dict[tuple[str, int], RequestOutput] = {}
        keys = [self._add_or_refuse(prompt, each, results) for prompt, each in zip(batch, params, strict=True)]
        wanted = {key for samples in keys for key in samples}
        try:
            while len(results) < len(wanted):
                for output in self._advance():
                    if output.key not in wanted:
                        self._outbox.put([output])
                    elif output.finished:
                        results[output.key] = output
        finally:
            for request_id in {name for name, _ in wanted - results.keys()}:
                self.abandon(request_id)
        return [RequestOutput.of_samples([results[key] for key in samples]) for samples in keys]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> RequestStream:
        """Yields the outputs of one request as they come; closing the iterator early aborts it.

        Outputs of other requests that run meanwhile are kept for the next `step`.

        Raises:
            RequestError: see `add_request`; at the call, not at the first output.
        """
        return RequestStream(self, self.add_request(prompt, params), 1 if params is None else params.n)

    def advance_for(self, request_id: str) -> list[RequestOutput] | None:
        """Like `step`, but returns the outputs of one request; those of others are kept for the next `step`.

        None when the request has ended and its outputs were taken.
        """
        held = self._outbox.take(request_id)
        if held:
            return held
        if request_id not in self._live:
            return None
        outputs = self._advance()
        self._outbox.put(output for output in outputs if output.request_id != request_id)
        return [output for output in outputs if output.request_id == request_id]

    def abandon(self, request_id: str) -> None:
        """Aborts a request whose outputs nobody will take any more."""
        self._abandoned.add(request_id)
        self._outbox.take(request_id)
        self._intake.abort(request_id)

    def stats(self) -> EngineStats:
        """Counts since the start; never touches the device."""
        backend = self._backend.stats()
        controller = backend.controller
        return EngineStats(
            steps=self._submitted,
            replays=backend.replays,
            eager_steps=controller.eager_steps,
            padding_rows=controller.padding_slots,
            predicted_slots=controller.predicted_slots,
            real_slots=controller.real_slots,
            preemptions=self._scheduler.preemptions,
            prefix_cached_tokens=self._scheduler.prefix_cached_tokens,
            host_us=self._host_s * 1e6,
            wait_us=self._backend.wait_us,
        )

    def close(self) -> None:
        """Waits for the device and frees what it used. Requests that still run are dropped."""
        if not self._closed:
            self._closed = True
            self._backend.close()
            if self._froze:
                gc.unfreeze()

    def _add_or_refuse(
        self, prompt: Prompt, params: SamplingParams, results: dict[tuple[str, int], RequestOutput]
    ) -> list[tuple[str, int]]:
        try:
            request_id = self.add_request(prompt, params)
        except RequestError as refusal:
            request = self._intake.refuse(params, refusal)
            results[request.key] = RequestOutput(request, 0, 0, True)
            return [request.key]
        return [(request_id, index) for index in range(params.n)]

    def _take_requests(self, outputs: list[RequestOutput]) -> None:
        arrivals, aborts = self._intake.take()
        for request in arrivals:
            self._scheduler.add(request)
        for request_id in aborts:
            for aborted in self._live.pop(request_id, ()):
                self._scheduler.abort(aborted)
                aborted.finish("abort")
                end = len(aborted.output_token_ids)
                if request_id not in self._abandoned:
                    outputs.append(RequestOutput(aborted, end, end, True))
            self._abandoned.discard(request_id)

    def _drain_if_needed(self, outputs: list[RequestOutput]) -> None:
        """Collects everything in flight where the next step must not overlap, or needs a preemption."""
        serial = not self.config.backend.overlap_prefill and (self._after_mixed or self._scheduler.wants_chunks)
        if serial or self._scheduler.short_of_blocks():
            self._collect_down_to(0, outputs)
            self._scheduler.preempt_for_blocks()

    def _collect_down_to(self, ahead: int, outputs: list[RequestOutput]) -> None:
        while len(self._in_flight) > ahead:
            self._collect(outputs)

    def _collect(self, outputs: list[RequestOutput]) -> None:
        """Takes the oldest step in flight."""
        handle, scheduled = self._in_flight[0]
        self._committing = False
        result = handle.result()
        self._committing = True
        self._in_flight.popleft()
        self._collected = handle.step
        self._collector.take(scheduled, result, outputs)

    def _raise_if_failed(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._closed:
            raise GraphexecError("The engine is closed.")

    def _explain(self, failure: Exception) -> GraphexecError:
        kind = type(failure) if isinstance(failure, GraphexecError) else DeviceError
        text = str(failure) if isinstance(failure, GraphexecError) else f"{type(failure).__name__}: {failure}."
        return kind(f"{text} Requests that were running or waiting: {', '.join(self._live) or 'none'}.")


def _freeze_heap() -> bool:
    """Takes what loading has left on the heap out of garbage collection, which would walk it in the middle of a step.

    A full collection over transformers' modules takes a quarter of a second. Returns whether it froze anything.
    """
    if gc.get_freeze_count():
        return False
    gc.collect()
    gc.freeze()
    return True
