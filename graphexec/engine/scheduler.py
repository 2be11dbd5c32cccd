"""The scheduler: which requests run in the next step, with which slots, prompt chunks and KV blocks.

Works on what the host knows, which is behind the device by the steps in flight; every number is an upper bound of
what those steps may have done. No device access.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from graphexec.deltas import Admission, SlotDeltas
from graphexec.engine.admission import admission
from graphexec.engine.blocks import BlockAllocator
from graphexec.engine.logprobs import PROMPT_LOGPROBS, PromptChunk
from graphexec.engine.prefix_cache import NO_PREFIX, Prefix
from graphexec.engine.request import Request
from graphexec.kernels.sample import SamplerVariant
from graphexec.plan import StepPlan, StepResult
from graphexec.slots import SlotLimits

__all__ = ["ScheduledStep", "Scheduler"]


@dataclass(frozen=True, slots=True)
class ScheduledStep:
    """A plan, and the slot-to-request mapping frozen for it.

    Attributes:
        plan: what the backend submits.
        owners: request of each slot, or None.
        decodes: `[S]` bool, slots that are expected to decode (they do not if they stopped or parked before).
        is_mixed: whether there are prompt chunks of several tokens.
        prompt_chunks: all chunks of the step, by slot, if it reports log-probabilities of a prompt; else empty.
    """

    plan: StepPlan
    owners: tuple[Request | None, ...]
    decodes: NDArray[np.bool_]
    is_mixed: bool
    prompt_chunks: dict[int, PromptChunk]


class Scheduler:
    """Continuous batching: running requests first, then prompt chunks, then admissions, first come first served."""

    def __init__(self, limits: SlotLimits, allocator: BlockAllocator, max_batched_tokens: int, lookahead: int) -> None:
        self._limits = limits
        self._allocator = allocator
        self._prefixes = allocator.prefixes
        self._max_batched_tokens = max_batched_tokens
        self._lookahead = lookahead  # tokens of KV space reserved ahead, so that no slot parks meanwhile
        self._waiting: deque[Request] = deque()
        self._prefilling: list[Request] = []
        self._running: dict[Request, None] = {}  # in the order of admission
        self._owners: list[Request | None] = [None] * limits.max_slots
        self._free_slots = list(range(limits.max_slots - 1, -1, -1))
        self._retiring: list[tuple[int, int]] = []  # slots released by the delta of a step
        self._releases: list[int] = []  # slots whose release has not been submitted
        self._variants = dict.fromkeys(SamplerVariant, 0)
        self._chunks: dict[int, PromptChunk] = {}  # of the step that is being scheduled
        self._decoding = np.zeros(limits.max_slots, dtype=bool)
        self._scheduled = np.zeros(limits.max_slots, dtype=np.int64)  # tokens computed once the steps in flight ran
        self._capacity = np.zeros(limits.max_slots, dtype=np.int64)  # tokens that the slot's KV blocks hold
        self._limit = np.zeros(limits.max_slots, dtype=np.int64)  # tokens at which the request ends
        self._refused: Request | None = None  # found no room when it was looked up last, with this slack:
        self._refused_slack = 0
        self.preemptions = 0
        self.prefix_cached_tokens = 0

    @property
    def wants_chunks(self) -> bool:
        """Whether the next step may hold prompt chunks."""
        return bool(self._prefilling or self._waiting)

    def add(self, request: Request) -> None:
        """Puts a new request at the end of the queue."""
        self._waiting.append(request)

    def abort(self, request: Request) -> None:
        """Ends a request wherever it is. Its blocks are free at once, its slot once the steps in flight are collected.

        Blocks need no wait: whatever a step in flight still writes is written before anything that comes later (F5).
        """
        if request.slot is None:
            self._waiting.remove(request)
        else:
            self._evict(request)

    def short_of_blocks(self) -> bool:
        """Whether some decoding request cannot compute its next token without a block that is not there."""
        return self._missing_blocks() > self._allocator.free

    def preempt_for_blocks(self) -> None:
        """Sends the newest requests back to the queue until the others have their blocks; nothing is in flight.

        Since every step that ran them was collected (F6), their tokens are all known, and are computed again later.
        """
        while self.short_of_blocks():
            request = next(reversed(self._running))
            self._evict(request)
            self._waiting.appendleft(request)
            self.preemptions += 1

    def schedule(self, step: int, collected: int) -> ScheduledStep | None:
        """The next step, or None when nothing can run.

        Args:
            step: number the step will have.
            collected: number of the last collected step.
        """
        self._free_retired(collected)
        deltas = SlotDeltas(self._limits)
        decodes = self._decodable()
        self._supply_blocks(deltas, decodes)
        self._scheduled[decodes] += 1
        budget = self._max_batched_tokens - int(np.count_nonzero(decodes))
        chunks = self._continue_prompts(deltas, budget)
        chunks += self._admit(deltas, budget - sum(chunks))
        # A request that waits for the slot of an aborted one needs a step that carries the release.
        if not chunks and not decodes.any() and not (self._releases and self._waiting):
            return None
        for slot in self._releases:
            deltas.release(slot)
            self._retiring.append((slot, step))
        self._releases.clear()
        prompt_chunks = self._take_prompt_chunks()
        variant = PROMPT_LOGPROBS if prompt_chunks else self._variant()
        plan = StepPlan(variant, deltas if len(deltas) else None, len(chunks), sum(chunks))
        is_mixed = any(chunk > 1 for chunk in chunks)
        return ScheduledStep(plan, tuple(self._owners), decodes, is_mixed, prompt_chunks)

    def missed(self, scheduled: ScheduledStep, result: StepResult) -> None:
        """Takes back the tokens of slots that were parked when they should have decoded."""
        for slot in np.flatnonzero(scheduled.decodes & (result.num_tokens < 0)).tolist():
            owner = scheduled.owners[slot]
            if owner is not None and owner.finish_reason is None and owner.slot == slot:
                self._scheduled[slot] -= 1

    def retire(self, request: Request) -> None:
        """Takes out a request that the device has stopped: its slot is free for a new owner (F5: it was collected)."""
        slot = self._detach(request)
        self._free_slots.append(slot)

    def _decodable(self) -> NDArray[np.bool_]:
        return self._decoding & (self._scheduled < self._limit - 1)

    def _missing_blocks(self) -> int:
        return int(np.count_nonzero(self._decodable() & (self._scheduled >= self._capacity)))

    def _supply_blocks(self, deltas: SlotDeltas, decodes: NDArray[np.bool_]) -> None:
        """Gives KV blocks to those that need one within the lookahead, and with them to those that soon will.

        A step with a delta begins with its upload. So the slots that come to their next block within half a block's
        steps get it along, and most steps have no delta.
        """
        size, free = self._limits.block_size, self._allocator.free
        ahead = self._scheduled + 1 + self._lookahead
        if not (decodes & (np.minimum(ahead, self._limit - 1) > self._capacity)).any():
            return
        wanted = np.minimum(ahead + size // 2, self._limit - 1)
        short = np.flatnonzero(decodes & (wanted > self._capacity))
        counts = -(-(wanted - self._capacity)[short] // size)
        if counts.sum() > free:  # one for each, the neediest first
            order = np.argsort((self._capacity - self._scheduled)[short])
            short = short[order[:free]]
            counts = np.ones_like(short)
        blocks = self._allocator.take(int(counts.sum()))
        assert blocks is not None
        deltas.grow(short, self._capacity[short] // size, counts, blocks)
        self._capacity[short] += counts * size
        begin = 0
        for slot, count in zip(short.tolist(), counts.tolist(), strict=True):
            request = self._owners[slot]
            assert request is not None
            request.blocks += blocks[begin : begin + count]
            begin += count

    def _continue_prompts(self, deltas: SlotDeltas, budget: int) -> list[int]:
        chunks = []
        for request in list(self._prefilling):
            if budget <= 0:
                break
            chunks.append(self._arm_chunk(deltas, request, budget))
            budget -= chunks[-1]
        return chunks

    def _admit(self, deltas: SlotDeltas, budget: int) -> list[int]:
        chunks = []
        room = self._limits.max_shared_blocks
        while self._waiting and self._free_slots and budget > 0:
            request = self._waiting[0]
            slack = self._allocator.free - len(self._running)
            if request is self._refused and slack <= self._refused_slack:
                break  # nothing was freed since; and to look a long prompt up may cost more than the rest of the step
            prefix = self._cached_prefix(request)
            room -= len(prefix.blocks)
            if room < 0:
                break
            newcomer = admission(request, len(prefix.blocks) * self._limits.block_size)
            if not deltas.has_room_for(newcomer):
                break
            needed = -(-request.num_tokens // self._limits.block_size) - len(prefix.blocks)
            # One block for each running request is left alone, or the newcomer would soon be preempted for it.
            blocks = self._allocator.take(needed, behind=prefix.blocks, spare=len(self._running))
            if blocks is None:
                self._refused, self._refused_slack = request, slack
                break
            self._waiting.popleft()
            self._attach(deltas, request, newcomer, prefix, blocks)
            chunks.append(self._arm_chunk(deltas, request, budget))
            budget -= chunks[-1]
        return chunks

    def _cached_prefix(self, request: Request) -> Prefix:
        if self._prefixes is None or not request.reads_prefix_cache:
            return NO_PREFIX
        # One token at least is computed: the next one is chosen by its logits.
        full = (request.num_tokens - 1) // self._limits.block_size
        return self._prefixes.find(self._tokens_of_block(request, index) for index in range(full))

    def _tokens_of_block(self, request: Request, index: int) -> tuple[int, ...]:
        size = self._limits.block_size
        return tuple(request.tokens(index * size, (index + 1) * size))

    def _enter_blocks(self, request: Request, written: int) -> None:
        """Makes the full blocks of the first `written` tokens findable, whose KV this or an earlier step writes.

        Their readers come later on the compute stream, or in this very step, where each layer writes the KV of all rows
        (`rope_write`) before it attends to any. Nobody writes into them again: a slot writes from its `seq_lens` on,
        which is never less than `written`, and so do the steps in flight that still run it when its request has left.
        """
        if self._prefixes is None:
            return
        for index in range(request.entered, written // self._limits.block_size):
            tokens = self._tokens_of_block(request, index)
            request.chain = self._prefixes.enter(request.chain, tokens, request.blocks[index])
            request.entered = index + 1

    def _attach(
        self, deltas: SlotDeltas, request: Request, newcomer: Admission, prefix: Prefix, blocks: list[int]
    ) -> None:
        slot = self._free_slots.pop()
        request.entered, request.chain = len(prefix.blocks), prefix.chain
        request.computed = newcomer.seq_len
        self.prefix_cached_tokens += request.computed
        deltas.admit(slot, newcomer)
        deltas.supply(slot, 0, prefix.blocks)
        request.slot, request.blocks = slot, [*prefix.blocks, *blocks]
        self._owners[slot] = request
        self._running[request] = None
        self._prefilling.append(request)
        self._variants[request.variant] += 1
        self._capacity[slot] = len(request.blocks) * self._limits.block_size
        self._limit[slot] = request.max_len

    def _arm_chunk(self, deltas: SlotDeltas, request: Request, budget: int) -> int:
        slot, begin, known = request.slot, request.computed, request.num_tokens
        assert slot is not None
        end = min(known, begin + budget)
        size = self._limits.block_size
        first_block, last_block = -(-begin // size), -(-end // size)
        # A log-probability needs the token behind the chunk's last one, if the prompt has one.
        behind = request.params.prompt_logprobs is not None and end < len(request.prompt_token_ids)
        deltas.arm(slot, begin, request.tokens(begin, end + behind), end - begin)
        self._chunks[slot] = PromptChunk(begin, end)
        deltas.supply(slot, first_block, request.blocks[first_block:last_block])
        request.computed = end
        self._enter_blocks(request, end)
        if end == known:
            self._prefilling.remove(request)
            self._decoding[slot] = True
            self._scheduled[slot] = known
        return end - begin

    def _evict(self, request: Request) -> None:
        self._releases.append(self._detach(request))

    def _detach(self, request: Request) -> int:
        slot = request.slot
        assert slot is not None
        if self._decoding[slot]:  # its newest token was sampled, and no step that was collected has written its KV
            self._enter_blocks(request, request.num_tokens - 1)
        self._allocator.give_back(request.blocks)
        request.slot, request.blocks = None, []
        self._owners[slot] = None
        self._decoding[slot] = False
        del self._running[request]
        if request in self._prefilling:
            self._prefilling.remove(request)
        self._variants[request.variant] -= 1
        return slot

    def _free_retired(self, collected: int) -> None:
        """Frees slots whose last step under the old owner, the one before their release, was collected (F5)."""
        freed = [entry for entry in self._retiring if entry[1] - 1 <= collected]
        for entry in freed:
            self._retiring.remove(entry)
            self._free_slots.append(entry[0])

    def _take_prompt_chunks(self) -> dict[int, PromptChunk]:
        """The chunks of this step, if one of them is of a prompt whose log-probabilities were asked for."""
        if not self._chunks:
            return {}
        chunks, self._chunks = self._chunks, {}
        owners = ((self._owners[slot], chunk) for slot, chunk in chunks.items())
        asked = any(owner and owner.wants_prompt_logprobs(chunk.begin) for owner, chunk in owners)
        return chunks if asked else {}

    def _variant(self) -> str:
        running = [variant for variant, count in self._variants.items() if count]
        return max(running, default=SamplerVariant.GREEDY).value
