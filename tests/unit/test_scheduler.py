"""The scheduler by itself: when running requests get their KV blocks, and who gets them when there are few."""

from __future__ import annotations

from dataclasses import replace

import pytest

from graphexec import SamplingParams
from graphexec.engine.generation import Generation
from graphexec.engine.request import Request
from graphexec.engine.scheduling.blocks import BlockAllocator
from graphexec.engine.scheduling.prefix_cache import PrefixCache
from graphexec.engine.scheduling.scheduler import ScheduledStep, Scheduler
from graphexec.slots import SlotLimits

BLOCK_SIZE = 16
LIMITS = SlotLimits(max_slots=16, max_tokens=512, max_rows=272, block_size=BLOCK_SIZE, max_stop_ids=1)
DEPTH = 1


def request(name: str, prompt_len: int, max_len: int = 410, **changes: object) -> Generation:
    params = SamplingParams(max_tokens=400, temperature=0.0, **changes)
    return Generation(Request(name, (5,) * prompt_len, params, (), 0, max_len))


def blocks_of(scheduler: Scheduler, generation: Generation) -> int:
    return len(scheduler._blocks_of(scheduler._placements[generation]))


def steps(scheduler: Scheduler, first: int, count: int) -> list[ScheduledStep]:
    """`count` steps in which every request yields a token, collected `DEPTH` steps late."""
    taken = []
    for number in range(first, first + count):
        step = scheduler.schedule(number, number - 1 - DEPTH)
        assert step is not None
        taken.append(step)
    return taken


def test_most_decode_steps_carry_no_delta() -> None:
    """Sixteen requests come to the ends of their blocks in sixteen different steps; two deltas a block serve them."""
    scheduler = Scheduler(LIMITS, BlockAllocator(1000), LIMITS.max_rows, lookahead=DEPTH + 1)
    for index in range(16):
        scheduler.add(request(str(index), 1 + index))
    prefill = 0
    while scheduler.wants_chunks:
        steps(scheduler, prefill, 1)
        prefill += 1
    decoding = steps(scheduler, prefill, 8 * BLOCK_SIZE)
    assert all(len(set(step.owners)) == 16 for step in decoding)
    assert 0 < sum(step.plan.delta is not None for step in decoding) <= 2 * 8


@pytest.mark.parametrize("order", [(14, 9), (9, 14)])
def test_the_last_free_block_goes_to_the_slot_that_needs_it_first(order: tuple[int, int]) -> None:
    allocator = BlockAllocator(1 + 3)
    scheduler = Scheduler(LIMITS, allocator, LIMITS.max_rows, lookahead=DEPTH + 1)
    requests = [request(str(length), length) for length in order]
    for each in requests:
        scheduler.add(each)
    for number in range(12):
        scheduler.schedule(number, number - 1 - DEPTH)
    assert {each.request.request_id: blocks_of(scheduler, each) for each in requests} == {"14": 2, "9": 1}
    assert allocator.free == 0


def test_a_slot_that_wants_two_blocks_gets_the_only_free_one() -> None:
    """Else it would park beside a free block, and nobody would be preempted for it: none is missing."""
    limits = replace(LIMITS, block_size=8)
    scheduler = Scheduler(limits, BlockAllocator(1 + 2), limits.max_rows, lookahead=4)
    only = request("only", 8)
    scheduler.add(only)
    steps(scheduler, 0, 2)
    assert blocks_of(scheduler, only) == 2


@pytest.mark.parametrize(("max_len", "blocks"), [(BLOCK_SIZE + 1, 1), (BLOCK_SIZE + 2, 2), (3 * BLOCK_SIZE, 3)])
def test_nobody_gets_a_block_that_it_cannot_fill(max_len: int, blocks: int) -> None:
    """The last token that is sampled is not computed, so its KV needs no place."""
    scheduler = Scheduler(LIMITS, BlockAllocator(100), LIMITS.max_rows, lookahead=DEPTH + 1)
    only = request("only", 4, max_len)
    scheduler.add(only)
    steps(scheduler, 0, 1 + max_len - 4 - 1)
    assert scheduler.schedule(max_len, max_len) is None  # it has computed what it may
    assert blocks_of(scheduler, only) == blocks


@pytest.mark.parametrize(
    ("changes", "cached"),
    [({}, 32), ({"stop_sequences": [[7, 8]]}, 0), ({"repetition_penalty": 1.5}, 0), ({"prompt_logprobs": 1}, 0)],
)
def test_who_needs_every_token_on_the_device_reads_no_cached_blocks(changes: dict[str, object], cached: int) -> None:
    scheduler = Scheduler(
        LIMITS, BlockAllocator(100, PrefixCache(100, 4 * BLOCK_SIZE)), LIMITS.max_rows, lookahead=DEPTH + 1
    )
    scheduler.add(request("first", 40))
    steps(scheduler, 0, 1)
    scheduler.add(request("second", 40, **changes))
    steps(scheduler, 1, 1)
    assert scheduler.prefix_cached_tokens == cached


def test_beside_decoding_requests_a_step_computes_few_prompt_tokens() -> None:
    scheduler = Scheduler(LIMITS, BlockAllocator(100), LIMITS.max_rows, lookahead=DEPTH + 1, max_chunk_tokens=4)
    scheduler.add(request("first", 9))
    assert [step.plan.chunk_rows for step in steps(scheduler, 0, 2)] == [9, 0], "alone it has the step to itself"
    scheduler.add(request("second", 10))
    assert [step.plan.chunk_rows for step in steps(scheduler, 2, 4)] == [4, 4, 2, 0]


def test_a_long_prompt_leaves_room_for_short_ones() -> None:
    scheduler = Scheduler(LIMITS, BlockAllocator(100), 20, lookahead=DEPTH + 1, long_prompt_share=0.5)
    for name, length in (("long", 25), ("short", 6), ("shorter", 4)):
        scheduler.add(request(name, length))
    (first,) = steps(scheduler, 0, 1)
    assert first.plan.chunk_rows == 10 + 6 + 4
    names = {first.owners[slot].request.request_id for slot in first.whole_prompts}
    assert names == {"short", "shorter"}
    assert [step.plan.chunk_rows for step in steps(scheduler, 1, 2)] == [15, 0], "nobody waits for its share any more"
