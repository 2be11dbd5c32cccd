"""Replays an engine's own decode graphs back to back, without the engine: the time that the device needs by itself."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from graphexec import Engine, GraphKey
from graphexec.backends.cudagraph import CudaGraphBackend
from graphexec.backends.stepping import preserved_state
from graphexec.capture.graph_set import GraphSet
from graphexec.engine.program import DecoderProgram
from graphexec.pipeline import Pipeline
from graphexec.runtime import Graph
from graphexec.runtime.cuda import CudaStream

__all__ = ["Contexts", "Inside", "hand_written_loop", "inside", "replay_back_to_back", "timed_launches"]

_VARIANT = "greedy"


@dataclass(frozen=True)
class Contexts:
    """What the slots hold at the start.

    Attributes:
        batch: slots that decode.
        first: tokens whose KV is written, the same for every slot.
        most: tokens that a slot has KV blocks for. The blocks of the slots lie one behind the other from block 1 on,
            where an idle engine's allocator begins too; so after a run of the same batch and length, they hold real KV.
    """

    batch: int
    first: int
    most: int


@dataclass(frozen=True)
class Inside:
    """The parts of an idle engine whose backend is "cudagraph"."""

    pipeline: Pipeline
    graphs: GraphSet
    program: DecoderProgram

    def graph(self, batch: int) -> Graph:
        graph = self.graphs.get(self.key(batch))
        if graph is None:
            raise RuntimeError(f"There is no graph for the {self.key(batch)}.")
        return graph

    @staticmethod
    def key(batch: int) -> GraphKey:
        return GraphKey("decode", batch, batch, _VARIANT)

    @contextmanager
    def borrowed(self) -> Iterator[None]:
        """Within the block the slots may be overwritten; afterwards the engine finds them as they were."""
        with self.pipeline.runtime.activated(), preserved_state(self.program, self.pipeline):
            yield

    def set_contexts(self, contexts: Contexts) -> None:
        """Enqueues slots that decode; to be called within `borrowed`, on the compute stream or through its `run`."""
        slots, limits = self.program.state_of_slots.slots, self.program.limits
        batch, device = contexts.batch, slots.seq_lens.device
        blocks = -(-contexts.most // limits.block_size)
        generator = torch.Generator().manual_seed(batch)
        ids = torch.randint(0, 256, (batch, contexts.first + 1), generator=generator, dtype=torch.int32)
        tables = torch.arange(1, 1 + batch * blocks, dtype=torch.int32, device=device).view(batch, blocks)
        for tensor in slots.all():
            tensor.zero_()
        slots.stop_ids.fill_(-1)
        slots.top_p.fill_(1.0)
        slots.max_len.fill_(limits.max_tokens)
        slots.query_lens[:batch] = 1
        slots.seq_lens[:batch] = contexts.first
        slots.num_tokens[:batch] = contexts.first + 1
        slots.num_blocks[:batch] = blocks
        slots.block_tables[:batch, :blocks] = tables
        slots.token_ids[:batch, : contexts.first + 1] = ids.to(device)

    def check_moved(self, contexts: Contexts, steps: int) -> None:
        """Raises RuntimeError unless each slot computed a token in each of `steps` steps since `set_contexts`.

        The streams must have drained.
        """
        lengths = self.program.state_of_slots.slots.seq_lens[: contexts.batch].tolist()
        wrong = [length for length in lengths if length != contexts.first + steps]
        if wrong:
            raise RuntimeError(
                f"After {steps} replays from {contexts}, {len(wrong)} slots have lengths like {wrong[0]}."
            )

    def token_ids(self, contexts: Contexts) -> torch.Tensor:
        """A copy of what the slots know; waits for the device, since `borrowed` will restore them on another stream."""
        copies: list[torch.Tensor] = []
        slots = self.program.state_of_slots.slots
        self.pipeline.compute.run(lambda: copies.append(slots.token_ids[: contexts.batch].clone()))
        self.pipeline.synchronize()
        return copies[0]


def inside(engine: Engine) -> Inside:
    """The parts of `engine`. The only place of the benchmarks that looks behind the public API: a bare replay needs
    the graphs themselves, and to put slots in front of them.

    Replays write over KV blocks, so the engine must not believe that it knows what they hold.
    """
    if engine.config.prefix_caching:
        raise ValueError("Replays would spoil the prefix cache of this engine: set prefix_caching=False.")
    backend = engine._backend
    if not isinstance(backend, CudaGraphBackend) or backend._pipeline is None or backend._graphs is None:
        raise TypeError(f"Only a prepared cudagraph backend has graphs, not {type(backend).__name__}.")
    return Inside(backend._pipeline, backend._graphs, engine._program)


def replay_back_to_back(parts: Inside, contexts: Contexts, steps: int) -> tuple[float, torch.Tensor]:
    """Milliseconds a replay of the decode graph, `steps` of them enqueued at once, and the token ids they left.

    The slots go on from replay to replay as in a run, one token longer each time. Timed with events around all of
    them on a GPU, with the host's clock on the CPU.
    """
    graph, pipeline = parts.graph(contexts.batch), parts.pipeline
    with parts.borrowed():
        pipeline.compute.run(lambda: parts.set_contexts(contexts))
        pipeline.synchronize()
        milliseconds = timed_launches(pipeline, graph, steps)
        parts.check_moved(contexts, steps)
        return milliseconds / steps, parts.token_ids(contexts)


def timed_launches(pipeline: Pipeline, graph: Graph, count: int) -> float:
    """Milliseconds from the begin of the first to the end of the last of `count` replays; waits for them."""
    stream = pipeline.compute
    if not isinstance(stream, CudaStream):
        started = time.perf_counter()
        for _ in range(count):
            stream.launch(graph)
        pipeline.synchronize()
        return (time.perf_counter() - started) * 1e3
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record(stream.torch_stream)
    for _ in range(count):
        stream.launch(graph)
    end.record(stream.torch_stream)
    pipeline.synchronize()
    return float(begin.elapsed_time(end))


def hand_written_loop(parts: Inside, contexts: Contexts, steps: int) -> tuple[float, torch.Tensor]:
    """Milliseconds a step of the loop that a user writes first, over the same model step, and the token ids it left.

    A `torch.cuda.CUDAGraph` of the step, and after each replay one blocking read of the new tokens (`.item()`, or
    `.tolist()` for a batch), which are appended to lists and compared with a stop token. It schedules nothing, which an
    engine cannot leave out. Needs a GPU.
    """
    key, program = parts.key(contexts.batch), parts.program
    outputs: list[list[int]] = [[] for _ in range(contexts.batch)]
    stop_token, running = -1, contexts.batch
    with parts.borrowed():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            parts.set_contexts(contexts)
            program.step(key)  # allocates this stream's workspaces outside of the capture
            stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                program.step(key)
            tokens = program.observed(key)[0]
            parts.set_contexts(contexts)
            torch.cuda.synchronize()
            started = time.perf_counter()
            for _ in range(steps):
                graph.replay()
                new = [tokens.item()] if contexts.batch == 1 else tokens.tolist()  # waits for the device
                for output, token in zip(outputs, new, strict=True):
                    output.append(token)
                    running -= token == stop_token
                if not running:
                    break
            seconds = time.perf_counter() - started
            torch.cuda.synchronize()
        parts.check_moved(contexts, steps)
        left = parts.token_ids(contexts)
        del graph
        return seconds * 1e3 / steps, left
