"""KV blocks and the prefix cache: who has which block, what is found where, and what is given up first."""

from __future__ import annotations

import gc
from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from graphexec.deltas import as_words
from graphexec.engine.generation import Generation
from graphexec.engine.params import SamplingParams
from graphexec.engine.request import Request
from graphexec.engine.scheduling.blocks import BlockAllocator
from graphexec.engine.scheduling.prefix_cache import NO_PREFIX, PrefixCache
from graphexec.engine.scheduling.scheduler import Scheduler
from tests.support.instant_program import small_limits

A, B, C = (as_words(pair) for pair in ((1, 1), (2, 2), (3, 3)))
"""Tokens of a block."""


@pytest.fixture
def prefixes() -> PrefixCache:
    return PrefixCache(64, block_bytes=8)


def hold(allocator: BlockAllocator, *tokens: bytes) -> list[int]:
    """Takes new blocks and enters them as a sequence, one after the other."""
    assert allocator.prefixes is not None
    blocks = allocator.take(len(tokens))
    assert blocks is not None
    chain = NO_PREFIX.chain
    for held, block in zip(tokens, blocks, strict=True):
        chain = allocator.prefixes.enter(chain, held, [block])
    return blocks


def hold_run(allocator: BlockAllocator, *tokens: bytes) -> list[int]:
    """Takes new blocks and enters them as a sequence, all at once."""
    assert allocator.prefixes is not None
    blocks = allocator.take(len(tokens))
    assert blocks is not None
    allocator.prefixes.enter(NO_PREFIX.chain, b"".join(tokens), blocks)
    return blocks


def found(prefixes: PrefixCache, *tokens: bytes) -> list[int]:
    return list(prefixes.find(b"".join(tokens)).blocks)


def test_a_sequence_is_found_as_far_as_it_is_known(prefixes: PrefixCache) -> None:
    blocks = hold(BlockAllocator(8, prefixes), A, B, C)
    assert found(prefixes, A, B, C) == blocks
    assert found(prefixes, A, B) == blocks[:2]
    assert found(prefixes, A, B, A) == blocks[:2]
    assert found(prefixes, B, C) == []


def test_the_same_tokens_behind_others_are_another_block(prefixes: PrefixCache) -> None:
    allocator = BlockAllocator(8, prefixes)
    first, second = hold(allocator, A, C), hold(allocator, B, C)
    assert found(prefixes, A, C) == first
    assert found(prefixes, B, C) == second


def test_tokens_that_begin_alike_within_a_block_are_told_apart(prefixes: PrefixCache) -> None:
    hold(BlockAllocator(8, prefixes), as_words((1, 5)))
    assert found(prefixes, as_words((1, 6))) == []
    assert found(prefixes, as_words((1,))) == []


def test_a_run_is_found_as_far_as_it_is_known(prefixes: PrefixCache) -> None:
    blocks = hold_run(BlockAllocator(8, prefixes), A, B, C)
    for known in (3, 2, 1):
        assert found(prefixes, *(A, B, C)[:known]) == blocks[:known]
    assert found(prefixes, A, C) == blocks[:1]
    assert found(prefixes, A, B, C, A) == blocks
    assert found(prefixes, B) == []


def test_a_sequence_that_goes_on_otherwise_keeps_the_beginning_of_a_run_and_not_its_end(prefixes: PrefixCache) -> None:
    allocator = BlockAllocator(6, prefixes)
    blocks = hold_run(allocator, A, B, C)
    shared = prefixes.find(A + C)
    (own,) = allocator.take(1, behind=shared.blocks) or []
    prefixes.enter(shared.chain, C, [own])
    assert (found(prefixes, A, B, C), found(prefixes, A, C)) == (blocks, [blocks[0], own])
    allocator.give_back(blocks)
    assert allocator.free == 1 + 2, "the beginning has another user"
    allocator.give_back([*shared.blocks, own])
    assert allocator.free == 5


def test_what_stands_behind_a_run_is_found_when_the_run_was_split(prefixes: PrefixCache) -> None:
    allocator = BlockAllocator(8, prefixes)
    blocks = allocator.take(3) or []
    chain = prefixes.enter(NO_PREFIX.chain, A + B, blocks[:2])
    assert found(prefixes, A, C) == blocks[:1]
    prefixes.enter(chain, C, blocks[2:])
    assert found(prefixes, A, B, C) == blocks


def test_a_run_of_which_the_beginning_is_here_already_goes_on_behind_it(prefixes: PrefixCache) -> None:
    allocator = BlockAllocator(8, prefixes)
    first, second = hold_run(allocator, A, B), hold_run(allocator, A, B, C)
    assert found(prefixes, A, B, C) == [*first, second[2]]
    allocator.give_back(second)
    assert (allocator.free, prefixes.unused) == (2 + 3, 1)
    third = hold_run(allocator, A)
    assert found(prefixes, A) == first[:1]
    allocator.give_back(third)


def test_the_end_of_a_run_is_evicted_before_its_beginning_and_what_stood_behind_it_is_gone(
    prefixes: PrefixCache,
) -> None:
    allocator = BlockAllocator(5, prefixes)
    blocks = allocator.take(4) or []
    chain = prefixes.enter(NO_PREFIX.chain, A + B, blocks[:2])
    prefixes.enter(chain, C + A, blocks[2:])
    allocator.give_back(blocks[:2])
    assert allocator.take(1) == [blocks[1]]
    assert found(prefixes, A, B, C) == blocks[:1]
    prefixes.enter(prefixes.find(A).chain, B, [blocks[1]])
    assert found(prefixes, A, B, C) == blocks[:2], "what is behind the new block was never computed"


@pytest.mark.parametrize("count", range(1, 7))
def test_eviction_takes_as_many_blocks_as_are_asked_for_from_several_runs(prefixes: PrefixCache, count: int) -> None:
    allocator = BlockAllocator(7, prefixes)
    for run in ((A, B, C), (B, C), (C,)):
        allocator.give_back(hold_run(allocator, *run))
    taken = allocator.take(count)
    assert taken is not None
    assert len(set(taken)) == count
    assert allocator.free == prefixes.unused == 6 - count
    expected = {1: (2, 2, 1), 2: (1, 2, 1), 3: (0, 2, 1), 4: (0, 1, 1), 5: (0, 0, 1), 6: (0, 0, 0)}[count]
    assert tuple(len(found(prefixes, *run)) for run in ((A, B, C), (B, C), (C,))) == expected


def test_blocks_are_doubted_until_somebody_vouches_for_them(prefixes: PrefixCache) -> None:
    allocator = BlockAllocator(8, prefixes)
    blocks = hold_run(allocator, A, B)
    assert prefixes.doubts(blocks)
    assert prefixes.find(A + B, sound_only=True) == NO_PREFIX
    assert found(prefixes, A) == blocks[:1]  # split
    prefixes.vouch_for(blocks[:1])
    assert prefixes.doubts(blocks)
    assert not prefixes.doubts(blocks[:1])
    assert list(prefixes.find(A + B, sound_only=True).blocks) == blocks[:1]


def test_dropped_blocks_are_found_no_more_and_free_when_their_last_user_has_gone(prefixes: PrefixCache) -> None:
    allocator = BlockAllocator(6, prefixes)
    blocks = hold_run(allocator, A, B)
    allocator.take(0, behind=blocks)
    later = hold_run(allocator, C)
    prefixes.vouch_for(later)
    prefixes.drop([*blocks, *later])
    assert found(prefixes, A) == []
    assert found(prefixes, C) == later, "it is sound"
    assert prefixes.doubts(blocks)
    allocator.give_back(blocks)
    assert (allocator.free, prefixes.unused) == (2, 0)
    allocator.give_back(blocks)
    assert (allocator.free, prefixes.unused) == (4, 0)
    again = hold_run(allocator, A, B)
    assert found(prefixes, A, B) == again
    assert prefixes.doubts(again)


def test_a_full_cache_makes_no_work_for_the_garbage_collector() -> None:
    """131,000 blocks once made pauses of 32 ms."""
    gc.collect()
    before = len(gc.get_objects())
    prefixes = PrefixCache(1 << 14, block_bytes=8)
    allocator = BlockAllocator(1 << 14, prefixes)
    for number in range((1 << 14) - 1):
        allocator.give_back(hold_run(allocator, as_words((number, number))))
    assert prefixes.unused == (1 << 14) - 1
    gc.collect()  # takes tuples of numbers out of its lists
    assert len(gc.get_objects()) - before < 200


def test_a_second_block_with_the_same_content_stays_its_users_own(prefixes: PrefixCache) -> None:
    allocator = BlockAllocator(8, prefixes)
    first, second = hold(allocator, A, B), hold(allocator, A, C)
    assert found(prefixes, A, B) == first
    assert found(prefixes, A, C) == [first[0], second[1]]  # and what stands behind it is found behind the first
    allocator.give_back(second)
    assert (allocator.free, prefixes.unused) == (5, 1)


def test_the_children_of_an_evicted_block_are_never_found_behind_another(prefixes: PrefixCache) -> None:
    """A chain by block numbers would hand out, behind the block's new content, what stood behind its old one."""
    allocator = BlockAllocator(4, prefixes)
    parent, _ = hold(allocator, A, B)
    allocator.give_back([parent])
    assert parent in (allocator.take(2) or [])
    prefixes.enter(NO_PREFIX.chain, C, [parent])
    assert found(prefixes, C, B) == [parent]
    assert found(prefixes, A, B) == []


def test_a_block_that_comes_back_with_the_same_content_is_no_parent_of_its_old_children(prefixes: PrefixCache) -> None:
    allocator = BlockAllocator(3, prefixes)
    parent, _ = hold(allocator, A, B)
    allocator.give_back([parent])
    assert hold(allocator, A) == [parent]
    assert found(prefixes, A, B) == [parent]


def test_empty_blocks_go_first_and_then_those_unused_for_longest(prefixes: PrefixCache) -> None:
    allocator = BlockAllocator(6, prefixes)
    first, second, third = hold(allocator, A), hold(allocator, B), hold(allocator, C)
    empty = allocator.take(2)
    assert empty is not None
    for blocks in (second, first, third, empty):
        allocator.give_back(blocks)
    assert sorted(allocator.take(2) or []) == sorted(empty)
    for blocks, tokens in ((second, B), (first, A), (third, C)):
        assert found(prefixes, tokens) == blocks
        assert allocator.take(1) == blocks
        assert found(prefixes, tokens) == []
    assert allocator.take(1) is None


def test_who_is_shared_again_is_no_longer_the_oldest(prefixes: PrefixCache) -> None:
    allocator = BlockAllocator(3, prefixes)
    first, second = hold(allocator, A), hold(allocator, B)
    allocator.give_back(first)
    allocator.give_back(second)
    assert allocator.take(0, behind=first) == []
    allocator.give_back(first)
    assert allocator.take(1) == second


def test_the_end_of_a_sequence_is_evicted_before_its_beginning(prefixes: PrefixCache) -> None:
    allocator = BlockAllocator(4, prefixes)
    blocks = hold(allocator, A, B, C)
    allocator.give_back(blocks)
    for kept in (2, 1, 0):
        assert allocator.take(1) == [blocks[kept]]
        assert found(prefixes, A, B, C) == blocks[:kept]


def test_a_prefix_is_not_evicted_for_the_blocks_that_stand_behind_it(prefixes: PrefixCache) -> None:
    allocator = BlockAllocator(4, prefixes)
    allocator.give_back(hold(allocator, A, B, C))
    prefix = prefixes.find(A + B)
    (taken,) = allocator.take(1, behind=prefix.blocks) or []
    assert taken not in prefix.blocks
    assert allocator.free == 0


@pytest.mark.parametrize(("count", "spare", "fits"), [(2, 0, True), (3, 0, False), (2, 1, False), (1, 1, True)])
def test_unused_blocks_of_the_prefix_count_as_taken(prefixes: PrefixCache, count: int, spare: int, fits: bool) -> None:
    """Five blocks: one of the prefix is in use, two of it are not, and two are empty."""
    allocator = BlockAllocator(6, prefixes)
    blocks = hold(allocator, A, B, C)
    allocator.give_back(blocks[1:])
    before = allocator.free
    assert before == 4
    assert (allocator.take(count, behind=blocks, spare=spare) is not None) is fits
    assert allocator.free == (before - 2 - count if fits else before)


def test_a_shared_block_is_free_when_its_last_user_has_gone(prefixes: PrefixCache) -> None:
    allocator = BlockAllocator(3, prefixes)
    blocks = hold(allocator, A)
    for _ in range(2):
        assert allocator.take(0, behind=blocks) == []
    for free in (1, 1, 2):
        allocator.give_back(blocks)
        assert allocator.free == free


def test_without_a_cache_the_block_given_back_last_is_handed_out_first() -> None:
    allocator = BlockAllocator(6)
    assert allocator.take(3) == [3, 2, 1]
    assert allocator.take(3) is None
    assert allocator.take(0) == []
    allocator.give_back([3, 2, 1])
    assert allocator.take(3) == [1, 2, 3]
    assert allocator.free == 2


@pytest.mark.parametrize(("tokens", "admitted"), [(32, True), (33, False)])
def test_an_admission_leaves_a_block_to_each_running_request(tokens: int, admitted: bool) -> None:
    """Of seven blocks of 8 tokens, a running request has two, and may soon need a third."""
    limits = small_limits()
    scheduler = Scheduler(
        limits, BlockAllocator(8, PrefixCache(8, 4 * limits.block_size)), limits.max_rows, lookahead=0
    )
    scheduler.add(Generation(Request("running", (5,) * 12, SamplingParams(), (), 0, 60)))
    scheduler.schedule(0, collected=-1)
    newcomer = Generation(Request("newcomer", (6,) * tokens, SamplingParams(), (), 0, 60))
    scheduler.add(newcomer)
    scheduled = scheduler.schedule(1, collected=0)
    assert scheduled is not None
    assert (newcomer in scheduled.owners) is admitted


TOTAL = 7


@dataclass
class _Holder:
    blocks: list[int]
    tokens: list[bytes]  # of the blocks that are entered, from the first on
    chain: int


class Blocks(RuleBasedStateMachine):
    """Requests that come, share, write and leave. What a block holds is whatever was written into it last."""

    def __init__(self) -> None:
        super().__init__()
        self.prefixes = PrefixCache(TOTAL + 1, block_bytes=8)
        self.allocator = BlockAllocator(TOTAL + 1, self.prefixes)
        self.holders: list[_Holder] = []
        self.content: dict[int, bytes] = {}  # all tokens up to the end of the block
        self.sound: set[bytes] = set()

    @rule(
        tokens=st.lists(st.sampled_from([A, B]), max_size=5),
        count=st.integers(0, 4),
        spare=st.integers(0, 2),
        sound_only=st.booleans(),
    )
    def admit(self, tokens: list[bytes], count: int, spare: int, sound_only: bool) -> None:
        prefix = self.prefixes.find(b"".join(tokens), sound_only)
        for index, block in enumerate(prefix.blocks):
            assert self.content[block] == b"".join(tokens[: index + 1])
            if sound_only:
                assert self.content[block] in self.sound
        used, free = self.used(), self.allocator.free
        wanted = count + len(set(prefix.blocks) - used.keys())
        blocks = self.allocator.take(count, behind=prefix.blocks, spare=spare)
        if wanted + spare > free:
            assert blocks is None
            return
        assert blocks is not None
        assert not set(blocks) & (used.keys() | set(prefix.blocks)), "a new block is nobody else's"
        for block in blocks:
            self.content[block] = b""  # overwritten
        known = len(prefix.blocks)
        self.holders.append(_Holder([*prefix.blocks, *blocks], tokens[:known], prefix.chain))

    @precondition(lambda self: self.holders)
    @rule(data=st.data(), tokens=st.lists(st.sampled_from([A, B]), min_size=1, max_size=3), sound=st.booleans())
    def fill(self, data: st.DataObject, tokens: list[bytes], sound: bool) -> None:
        holder = data.draw(st.sampled_from(self.holders))
        index = len(holder.tokens)
        blocks = holder.blocks[index : index + len(tokens)]
        for block, held in zip(blocks, tokens, strict=False):
            assert self.used()[block] == 1, "a block is written by its only user"
            holder.tokens.append(held)
            self.content[block] = b"".join(holder.tokens)
            if sound:
                self.sound.add(self.content[block])
        if blocks:
            holder.chain = self.prefixes.enter(holder.chain, b"".join(tokens), blocks, sound)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def vouch(self, data: st.DataObject) -> None:
        holder = data.draw(st.sampled_from(self.holders))
        blocks = holder.blocks[: len(holder.tokens)]
        self.prefixes.vouch_for(blocks)
        self.sound |= {self.content[block] for block in blocks}

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        holder = data.draw(st.sampled_from(self.holders))
        self.prefixes.drop(holder.blocks[: len(holder.tokens)])

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        holder = data.draw(st.sampled_from(self.holders))
        self.holders.remove(holder)
        self.allocator.give_back(holder.blocks)

    def used(self) -> Counter[int]:
        return Counter(block for holder in self.holders for block in holder.blocks)

    @invariant()
    def no_block_is_lost(self) -> None:
        assert self.allocator.free == TOTAL - len(self.used())

    def teardown(self) -> None:
        for holder in self.holders:
            self.allocator.give_back(holder.blocks)
        assert self.allocator.free == TOTAL
        assert sorted(self.allocator.take(TOTAL) or []) == list(range(1, TOTAL + 1))


TestBlocks = Blocks.TestCase
TestBlocks.settings = settings(max_examples=250, stateful_step_count=40)
