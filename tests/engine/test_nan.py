"""A NaN in one request's KV costs that request and nobody else, though its blocks are shared as soon as scheduled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import graphexec.kernels.attention as attention
from graphexec import BackendConfig, Engine, EngineConfig, SamplingParams
from graphexec.deltas import as_words
from graphexec.engine.scheduling.placement import Placement
from graphexec.kernels.rope_write import rope_write
from tests.support.checkpoints import make_checkpoint

PROMPT = list(range(10, 50))  # five blocks of 8
GREEDY = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)

Poisoned = Callable[[int, int, int], bool]
"""Whether the KV of a row is to be NaN: by step, slot and position."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("small") / "model")


def open_engine(checkpoint: Path, depth: int = 1, **settings: object) -> Engine:
    values = {"max_num_seqs": 4, "max_model_len": 96, "max_num_batched_tokens": 48, "num_kv_blocks": 60} | settings
    return Engine(
        EngineConfig(
            model=str(checkpoint), device="cpu", dtype="float64", kv_block_size=8, overlap_depth=depth,
            backend=BackendConfig(name="eager", step_timeout_s=30), **values,
        )
    )  # fmt: skip


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> dict[tuple[int, ...], list[int]]:
    prompts = [PROMPT, [*PROMPT, 60], [*PROMPT[:24], 70, 71], [5]]
    with open_engine(checkpoint, 0, prefix_caching=False) as engine:
        return {tuple(p): list(engine.generate(p, GREEDY)[0].token_ids) for p in prompts}


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Callable[[Engine, Poisoned], None]:
    """Puts NaN among the values of chosen rows, as they are written, from the next step on."""

    def begin(engine: Engine, is_poisoned: Poisoned) -> None:
        def write(*args: object) -> torch.Tensor:
            query = rope_write(*args)  # type: ignore[arg-type]  # whatever the operator was called with
            rows, v_cache, kv_slots = attention._rows.get(), args[7], args[8]
            assert isinstance(v_cache, torch.Tensor)
            assert isinstance(kv_slots, torch.Tensor)
            step, size = int(engine._program._io.counter), v_cache.shape[2]
            for row, (slot, position) in enumerate(
                zip(rows.step.row_slot.tolist()[: rows.rows], rows.step.positions.tolist(), strict=False)
            ):
                if slot >= 0 and is_poisoned(step, slot, position):
                    v_cache[kv_slots[row] // size, :, kv_slots[row] % size] = torch.nan
            return query

        monkeypatch.setattr(attention, "rope_write", write)

    return begin


Poison = Callable[[Engine, Poisoned], None]


@pytest.mark.parametrize("depth", [0, 1, 3])
@pytest.mark.parametrize("position", [0, 9, 39])
def test_a_nan_does_not_poison_its_prefix_for_those_who_come_later(
    checkpoint: Path, expected: dict[tuple[int, ...], list[int]], poison: Poison, depth: int, position: int
) -> None:
    with open_engine(checkpoint, depth) as engine:
        poison(engine, lambda step, slot, at: step == 0 and at == position)
        (failed,) = engine.generate(PROMPT, GREEDY)
        assert (failed.finish_reason, list(failed.token_ids)) == ("error", [])
        assert "no number" in (failed.error or "")
        for prompt in (PROMPT, [*PROMPT, 60], PROMPT):
            (output,) = engine.generate(prompt, GREEDY)
            assert (output.finish_reason, output.token_ids) == ("length", expected[tuple(prompt)])
        assert engine._scheduler._allocator.free == engine.num_kv_blocks


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_who_shared_blocks_that_turned_out_to_hold_nan_is_computed_again_and_not_failed(
    checkpoint: Path, expected: dict[tuple[int, ...], list[int]], poison: Poison, depth: int
) -> None:
    prompts = [PROMPT, PROMPT, [*PROMPT, 60], [*PROMPT[:24], 70, 71]]
    with open_engine(checkpoint, depth) as engine:
        poison(engine, lambda step, slot, at: step == 0 and slot == 0 and at == 3)
        outputs = engine.generate(prompts, GREEDY)
        assert engine.stats().prefix_cached_tokens > 0, "they were shared"
        assert [output.finish_reason for output in outputs] == ["error", "length", "length", "length"]
        for prompt, output in zip(prompts[1:], outputs[1:], strict=True):
            assert output.token_ids == expected[tuple(prompt)]
        assert engine._scheduler._allocator.free == engine.num_kv_blocks


@pytest.mark.parametrize("depth", [0, 2])
def test_a_prompt_that_gives_nan_every_time_fails_every_time_and_holds_up_nobody(
    checkpoint: Path, expected: dict[tuple[int, ...], list[int]], poison: Poison, depth: int
) -> None:
    with open_engine(checkpoint, depth, max_num_seqs=6) as engine:
        poison(engine, lambda step, slot, at: at == 30)  # of any request that is so long
        outputs = engine.generate([PROMPT, PROMPT, [5], PROMPT, PROMPT], GREEDY)
        assert [output.finish_reason for output in outputs] == ["error", "error", "length", "error", "error"]
        assert outputs[2].token_ids == expected[(5,)]
        assert engine.stats().steps < 40
        assert engine._scheduler._allocator.free == engine.num_kv_blocks


def test_a_sound_prefix_stays_when_a_request_behind_it_meets_nan(
    checkpoint: Path, expected: dict[tuple[int, ...], list[int]], poison: Poison
) -> None:
    """A shared system prompt must not be computed anew for every broken request."""
    with open_engine(checkpoint) as engine:
        engine.generate(PROMPT[:24], GREEDY)
        poison(engine, lambda step, slot, at: at == 38)
        (failed,) = engine.generate(PROMPT, GREEDY)
        assert failed.finish_reason == "error"
        before = engine.stats()
        (output,) = engine.generate([*PROMPT[:24], 70, 71], GREEDY)
        assert output.token_ids == expected[(*PROMPT[:24], 70, 71)]
        assert engine.stats().prefix_cached_tokens - before.prefix_cached_tokens == 24


def test_a_nan_in_the_output_keeps_the_prompt_and_caches_nothing_behind_it(checkpoint: Path, poison: Poison) -> None:
    with open_engine(checkpoint) as engine:
        poison(engine, lambda step, slot, at: at == 50)
        long = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)
        (failed,) = engine.generate(PROMPT, long)
        assert failed.finish_reason == "error"
        assert len(failed.token_ids) == 11, "those before it are delivered"
        prefixes = engine._scheduler._prefixes
        assert prefixes is not None
        assert len(prefixes.find(as_words([*PROMPT, *failed.token_ids])).blocks) == 5


@pytest.mark.parametrize("together", [True, False])
def test_nobody_is_computed_more_than_twice_and_later_ones_but_once(
    checkpoint: Path, poison: Poison, monkeypatch: pytest.MonkeyPatch, together: bool
) -> None:
    with open_engine(checkpoint, max_num_seqs=8) as engine:
        attached: dict[str, int] = {}
        attach = engine._scheduler._attach

        def counted(deltas: object, placement: Placement, *rest: object) -> None:
            name = placement.generation.request.request_id
            attached[name] = attached.get(name, 0) + 1
            attach(deltas, placement, *rest)

        monkeypatch.setattr(engine._scheduler, "_attach", counted)
        if together:  # those that come back must not share with each other what nobody has vouched for
            poison(engine, lambda step, slot, at: at == 30)
            engine.generate([PROMPT] * 8, GREEDY)
            assert set(attached.values()) == {1, 2}
        else:
            poison(engine, lambda step, slot, at: step == 0 and at == 3)
            engine.generate(PROMPT, GREEDY)
            for _ in range(3):
                assert engine.generate(PROMPT, GREEDY)[0].finish_reason == "length"
            assert set(attached.values()) == {1}


def test_equal_prompts_that_come_together_share_their_blocks_at_once(checkpoint: Path) -> None:
    """Early sharing is what the doubts are for: a block is found in the very step that computes it."""
    with open_engine(checkpoint) as engine:
        engine.generate([PROMPT] * 4, GREEDY)
        assert engine.stats().prefix_cached_tokens == 3 * 32
