"""KV blocks and the prefix cache: who has which block, what is found where, and what is given up first."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from graphexec.engine.blocks import BlockAllocator
from graphexec.engine.params import SamplingParams
from graphexec.engine.prefix_cache import NO_PREFIX, PrefixCache
from graphexec.engine.request import Request
from graphexec.engine.scheduler import Scheduler
from tests.support.instant_program import small_limits

A, B, C = (1, 1), (2, 2), (3, 3)
"""Tokens of a block."""


@pytest.fixture
def prefixes() -> PrefixCache:
    return PrefixCache()


def hold(allocator: BlockAllocator, *tokens: tuple[int, ...]) -> list[int]:
    """Takes new blocks and enters them as a sequence."""
    assert allocator.prefixes is not None
    blocks = allocator.take(len(tokens))
    assert blocks is not None
    chain = NO_PREFIX.chain
    for held, block in zip(tokens, blocks, strict=True):
        chain = allocator.prefixes.enter(chain, held, block)
    return blocks


def found(prefixes: PrefixCache, *tokens: tuple[int, ...]) -> list[int]:
    return list(prefixes.find(tokens).blocks)


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


def test_tokens_with_equal_hashes_are_told_apart(prefixes: PrefixCache) -> None:
    assert hash((-1, 5)) == hash((-2, 5))  # CPython's
    hold(BlockAllocator(8, prefixes), (-1, 5))
    assert found(prefixes, (-2, 5)) == []


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
    prefixes.enter(NO_PREFIX.chain, C, parent)
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
    prefix = prefixes.find([A, B])
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
    scheduler = Scheduler(limits, BlockAllocator(8, PrefixCache()), limits.max_rows, lookahead=0)
    scheduler.add(Request("running", (5,) * 12, SamplingParams(), (), 0, 60, None))
    scheduler.schedule(0, collected=-1)
    newcomer = Request("newcomer", (6,) * tokens, SamplingParams(), (), 0, 60, None)
    scheduler.add(newcomer)
    scheduler.schedule(1, collected=0)
    assert (newcomer.slot is not None) is admitted


TOTAL = 7


@dataclass
class _Holder:
    blocks: list[int]
    tokens: list[tuple[int, ...]]  # of the blocks that are entered, from the first on
    chain: int


class Blocks(RuleBasedStateMachine):
    """Requests that come, share, write and leave. What a block holds is whatever was written into it last."""

    def __init__(self) -> None:
        super().__init__()
        self.prefixes = PrefixCache()
        self.allocator = BlockAllocator(TOTAL + 1, self.prefixes)
        self.holders: list[_Holder] = []
        self.content: dict[int, tuple[tuple[int, ...], ...]] = {}  # all tokens up to the end of the block

    @rule(tokens=st.lists(st.sampled_from([A, B]), max_size=4), count=st.integers(0, 3), spare=st.integers(0, 2))
    def admit(self, tokens: list[tuple[int, ...]], count: int, spare: int) -> None:
        prefix = self.prefixes.find(tokens)
        for index, block in enumerate(prefix.blocks):
            assert self.content[block] == tuple(tokens[: index + 1])
        used, free = self.used(), self.allocator.free
        wanted = count + len(set(prefix.blocks) - used.keys())
        blocks = self.allocator.take(count, behind=prefix.blocks, spare=spare)
        if wanted + spare > free:
            assert blocks is None
            return
        assert blocks is not None
        assert not set(blocks) & (used.keys() | set(prefix.blocks)), "a new block is nobody else's"
        for block in blocks:
            self.content[block] = ()  # overwritten
        known = len(prefix.blocks)
        self.holders.append(_Holder([*prefix.blocks, *blocks], tokens[:known], prefix.chain))

    @precondition(lambda self: self.holders)
    @rule(data=st.data(), tokens=st.sampled_from([A, B]))
    def fill(self, data: st.DataObject, tokens: tuple[int, ...]) -> None:
        holder = data.draw(st.sampled_from(self.holders))
        index = len(holder.tokens)
        if index < len(holder.blocks):
            holder.tokens.append(tokens)
            block = holder.blocks[index]
            assert self.used()[block] == 1, "a block is written by its only user"
            self.content[block] = tuple(holder.tokens)
            holder.chain = self.prefixes.enter(holder.chain, tokens, block)

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
TestBlocks.settings = settings(max_examples=150, stateful_step_count=40)
