"""A batched state machine on graphexec, and the thirty lines of engine that drive it. No language model anywhere.

Every slot holds a number; a step replaces n by n / 2 or 3 n + 1 and stops the slot at 1. The step is captured as one
graph for each bucket, the host stays a step behind, and nobody asks the device how many slots are running.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from graphexec import (
    BackendConfig,
    Delta,
    DeviceIO,
    FinishCode,
    GraphKey,
    RecordLayout,
    StepHandle,
    StepPlan,
    StepProgram,
    create_backend,
    create_runtime,
)
from graphexec.plan import Int32Array

SLOTS = 16


@dataclass(frozen=True)
class Start(Delta):
    """Puts numbers into slots."""

    numbers: dict[int, int]

    @property
    def armed(self) -> Sequence[int]:
        return list(self.numbers)

    def pack(self, words: Int32Array, step: int) -> None:
        words[:2] = len(self.numbers), step
        words[2 : 2 + len(self.numbers)] = list(self.numbers)
        words[2 + SLOTS : 2 + SLOTS + len(self.numbers)] = list(self.numbers.values())


class Collatz(StepProgram):
    """The device side. Ordinary torch over fixed tensors: no `.item()`, no shape that depends on data."""

    max_slots = SLOTS
    max_rows = SLOTS
    variants = ("plain",)
    record = RecordLayout(SLOTS)
    staging_words = 2 + 2 * SLOTS

    def __init__(self, device: torch.device) -> None:
        self.value = torch.zeros(SLOTS + 1, dtype=torch.int32, device=device)  # 0: idle; the last entry is scratch
        self.last_delta = torch.full((1,), -1, dtype=torch.int32, device=device)
        self.lanes = torch.arange(SLOTS, device=device)

    def bind(self, io: DeviceIO) -> None:
        self.io = io

    def apply(self, staging: torch.Tensor) -> None:
        slots = torch.where(self.lanes < staging[0], staging[2 : 2 + SLOTS], SLOTS).long()
        self.value.index_copy_(0, slots, staging[2 + SLOTS :])
        self.last_delta.copy_(staging[1:2])

    def step(self, key: GraphKey) -> None:
        value = self.value[:SLOTS]
        running = value > 0
        real = running.sum().to(torch.int32)
        overflow = (real > key.bucket).to(torch.int32)
        # Running slots first, as many as the bucket holds: the part of a step whose cost grows with the bucket.
        rows = torch.argsort(running.logical_not().to(torch.int32), stable=True)[: key.bucket]
        moved = torch.where(value[rows] % 2 == 0, value[rows] // 2, 3 * value[rows] + 1)
        keep = (value[rows] == 0) | (overflow == 1)
        after = value.index_copy(0, rows, torch.where(keep, value[rows], moved))
        ran = running & (overflow == 0)
        stops = ran & (after == 1)
        next_value = torch.where(stops, 0, after)
        header = torch.stack([self.io.counter[0], real, (next_value > 0).any().to(torch.int32), overflow])
        header = torch.cat([header, header.new_zeros(1), self.last_delta, header.new_zeros(2)])
        counts = torch.where(ran, 1, -1).to(torch.int32)
        record = torch.cat([header, counts, stops.to(torch.int32) * int(FinishCode.STOP), after])
        self.io.ring.index_copy_(0, (self.io.counter % len(self.io.ring)).long(), record[None])
        value.copy_(next_value)
        self.io.counter.add_(1)

    def state(self) -> Sequence[torch.Tensor]:
        return [self.value, self.last_delta]

    def exercise(self, key: GraphKey, generator: torch.Generator) -> None:
        self.value.zero_()
        numbers = torch.randint(2, 1000, (key.bucket,), generator=generator, dtype=torch.int32)
        self.value[: key.bucket] = numbers.to(self.value.device)


def run(
    numbers: Sequence[int], device: str = "cpu", backend: str = "cudagraph", depth: int = 1
) -> dict[int, list[int]]:
    """The orbit of each number down to 1: a whole engine with continuous batching, in thirty lines."""
    runtime = create_runtime(torch.device(device))
    executor = create_backend(BackendConfig(name=backend), runtime)
    executor.prepare(Collatz(runtime.device))
    executor.warmup()
    waiting, free = deque(number for number in dict.fromkeys(numbers) if number > 1), set(range(SLOTS))
    orbits: dict[int, list[int]] = {number: [] for number in numbers}
    owners: dict[int, int] = {}
    in_flight: deque[tuple[StepHandle, dict[int, int]]] = deque()
    try:
        while waiting or owners or in_flight:
            started = {free.pop(): waiting.popleft() for _ in range(min(len(free), len(waiting)))}
            owners |= started
            if owners:  # submit a step, with the slot-to-number mapping that is true now
                handle = executor.submit(StepPlan("plain", Start(started) if started else None))
                in_flight.append((handle, dict(owners)))
            while len(in_flight) > (depth if owners else 0):  # and collect the one `depth` before it
                handle, mapping = in_flight.popleft()
                result = handle.result()
                # Lists: comparing numpy's scalars one by one takes a hundred times as long.
                counts, finish, tokens = (each.tolist() for each in (result.num_tokens, result.finish, result.tokens))
                for slot, number in mapping.items():
                    if counts[slot] > 0 and owners.get(slot) == number:
                        orbits[number].append(tokens[slot][0])
                        if finish[slot] == FinishCode.STOP:  # collected, so the slot may have a new owner
                            del owners[slot]
                            free.add(slot)
    finally:
        executor.close()
    return orbits


if __name__ == "__main__":
    for start, orbit in run(range(1, 40), "cuda" if torch.cuda.is_available() else "cpu").items():
        print(start, *orbit)
