"""A step program whose KV cache holds numbers that stand for all they were computed from: a wrong read changes tokens.

Slots, deltas, records and the order of a step are the real ones: each of two layers writes the KV of all rows before
it attends to any. Float arithmetic may forgive a wrong block; this program never does.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from graphexec import BackendConfig, Engine, EngineConfig
from graphexec.backends import create_backend
from graphexec.engine.assemble import Assembly
from graphexec.engine.resolve import ResolvedConfig
from graphexec.kernels.prepare import prepare
from graphexec.kernels.update import update
from graphexec.plan import DeviceIO, GraphKey, RecordLayout, StepProgram
from graphexec.runtime import CpuRuntime
from graphexec.slots import SlotLimits, SlotState

__all__ = ["VOCABULARY", "SymbolicProgram", "symbolic_engine", "tokens_alone"]

VOCABULARY = 96
_LONGEST = 1024
_FACTORS = np.random.default_rng(0).integers(0, 2**63, _LONGEST, dtype=np.uint64) | np.uint64(1)

Symbols = NDArray[np.uint64]


def _embed(tokens: Symbols, positions: NDArray[np.int64]) -> Symbols:
    return (tokens + np.uint64(7)) * _FACTORS[positions]


def _attend(context: Symbols) -> np.uint64:
    total = (context * _FACTORS[: len(context)]).sum(dtype=np.uint64)
    return total ^ (total >> np.uint64(29))


def tokens_alone(prompt: Sequence[int], max_tokens: int) -> list[int]:
    """What a request gets with a cache of its own."""
    tokens = list(prompt)
    for _ in range(max_tokens):
        first = _embed(np.array(tokens, dtype=np.uint64), np.arange(len(tokens)))
        second = np.array([_attend(first[: end + 1]) for end in range(len(tokens))])
        tokens.append(int(_attend(second)) % VOCABULARY)
    return tokens[len(prompt) :]


class SymbolicProgram(StepProgram):
    """Two layers of attention by hashing, greedy."""

    variants = ("greedy",)

    def __init__(self, limits: SlotLimits, num_blocks: int) -> None:
        self.limits = limits
        self.max_slots, self.max_rows = limits.max_slots, limits.max_rows
        self.staging_words = limits.staging_words
        self.record = RecordLayout(limits.max_slots)
        self._num_blocks = num_blocks
        self._slots = SlotState(limits, torch.device("cpu"))
        self._first, self._second = np.zeros((2, num_blocks * limits.block_size), dtype=np.uint64)
        self._tokens = torch.zeros(limits.max_slots, dtype=torch.int32)
        self._nan = torch.zeros(limits.max_slots, dtype=torch.int32)

    def bind(self, io: DeviceIO) -> None:
        self._io = io

    def apply(self, staging: torch.Tensor) -> None:
        self._slots.apply(staging)

    def step(self, key: GraphKey) -> None:
        slots, step = self._slots.slots, self._slots.step
        prepare(slots, step, key.rows, key.bucket, self.limits.block_size)
        if key.bucket:
            self._run(key)
        update(slots, step, self._tokens, self._nan, self._io.ring, self._io.counter, self.limits.block_size)

    def _run(self, key: GraphKey) -> None:
        step, count = self._slots.step, int(self._slots.step.info[0])
        rows = np.flatnonzero(step.row_slot[: key.rows].numpy() >= 0)
        positions = step.positions.numpy()[rows].astype(np.int64)
        written = step.kv_slots.numpy()[rows]
        contexts = [
            self._places(int(step.row_slot[row]), position) for row, position in zip(rows, positions, strict=True)
        ]
        self._first[written] = _embed(step.input_ids.numpy()[rows].astype(np.uint64), positions)
        self._second[written] = [_attend(self._first[context]) for context in contexts]
        for index, row in enumerate(step.logit_rows[:count].tolist()):
            self._tokens[index] = int(_attend(self._second[contexts[row]])) % VOCABULARY

    def _places(self, slot: int, position: int) -> NDArray[np.int64]:
        """Where the KV of positions 0 to `position` lies."""
        size, all_positions = self.limits.block_size, np.arange(position + 1)
        table = self._slots.slots.block_tables[slot].numpy().astype(np.int64)
        return table[all_positions // size] * size + all_positions % size

    def state(self) -> Sequence[torch.Tensor]:
        return self._slots.slots.all()

    def exercise(self, key: GraphKey, generator: torch.Generator) -> None:
        self._slots.exercise(key.bucket, key.rows, self._num_blocks, VOCABULARY, generator)


def symbolic_engine(
    *,
    depth: int = 1,
    num_kv_blocks: int = 200,
    prefix_caching: bool = True,
    max_num_seqs: int = 6,
    max_model_len: int = 80,
    max_num_batched_tokens: int = 16,
    runtime: CpuRuntime | None = None,
) -> Engine:
    """An engine over a symbolic program, with KV blocks of 8 tokens."""
    limits = SlotLimits(max_num_seqs, max_model_len, max_num_batched_tokens + max_num_seqs, 8, 8)
    backend = BackendConfig(name="eager", step_timeout_s=30)
    executor = create_backend(backend, runtime or CpuRuntime())
    program = SymbolicProgram(limits, num_kv_blocks + 1)
    executor.prepare(program)
    device = torch.device("cpu")
    parts = Assembly(
        resolved=ResolvedConfig(device, torch.float32, max_model_len, max_num_batched_tokens, "off", num_kv_blocks, {}),
        backend=executor,
        program=program,  # type: ignore[arg-type]  # without log-probabilities, any program will do
        manifest=executor.warmup(),
        limits=limits,
        num_blocks=num_kv_blocks + 1,
        vocab_size=VOCABULARY,
        eos_token_ids=(),
        tokenizer=None,
    )
    config = EngineConfig(
        max_num_seqs=max_num_seqs, prefix_caching=prefix_caching, overlap_depth=depth, backend=backend
    )
    return Engine(config, parts=parts)
