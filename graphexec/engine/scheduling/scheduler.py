"""The scheduler: which requests run in the next step, with which slots, prompt chunks and KV blocks.

Works on what the host knows, which is behind the device by the steps in flight; every number is an upper bound of
what those steps may have done. No device access.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from graphexec.deltas import SlotDeltas
from graphexec.engine.generation import Generation
from graphexec.engine.outputs.logprobs import PROMPT_LOGPROBS, PromptChunk
from graphexec.engine.scheduling.blocks import BlockAllocator
from graphexec.engine.scheduling.placement import Placement
from graphexec.engine.scheduling.prefix_cache import NO_PREFIX, Prefix
from graphexec.kernels.sample import SamplerVariant
from graphexec.plan import StepPlan, StepResult
from graphexec.slots import SlotLimits

__all__ = ["ScheduledStep", "Scheduler"]

IntArray = NDArray[np.int64]

_WORD_BYTES = 4
_AMPLE = 1 << 20  # steps after which room is measured again where nobody needs any
_NAMES = tuple(variant.value for variant in SamplerVariant)
_COSTS = {name: cost for cost, name in enumerate(_NAMES)}  # by plain strings: an enum's own hash is slow


@dataclass(frozen=True, slots=True)
class ScheduledStep:
    """A plan, and the slot-to-request mapping frozen for it.

    Attributes:
        plan: what the backend submits.
        owners: by slot, or None.
        tenures: `[S]` int64, which of the slot's owners that is, by count.
        is_mixed: whether there are prompt chunks of several tokens.
        whole_prompts: slots whose last prompt token is computed in this step.
        prompt_chunks: all chunks of the step, by slot, if it reports log-probabilities of a prompt; else empty.
    """

    plan: StepPlan
    owners: tuple[Generation | None, ...]
    tenures: IntArray
    is_mixed: bool = False
    whole_prompts: tuple[int, ...] = ()
    prompt_chunks: dict[int, PromptChunk] | None = None


class Scheduler:
    """Continuous batching: running requests first, then prompt chunks, then admissions, first come first served."""

    def __init__(
        self, limits: SlotLimits, allocator: BlockAllocator, max_batched_tokens: int, lookahead: int,
        max_chunk_tokens: int | None = None, long_prompt_share: float = 1.0,
    ) -> None:  # fmt: skip
        self._limits = limits
        self._allocator = allocator
        self._prefixes = allocator.prefixes
        self._max_batched_tokens = max_batched_tokens
        self._max_chunk_tokens = max_batched_tokens if max_chunk_tokens is None else max_chunk_tokens
        self._long_prompt_share = long_prompt_share
        self._lookahead = lookahead  # tokens of KV space reserved ahead, so that no slot parks meanwhile
        self._placements: dict[Generation, Placement] = {}
        self._waiting: OrderedDict[Placement, None] = OrderedDict()
        self._prefilling: dict[Placement, None] = {}
        self._running: dict[Placement, None] = {}  # in the order of admission
        self._owners: list[Generation | None] = [None] * limits.max_slots
        self._free_slots = list(range(limits.max_slots - 1, -1, -1))
        self._retiring: deque[tuple[int, int]] = deque()  # slots, and the step whose delta released them
        self._releases: list[int] = []  # slots whose release has not been submitted
        self._variants = [0] * len(SamplerVariant)  # requests that have a slot, by the cost of their sampler
        self._chunks: dict[int, PromptChunk] = {}  # of the step that is being scheduled
        self._whole_prompts: list[int] = []  # likewise
        self._decoding = np.zeros(limits.max_slots, dtype=bool)
        self._scheduled = np.zeros(limits.max_slots, dtype=np.int64)  # tokens computed once the steps in flight ran
        self._capacity = np.zeros(limits.max_slots, dtype=np.int64)  # tokens that the slot's KV blocks hold
        self._last = np.zeros(limits.max_slots, dtype=np.int64)  # tokens that the request computes, at most
        self._tables = np.zeros((limits.max_slots, limits.max_blocks), dtype=np.int32)  # KV blocks, as on the device
        self._held = np.zeros(limits.max_slots, dtype=np.int64)  # how many of them
        self._tenures = np.zeros(limits.max_slots, dtype=np.int64)  # counted up when an owner comes, and when it goes
        self._plain = np.zeros(limits.max_slots, dtype=bool)  # see Generation
        self._outputs: list[list[int]] = [[]] * limits.max_slots  # token_ids of the owners
        self._room = 0  # each decoding slot that will need more blocks has room for so many tokens, at least
        self._refused: Placement | None = None  # found no room when it was looked up last, with this slack:
        self._refused_slack = 0
        self.preemptions = 0
        self.prefix_cached_tokens = 0

    def add(self, generation: Generation) -> None:
        """Puts a new request at the end of the queue."""
        placement = self._placements[generation] = Placement(generation)
        self._waiting[placement] = None

    def abort(self, generation: Generation) -> None:
        """Ends a request wherever it is. Its blocks are free at once, its slot once the steps in flight are collected.

        Blocks need no wait: whatever a step in flight still writes is written before anything that comes later (F5).
        """
        placement = self._placements.pop(generation)
        if placement.slot is None:
            del self._waiting[placement]
        else:
            self._releases.append(self._detach(placement))

    def retire(self, generation: Generation) -> None:
        """Takes out a request that the device has stopped: its slot is free for a new owner (F5: it was collected)."""
        self._free_slots.append(self._detach(self._placements.pop(generation)))

    def plain_slots(self, scheduled: ScheduledStep) -> tuple[NDArray[np.bool_], list[list[int]]]:
        """Slots that still have the owner of that step, whose tokens are just tokens; and by slot, its output."""
        return (scheduled.tenures == self._tenures) & self._plain, self._outputs

    def retire_at_nan(self, generation: Generation) -> bool:
        """Takes out a request whose logits held NaN, and from the prefix cache what may be the cause.

        Returns whether it is computed again: it had found blocks in the cache that nobody had vouched for, so that the
        NaN need not be its own. The second time it reads only blocks that are sound, so there is no third.
        """
        placement = self._placements[generation]
        blocks, inherited = self._blocks_of(placement), False
        if self._prefixes is not None:
            inherited = self._prefixes.doubts(blocks[: placement.shared])
            self._prefixes.drop(blocks[: placement.entered])
        placement.entered = len(blocks)  # what it has computed since is not for others
        self._free_slots.append(self._detach(placement))
        if inherited:
            placement.distrusts = True
            self._wait_first(placement)
            return True
        del self._placements[generation]
        return False

    def vouch(self, scheduled: ScheduledStep, result: StepResult) -> None:
        """The prompts of a collected step that gave a token without NaN have sound blocks."""
        if self._prefixes is None:
            return
        for slot in scheduled.whole_prompts:
            generation = scheduled.owners[slot]
            placement = None if generation is None else self._placements.get(generation)
            if placement is not None and placement.slot == slot and result.num_tokens[slot] > 0:
                self._prefixes.vouch_for(self._blocks_of(placement)[: placement.entered])

    @property
    def may_chunk(self) -> bool:
        """Whether the next step may hold prompt chunks, as far as can be told without scheduling it."""
        if self._prefilling:
            return True
        if not (self._waiting and self._free_slots):
            return False
        return next(iter(self._waiting)) is not self._refused or self._slack() > self._refused_slack

    @property
    def wants_chunks(self) -> bool:
        """Whether some prompt is not computed, or not to its end."""
        return bool(self._prefilling or self._waiting)

    def short_of_blocks(self) -> bool:
        """Whether some decoding request cannot compute its next token without a block that is not there."""
        if self._room > 0:
            return False
        missing = self._decodable() & (self._scheduled >= self._capacity)
        return int(np.count_nonzero(missing)) > self._allocator.free

    def preempt_for_blocks(self) -> None:
        """Sends the newest requests back to the queue until the others have their blocks; nothing is in flight.

        Since every step that ran them was collected (F6), their tokens are all known, and are computed again later.
        """
        while self.short_of_blocks():
            placement = next(reversed(self._running))
            self._releases.append(self._detach(placement))
            self._wait_first(placement)
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
        if self._room <= self._lookahead:
            self._supply_blocks(deltas, decodes)
        self._scheduled += decodes
        self._room -= 1
        decoding = int(np.count_nonzero(decodes))
        budget = self._max_batched_tokens - decoding
        if decoding:
            budget = min(budget, self._max_chunk_tokens)
        crowded = len(self._prefilling) + len(self._waiting) > 1
        most = max(1, int(budget * self._long_prompt_share)) if crowded else budget
        self._admit(deltas, self._continue_prompts(deltas, budget, most), most)
        # A request that waits for the slot of an aborted one needs a step that carries the release.
        if not self._chunks and not decoding and not (self._releases and self._waiting):
            return None
        for slot in self._releases:
            deltas.release(slot)
            self._retiring.append((slot, step))
        self._releases.clear()
        delta = deltas if len(deltas) else None
        if not self._chunks:
            return ScheduledStep(StepPlan(self._variant(), delta), tuple(self._owners), self._tenures.copy())
        chunks, self._chunks = self._chunks, {}
        whole_prompts, self._whole_prompts = tuple(self._whole_prompts), []
        reported = chunks if self._reports_prompt(chunks) else None
        plan = StepPlan(PROMPT_LOGPROBS if reported else self._variant(), delta)
        is_mixed = any(chunk.end - chunk.begin > 1 for chunk in chunks.values())
        return ScheduledStep(plan, tuple(self._owners), self._tenures.copy(), is_mixed, whole_prompts, reported)

    def _decodable(self) -> NDArray[np.bool_]:
        return self._decoding & (self._scheduled < self._last)

    def _supply_blocks(self, deltas: SlotDeltas, decodes: NDArray[np.bool_]) -> None:
        """Gives KV blocks to those that need one within the lookahead, and with them to those that soon will.

        A step with a delta begins with applying it. So the slots that come to their next block within half a block's
        steps get it along, and most steps have no delta.
        """
        size, free = self._limits.block_size, self._allocator.free
        wanted = np.minimum(self._scheduled + (1 + self._lookahead + size // 2), self._last)
        short = np.flatnonzero(decodes & (wanted > self._capacity))
        if not len(short):
            self._measure_room()
            return
        counts = -(-(wanted - self._capacity)[short] // size)
        if counts.sum() > free:  # one for each, the neediest first
            order = np.argsort((self._capacity - self._scheduled)[short])
            short = short[order[:free]]
            counts = np.ones_like(short)
        blocks = self._allocator.take(int(counts.sum()))
        assert blocks is not None
        held = self._held[short]
        deltas.grow(short, held, counts, blocks)
        offsets = np.arange(len(blocks)) - np.repeat(np.cumsum(counts) - counts, counts)
        self._tables[np.repeat(short, counts), np.repeat(held, counts) + offsets] = blocks
        self._held[short] = held + counts
        self._capacity[short] += counts * size
        self._measure_room()

    def _measure_room(self) -> None:
        grows = self._decoding & (self._capacity < self._last)
        room = (self._capacity - self._scheduled)[grows]
        self._room = int(room.min()) if len(room) else _AMPLE

    def _continue_prompts(self, deltas: SlotDeltas, budget: int, most: int) -> int:
        """Arms the next chunks of prompts that are being computed, each of `most` rows; returns how many are left."""
        for placement in list(self._prefilling):
            if budget <= 0:
                break
            budget -= self._arm_chunk(deltas, placement, min(budget, most))
        return budget

    def _admit(self, deltas: SlotDeltas, budget: int, most: int) -> None:
        room = self._limits.max_shared_blocks
        while self._waiting and self._free_slots and budget > 0:
            placement = next(iter(self._waiting))
            generation, slack = placement.generation, self._slack()
            if placement is self._refused and slack <= self._refused_slack:
                break  # nothing was freed since; and to look a long prompt up may cost more than the rest of the step
            placement.words = generation.words()
            prefix = self._cached_prefix(placement)
            room -= len(prefix.blocks)
            if room < 0:
                break
            num_tokens, size = generation.num_tokens, self._limits.block_size
            if not deltas.has_room_for(generation.request.admission):
                break
            needed = -(-num_tokens // size) - len(prefix.blocks)
            # One block for each running request is left alone, or the newcomer would soon be preempted for it. Where
            # there are plenty, it gets the next one along: else each newcomer would soon need a delta of its own.
            soon = min(num_tokens + 1 + self._lookahead + size // 2, generation.request.max_len - 1)
            ample = max(-(-soon // size) - len(prefix.blocks), needed)
            take, spare = self._allocator.take, len(self._running)
            blocks = take(ample, prefix.blocks, 2 * self._limits.max_slots) or take(needed, prefix.blocks, spare)
            if blocks is None:
                self._refused, self._refused_slack = placement, slack
                break
            del self._waiting[placement]
            self._attach(deltas, placement, prefix, blocks)
            budget -= self._arm_chunk(deltas, placement, min(budget, most))

    def _slack(self) -> int:
        """Blocks that a newcomer may take."""
        return self._allocator.free - len(self._running)

    def _cached_prefix(self, placement: Placement) -> Prefix:
        if self._prefixes is None or not placement.generation.request.reads_prefix_cache:
            return NO_PREFIX
        # One token at least is computed: the next one is chosen by its logits.
        return self._prefixes.find(placement.words[:-_WORD_BYTES], sound_only=placement.distrusts)

    def _enter_blocks(self, placement: Placement, words: bytes, written: int, sound: bool = False) -> None:
        """Makes the full blocks of the first `written` tokens findable, whose KV this or an earlier step writes.

        Their readers come later on the compute stream, or in this very step, where each layer writes the KV of all rows
        (`rope_write`) before it attends to any. Nobody writes into them again: a slot writes from its `seq_lens` on,
        which is never less than `written`, and so do the steps in flight that still run it when its request has left.
        """
        if self._prefixes is None:
            return
        entered, full = placement.entered, written // self._limits.block_size
        if entered < full:
            tokens = words[entered * self._limits.block_size * _WORD_BYTES :]
            blocks = self._tables[placement.slot, entered:full].tolist()
            placement.chain = self._prefixes.enter(placement.chain, tokens, blocks, sound)
            placement.entered = full

    def _attach(self, deltas: SlotDeltas, placement: Placement, prefix: Prefix, blocks: list[int]) -> None:
        slot, generation = self._free_slots.pop(), placement.generation
        request = generation.request
        placement.slot = slot
        placement.shared = placement.entered = len(prefix.blocks)
        placement.chain = prefix.chain
        placement.computed = placement.shared * self._limits.block_size
        self.prefix_cached_tokens += placement.computed
        deltas.admit(slot, request.admission, placement.computed, generation.num_tokens)
        deltas.supply(slot, 0, prefix.blocks)
        blocks = [*prefix.blocks, *blocks]
        self._held[slot] = len(blocks)
        self._tables[slot, : len(blocks)] = blocks
        self._owners[slot], self._outputs[slot] = generation, generation.token_ids
        self._tenures[slot] += 1
        self._plain[slot] = generation.is_plain
        self._running[placement] = None
        self._prefilling[placement] = None
        self._variants[_COSTS[request.variant.value]] += 1
        self._capacity[slot] = len(blocks) * self._limits.block_size
        self._last[slot] = request.max_len - 1  # the last token that is sampled is not computed

    def _arm_chunk(self, deltas: SlotDeltas, placement: Placement, budget: int) -> int:
        slot, begin, request = placement.slot, placement.computed, placement.generation.request
        assert slot is not None
        known = len(placement.words) // _WORD_BYTES
        end = min(known, begin + budget)
        size = self._limits.block_size
        first_block = -(-begin // size)
        last_block = int(self._held[slot]) if end == known else -(-end // size)
        # A log-probability needs the token behind the chunk's last one, if the prompt has one.
        behind = request.params.prompt_logprobs is not None and end < len(request.prompt_token_ids)
        tokens = placement.words[begin * _WORD_BYTES : (end + behind) * _WORD_BYTES]
        deltas.arm(slot, begin, tokens, end - begin)
        self._chunks[slot] = PromptChunk(begin, end)
        deltas.supply(slot, first_block, self._tables[slot, first_block:last_block].tolist())
        placement.computed = end
        self._enter_blocks(placement, placement.words, end)
        if end == known:
            del self._prefilling[placement]
            self._whole_prompts.append(slot)
            self._decoding[slot] = True
            self._scheduled[slot] = known
            self._room = min(self._room, int(self._capacity[slot]) - known)
        return end - begin

    def _detach(self, placement: Placement) -> int:
        """Takes a request out of its slot, which is returned; its blocks are free, or kept by the prefix cache."""
        slot, generation = placement.slot, placement.generation
        assert slot is not None
        if self._decoding[slot] and generation.num_tokens * _WORD_BYTES > len(placement.words):
            # Its newest token was sampled, and no step that was collected has written its KV. The KV before it was
            # attended to without NaN.
            self._enter_blocks(placement, generation.words(), generation.num_tokens - 1, sound=True)
        self._allocator.give_back(self._blocks_of(placement))
        placement.slot = None
        self._owners[slot], self._outputs[slot] = None, []
        self._tenures[slot] += 1
        self._plain[slot] = False
        self._decoding[slot] = False
        del self._running[placement]
        self._prefilling.pop(placement, None)
        self._variants[_COSTS[generation.request.variant.value]] -= 1
        return slot

    def _blocks_of(self, placement: Placement) -> list[int]:
        """KV blocks of a request that has a slot, in the order of its tokens."""
        slot = placement.slot
        assert slot is not None
        blocks: list[int] = self._tables[slot, : self._held[slot]].tolist()
        return blocks

    def _wait_first(self, placement: Placement) -> None:
        self._waiting[placement] = None
        self._waiting.move_to_end(placement, last=False)

    def _free_retired(self, collected: int) -> None:
        """Frees slots whose last step under the old owner, the one before their release, was collected (F5)."""
        while self._retiring and self._retiring[0][1] - 1 <= collected:
            self._free_slots.append(self._retiring.popleft()[0])

    def _reports_prompt(self, chunks: dict[int, PromptChunk]) -> bool:
        """Whether log-probabilities were asked for of one of these chunks."""
        owners = ((self._owners[slot], chunk) for slot, chunk in chunks.items())
        return any(owner is not None and owner.request.wants_prompt_logprobs(chunk.begin) for owner, chunk in owners)

    def _variant(self) -> str:
        """The cheapest that serves all who have a slot."""
        return next((_NAMES[cost] for cost in reversed(range(len(_NAMES))) if self._variants[cost]), _NAMES[0])
