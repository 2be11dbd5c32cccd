"""The engine: takes prompts, keeps the device `overlap_depth` steps ahead of itself, and gives tokens back."""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import NamedTuple, Self

from graphexec.backends import Progress
from graphexec.capture.manifest import Manifest
from graphexec.config import EngineConfig
from graphexec.engine.assemble import Assembly, assemble
from graphexec.engine.garbage import quiet_garbage_collection
from graphexec.engine.generation import Live
from graphexec.engine.intake import Abort, Intake, Prompt, as_batch
from graphexec.engine.outputs.collector import Collector
from graphexec.engine.outputs.mailbox import Mailbox
from graphexec.engine.outputs.output import AnyOutput, RequestOutput
from graphexec.engine.outputs.stream import RequestStream
from graphexec.engine.params import SamplingParams
from graphexec.engine.scheduling.blocks import BlockAllocator
from graphexec.engine.scheduling.prefix_cache import PrefixCache
from graphexec.engine.scheduling.scheduler import ScheduledStep, Scheduler
from graphexec.engine.stats import EngineStats
from graphexec.errors import DeviceError, GraphexecError, RequestError, StepTimeout
from graphexec.plan import StepHandle

__all__ = ["Engine"]


class _InFlight(NamedTuple):
    """A submitted step with the mapping that was true when it was submitted: slots may change hands before it ends."""

    handle: StepHandle
    scheduled: ScheduledStep


class Engine:
    """Serves a decoder model. Every method may be called from any thread.

    Who wants an output that is not there runs a step, for all requests; one thread at a time does, and the others wait
    for it. What `stream` and `generate` have asked for goes to them alone, and everything else to `step`.

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
        self.startup_s = dict(parts.startup_s)
        self.num_kv_blocks = parts.num_blocks - 1
        self.tokenizer = parts.tokenizer
        self._backend = parts.backend
        self._program = parts.program
        self._depth = config.overlap_depth
        prefixes = PrefixCache(parts.num_blocks, 4 * parts.limits.block_size) if config.prefix_caching else None
        allocator = BlockAllocator(parts.num_blocks, prefixes)
        self._scheduler = Scheduler(
            parts.limits, allocator, self.resolved.max_num_batched_tokens, self._depth + 1, config.max_chunk_tokens,
            config.long_prompt_share,
        )  # fmt: skip
        self._live: Live = {}
        self._intake = Intake(
            parts.tokenizer, parts.limits, self.num_kv_blocks, parts.vocab_size, parts.eos_token_ids, config.seed,
            self._live,
        )  # fmt: skip
        self._collector = Collector(self._scheduler, self._program, self._live)
        self._in_flight: deque[_InFlight] = deque()
        self._stepping = threading.Lock()  # over taking outputs, stepping, and handing outputs out
        self._mailbox = Mailbox()  # of `step`
        self._readers: dict[str, Mailbox] = {}  # of requests that a stream or `generate` has asked for
        self._submitted = 0
        self._collected = -1
        self._after_mixed = False
        self._committing = False  # host and device have been told different things; no time for an interrupt
        self._host_s = 0.0
        self._failure: GraphexecError | None = None
        self._closed = False
        self._thaw = weakref.finalize(self, quiet_garbage_collection(config.max_num_seqs))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def add_request(self, prompt: Prompt, params: SamplingParams | None = None) -> str:
        """Queues a request, whose outputs `step` will return, and returns its id.

        Args:
            prompt: text, or token ids.
            params: how to sample it; None for the defaults.

        Raises:
            RequestError: the prompt or its parameters do not fit the model or the engine. Nothing was queued.
        """
        return self._submit(prompt, params, None)

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The prompt, as token ids, that the model's chat template makes of a conversation.

        Args:
            messages: turns with the keys "role" and "content", the oldest first.

        Raises:
            RequestError: the model has no chat template, or it refuses the conversation.
        """
        return self._intake.chat(messages)

    def abort(self, request_id: str) -> None:
        """Ends a request; its last output, with finish_reason "abort", comes from the next step.

        An id that is unknown or has finished is ignored, since a request may end while the caller decides.
        """
        self._intake.abort(Abort(request_id))

    def has_unfinished(self) -> bool:
        """Whether `step` has anything to do: true until the last step is collected and its outputs are returned."""
        return bool(self._live or self._in_flight or self._mailbox)

    def step(self) -> list[RequestOutput]:
        """Submits one step and collects the one `overlap_depth` before it. May return nothing while the first runs.

        The step that meets a failure returns what was collected, and for every request that had not ended an output
        with its tokens so far, the finish_reason "error" and what has happened.

        Raises:
            StepTimeout: the device has not answered in time. No output is lost, and the call can be repeated.
            GraphexecError: the engine has failed in an earlier step, or it is closed.
        """
        with self._stepping:
            if self._failure is not None and self._mailbox:
                return self._mailbox.take()
            outputs = self._advance()
            return [*self._mailbox.take(), *outputs] if self._mailbox else outputs

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[RequestOutput]:
        """Runs prompts to their end and returns their last outputs in order, one for each prompt.

        Args:
            prompts: one prompt or several; each is text or a list of token ids.
            params: one for all, or one for each.

        A prompt that is refused gets an output with finish_reason "error"; the others run. Where `n` asks for several
        samples, the output is the first one's, and its `samples` holds them all.
        """
        batch = as_batch(prompts)
        if isinstance(params, SamplingParams) or params is None:
            params = [params or SamplingParams()] * len(batch)
        if len(params) != len(batch):
            raise RequestError(f"There are {len(batch)} prompts and {len(params)} sampling parameters.")
        self._raise_if_failed()
        results: dict[tuple[str, int], RequestOutput] = {}
        mailbox = Mailbox()
        keys: list[list[tuple[str, int]]] = []
        try:
            for prompt, each in zip(batch, params, strict=True):
                keys.append(self._submit_or_refuse(prompt, each, mailbox, results))
            while (outputs := self._read(mailbox)) is not None:
                results |= {output.key: output for output in outputs if output.finished}
        finally:
            for request_id in {name for samples in keys for name, index in samples if (name, index) not in results}:
                self._abandon(request_id, mailbox)
        return [AnyOutput.of_samples([results[key] for key in samples]) for samples in keys]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> RequestStream:
        """Yields the outputs of one request as they come; closing the iterator early aborts it.

        Raises:
            RequestError: see `add_request`; at the call, not at the first output.
        """
        mailbox = Mailbox()
        request_id = self._submit(prompt, params, mailbox)
        return RequestStream(
            request_id, mailbox.expected, partial(self._read, mailbox), partial(self._abandon, request_id, mailbox)
        )

    def stats(self) -> EngineStats:
        """Counts since the start; never touches the device."""
        backend = self._backend.stats()
        controller = backend.controller
        return EngineStats(
            steps=self._submitted,
            replays=backend.replays,
            modes=backend.modes,
            eager_steps=controller.eager_steps,
            padding_rows=controller.padding_slots,
            predicted_slots=controller.predicted_slots,
            real_slots=controller.real_slots,
            preemptions=self._scheduler.preemptions,
            prefix_cached_tokens=self._scheduler.prefix_cached_tokens,
            host_us=self._host_s * 1e6,
            wait_us=self._backend.wait_us,
            traffic=backend.traffic,
            rows=backend.rows,
            launched_rows=backend.launched_rows,
        )

    def close(self) -> None:
        """Waits for the device and frees what it used. Requests that still run are dropped.

        A step that another thread is in the middle of ends first; that thread's next call raises.
        """
        with self._stepping:  # or the other thread would record and wait on events that are gone
            if not self._closed:
                self._closed = True
                self._intake.close(RequestError("The engine is closed."))
                self._backend.close()
                self._thaw()

    def _submit(self, prompt: Prompt, params: SamplingParams | None, mailbox: Mailbox | None) -> str:
        """Queues a request whose outputs go into `mailbox`, or to `step` if there is none."""
        if params is not None and not isinstance(params, SamplingParams):
            raise RequestError(f"Sampling parameters are a SamplingParams, not {type(params).__name__}.")
        generations = self._intake.check(prompt, params or SamplingParams())
        request_id = generations[0].request.request_id
        if mailbox is not None:
            self._readers[request_id] = mailbox  # before it can have outputs
            mailbox.expected += len(generations)
        try:
            self._intake.submit(generations)
        except RequestError:
            self._readers.pop(request_id, None)
            raise
        return request_id

    def _submit_or_refuse(
        self,
        prompt: Prompt,
        params: SamplingParams,
        mailbox: Mailbox,
        results: dict[tuple[str, int], RequestOutput],
    ) -> list[tuple[str, int]]:
        try:
            request_id = self._submit(prompt, params, mailbox)
        except RequestError as refusal:
            output = AnyOutput.last_of(self._intake.refuse(params, refusal))
            results[output.key] = output
            return [output.key]
        return [(request_id, index) for index in range(params.n)]

    def _read(self, mailbox: Mailbox) -> list[RequestOutput] | None:
        """Outputs of one reader, for which a step is run if there are none; None when there will be none any more."""
        with self._stepping:
            if not mailbox and mailbox.expected:
                for output in self._advance():
                    self._mailbox.put(output)
            return mailbox.take() if mailbox or mailbox.expected else None

    def _abandon(self, request_id: str, mailbox: Mailbox) -> None:
        """Aborts a request whose outputs nobody will take any more. Takes no lock: see Intake.abort."""
        mailbox.close()
        self._intake.abort(Abort(request_id))

    def _advance(self) -> list[RequestOutput]:
        """Runs one step and returns the outputs that are for `step`; the others lie in their mailboxes."""
        self._raise_if_failed()
        started, waited = time.perf_counter(), self._backend.wait_us
        outputs: list[RequestOutput] = []
        try:
            self._committing = True
            self._step(outputs)
        except StepTimeout:
            self._keep(outputs)
            raise
        except Exception as failure:  # host and device no longer agree on what has been submitted
            outputs += self._fail(self._explain(failure))
        except BaseException:  # an interrupt, which is harmless only while waiting for the device
            if self._committing:
                interrupted = "The engine was interrupted in the middle of a step, and host and device no longer agree."
                outputs += self._fail(GraphexecError(f"{interrupted} Create a new one."))
            self._keep(outputs)
            raise
        finally:
            self._committing = False
            self._host_s += time.perf_counter() - started - (self._backend.wait_us - waited) / 1e6
        return self._sorted_out(outputs) if self._readers else outputs

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

    def _take_requests(self, outputs: list[RequestOutput]) -> None:
        arrivals, aborts = self._intake.take()
        for generation in arrivals:
            self._scheduler.add(generation)
        for abort in aborts:
            samples = self._live.get(abort.request_id, {})
            for index in list(samples) if abort.sample is None else samples.keys() & {abort.sample}:
                generation = samples.pop(index)
                self._scheduler.abort(generation)
                generation.finish("abort" if abort.error is None else "error", abort.error)
                outputs.append(AnyOutput.last_of(generation))
            if not samples:
                self._live.pop(abort.request_id, None)

    def _drain_if_needed(self, outputs: list[RequestOutput]) -> None:
        """Collects everything in flight where the next step must not overlap, or needs a preemption."""
        serial = not self.config.overlap_prefill and (self._after_mixed or self._scheduler.may_chunk)
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

    def _sorted_out(self, outputs: list[RequestOutput]) -> list[RequestOutput]:
        """Puts outputs into the mailboxes of their readers, and returns those that have none."""
        rest, ended = [], []
        for output in outputs:
            mailbox = self._readers.get(output.request_id)
            if mailbox is None:
                rest.append(output)
                continue
            mailbox.put(output)
            if output.finished and output.request_id not in self._live:
                ended.append(output.request_id)
        for request_id in ended:  # now, since several samples of one prompt may have ended in this step
            self._readers.pop(request_id, None)
        return rest

    def _keep(self, outputs: list[RequestOutput]) -> None:
        """Keeps the outputs of a step that ends in an exception for the next call."""
        for output in self._sorted_out(outputs):
            self._mailbox.put(output)

    def _fail(self, failure: GraphexecError) -> list[RequestOutput]:
        """Ends the engine, and returns the last outputs of all requests that had not ended."""
        self._failure = failure
        self._intake.close(RequestError(f"The engine has failed: {failure}"))
        ended = [generation for samples in self._live.values() for generation in samples.values()]
        for generation in ended:
            generation.finish("error", str(failure))
        self._live.clear()
        self._in_flight.clear()
        return [AnyOutput.last_of(generation) for generation in ended]

    def _raise_if_failed(self) -> None:
        if self._closed:
            raise GraphexecError("The engine is closed.")
        if self._failure is not None:
            raise self._failure

    def _explain(self, failure: Exception) -> GraphexecError:
        kind = type(failure) if isinstance(failure, GraphexecError) else DeviceError
        text = str(failure) if isinstance(failure, GraphexecError) else f"{type(failure).__name__}: {failure}."
        return kind(f"{text} Requests that were running or waiting: {', '.join(list(self._live)) or 'none'}.")
