"""The sampling kernels under the interpreter, and their references, on the CPU."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graphexec.kernels import adjust
from graphexec.kernels.adjust import adjust_reference, adjust_triton
from graphexec.kernels.philox import philox_reference, uniform_reference
from graphexec.kernels.sample import SampleOutput, SamplerVariant, sample, sample_reference
from graphexec.kernels.thresholds import cut_reference
from tests.support.penalty_cases import check_penalties_of_long_sequences
from tests.support.sampling_cases import (
    KNOWN_ANSWERS,
    POISON,
    SamplingCase,
    adjusted_row,
    check_flag,
    check_kernel_agrees_with_reference,
    check_kernel_words,
    check_logprobs,
    check_rows_ignore_their_batch,
    crowded_case,
    defensible,
    flat_case,
    kept_by_sorting,
    kernel_words,
    make_state,
    masked_row,
    poisoned_output,
    run_kernel,
    run_reference,
    sampling_cases,
    scaled_row,
    zeros_case,
)

needs_interpreter = pytest.mark.skipif(
    torch.cuda.is_available(), reason="where there is a GPU, tests/gpu runs the compiled kernels"
)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
VOCABULARIES = (1, 7, 2048, 5003)
few = settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
many = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_the_reference_gives_the_published_philox_words(counter, key, words):
    seed = torch.tensor(key[0]) | (torch.tensor(key[1]) << 32)
    got = philox_reference(seed, *(torch.tensor(c) for c in counter))
    assert tuple(int(word) for word in got) == words


@needs_interpreter
def test_the_kernel_gives_the_published_philox_words():
    seeds = [key[0] | (key[1] << 32) for _, key, _ in KNOWN_ANSWERS]
    words, _ = kernel_words(seeds, [counter for counter, _, _ in KNOWN_ANSWERS], "cpu")
    assert [tuple(row) for row in words.tolist()] == [words for _, _, words in KNOWN_ANSWERS]


@needs_interpreter
def test_kernel_and_reference_give_the_same_words_and_uniforms():
    check_kernel_words(
        [0, 1, 2**63 + 5, 2**64 - 1], [(0, 0, 0, 0), (5, 2**31, 0, 7), (2**32 - 1, 1, 2, 3), (9,) * 4], "cpu"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uniforms_stay_inside_the_open_interval(dtype):
    lowest, highest = uniform_reference(torch.tensor([0, 2**32 - 1]), dtype).tolist()
    assert lowest == 2.0**-24
    assert highest == 1 - 2.0**-24


@needs_interpreter
@pytest.mark.parametrize("variant", list(SamplerVariant))
@few
@given(data=st.data())
def test_the_kernel_agrees_with_the_reference(variant, data):
    check_kernel_agrees_with_reference(data.draw(sampling_cases(DTYPES, VOCABULARIES, 3)), variant, "cpu")


@needs_interpreter
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_token_gets_its_own_noise_and_top_k_keeps_exactly_k(dtype):
    case = flat_case(dtype, 15, 8191)
    check_kernel_agrees_with_reference(case, SamplerVariant.SHAPED, "cpu")


@needs_interpreter
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_zeros_of_both_signs_are_tied(dtype):
    case = zeros_case(dtype, 14)
    check_kernel_agrees_with_reference(case, SamplerVariant.SHAPED, "cpu")
    assert set(run_kernel(case, SamplerVariant.SHAPED, "cpu").tokens.tolist()) == {0, 1, 2, 3, 4}


@needs_interpreter
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_many_seeds_with_all_filters_agree_with_the_reference(dtype):
    check_kernel_agrees_with_reference(crowded_case(dtype, 20, 700), SamplerVariant.SHAPED, "cpu")


@needs_interpreter
@settings(few, max_examples=4)
@given(case=sampling_cases(DTYPES, (7, 5003), 3))
def test_a_row_of_the_kernel_ignores_its_batch(case):
    check_rows_ignore_their_batch(case, "cpu")


@many
@given(case=sampling_cases((*DTYPES, torch.float64), VOCABULARIES))
def test_a_row_of_the_reference_ignores_its_batch(case):
    check_rows_ignore_their_batch(case, None)


@many
@given(case=sampling_cases((torch.float64,), VOCABULARIES))
def test_the_float64_reference_meets_the_definition(case):
    out = run_reference(case, SamplerVariant.LOGPROBS)
    for row, slot in enumerate(case.slots.tolist()):
        if slot < 0:
            assert out.tokens[row] == out.nan[row] == out.rank[row] == POISON
            continue
        check_flag(case, row, out, SamplerVariant.LOGPROBS)
        check_logprobs(case, row, out, 1e-12)
        assert out.nan[row] or defensible(case, row, int(out.tokens[row]), SamplerVariant.LOGPROBS)


@many
@given(case=sampling_cases((torch.float64,), (1, 7, 300)))
def test_the_cut_is_where_the_definition_puts_it(case):
    for row, slot in enumerate(case.slots.tolist()):
        if slot < 0 or not bool(masked_row(case, row, SamplerVariant.SHAPED).isfinite().any()):
            continue
        values, state = masked_row(case, row, SamplerVariant.SHAPED), case.state
        top_k, top_p = state.top_k[slot], state.top_p[slot]
        scaled = scaled_row(values, 0.7)
        cut = cut_reference(values[None], scaled[None], top_k[None], top_p[None])
        kept = (values >= cut[0]) & (values > float("-inf"))
        margin = 1e-12 if top_p < 1 else 0.0
        assert (kept >= kept_by_sorting(values, 0.7, int(top_k), float(top_p) - margin)).all()
        assert (kept <= kept_by_sorting(values, 0.7, int(top_k), float(top_p) + margin)).all()


def test_top_k_keeps_all_tokens_tied_at_the_kth():
    values = torch.tensor([3.0, 1.0, 2.0, 2.0, 2.0])
    assert kept_by_sorting(values.double(), 1.0, 2, 1.0).tolist() == [True, False, True, True, True]
    cut = cut_reference(values[None], values[None] - 3, torch.tensor([2]), torch.tensor([1.0]))
    assert cut.item() == 2.0


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [(1.0, 0, 1.0, 0.0), (0.7, 9, 1.0, 0.0), (1.5, 0, 0.8, 0.0), (0.9, 10, 0.85, 0.0), (1.2, 0, 0.9, 0.2)],
)
def test_the_tokens_follow_the_filtered_softmax(temperature, top_k, top_p, min_p):
    draws, vocabulary = 40_000, 16
    values = 2 * torch.randn(vocabulary, generator=torch.Generator().manual_seed(5))
    state = make_state(
        draws, temperature=temperature, top_k=top_k, top_p=top_p,
        seed=list(range(draws)), num_tokens=list(range(draws)),
        log_min_p=math.log(min_p) if min_p else float("-inf"),
    )  # fmt: skip
    case = SamplingCase(values.expand(draws, -1).contiguous(), torch.arange(draws, dtype=torch.int32), state)
    out = run_reference(case, SamplerVariant.SHAPED)
    kept = kept_by_sorting(values.double(), temperature, top_k, top_p, math.log(min_p) if min_p else float("-inf"))
    expected = torch.where(kept, scaled_row(values.double(), temperature).exp(), 0.0)
    expected = draws * expected / expected.sum()
    counts = torch.bincount(out.tokens.long(), minlength=vocabulary).double()
    assert counts[~kept].sum() == 0
    freedom = int(kept.sum()) - 1
    chi_square = ((counts - expected)[kept] ** 2 / expected[kept]).sum()
    assert chi_square < freedom + 5 * (2 * freedom) ** 0.5


def test_the_check_rejects_tokens_that_rounding_cannot_explain():
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(1))
    state = make_state(1, temperature=1.0, top_k=20, top_p=0.9, seed=3)
    case = SamplingCase(logits, torch.tensor([0], dtype=torch.int32), state)
    token = int(run_reference(case, SamplerVariant.SHAPED).tokens)
    assert [t for t in range(50) if defensible(case, 0, t, SamplerVariant.SHAPED)] == [token]


@needs_interpreter
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_top_p_is_a_share_of_what_min_p_leaves(dtype):
    """Of two tokens that min-p leaves, the first has 0.73 of their mass; of all mass it had a thirtieth."""
    logits = torch.tensor([0.0, -1.0, *[-2.0] * 200]).to(dtype).expand(20, -1).contiguous()
    state = make_state(20, temperature=1.0, log_min_p=-1.5, top_p=0.7, seed=list(range(20)))
    case = SamplingCase(logits, torch.arange(20, dtype=torch.int32), state)
    for out in (run_reference(case, SamplerVariant.SHAPED), run_kernel(case, SamplerVariant.SHAPED, "cpu")):
        assert out.tokens.tolist() == [0] * 20


@needs_interpreter
def test_penalties_count_output_and_prompt_as_they_should():
    """Ids 1 and 2 in the prompt, 2 twice and 3 once in the output."""
    logits = torch.tensor([[1.0, 1.0, 1.0, 1.0, -1.0]])
    state = make_state(
        1, tokens=[[1, 2, 2, 3, 2]], num_tokens=5, prompt_len=2,
        repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25, biases=[{3: 1.0, 4: float("-inf")}],
    )  # fmt: skip
    case = SamplingCase(logits, torch.zeros(1, dtype=torch.int32), state)
    expected = [1.0, 0.5, 0.5 - 0.5 - 0.5, 1.0 - 0.25 - 0.5, float("-inf")]
    assert adjusted_row(case, 0).tolist() == expected
    for run in (adjust_reference, adjust_triton):
        adjusted = logits.clone()
        run(adjusted, case.slots, state)
        assert adjusted.tolist() == [expected]


@needs_interpreter
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("known", [0, 1, 127, 1023, 1024, 1025, 2100])
def test_penalties_over_sequences_around_the_tile_adjust_every_id_once(dtype, known, monkeypatch):
    monkeypatch.setattr(adjust, "_PROGRAMS", 1)  # as in a large batch, where rows share a table of counts
    generator = torch.Generator().manual_seed(known)
    ids = torch.randint(40, (known,), generator=generator).tolist()
    state = make_state(
        3, tokens=[ids, ids[::-1], ids], num_tokens=known, prompt_len=[known // 3, 0, known // 2],
        repetition_penalty=[1.25, 1.0, 1.0], frequency_penalty=[0.0, 0.25, 0.0], presence_penalty=[0.0, 0.0, 0.5],
    )  # fmt: skip
    logits = torch.randn(3, 50, generator=generator).to(dtype)
    case = SamplingCase(logits, torch.tensor([1, 2, 0], dtype=torch.int32), state)
    for run in (adjust_reference, adjust_triton):
        adjusted = logits.clone()
        run(adjusted, case.slots, state)
        assert torch.equal(adjusted, torch.stack([adjusted_row(case, row) for row in range(3)]))


@needs_interpreter
def test_tables_of_counts_serve_one_row_after_the_other(monkeypatch):
    monkeypatch.setattr(adjust, "_PROGRAMS", 2)
    check_penalties_of_long_sequences(5, "cpu")


@needs_interpreter
def test_no_active_row_means_nothing_is_written():
    case = SamplingCase(
        torch.randn(3, 7), torch.full((3,), -1, dtype=torch.int32), make_state(2, temperature=1.0, top_p=0.5)
    )
    check_kernel_agrees_with_reference(case, SamplerVariant.LOGPROBS, "cpu")


@needs_interpreter
def test_stop_ids_cannot_be_chosen_before_the_minimum_length():
    logits = torch.zeros(3, 7)
    logits[:, 4] = 50.0
    state = make_state(3, temperature=[0.0, 1.0, 1.0], num_tokens=[5, 5, 6], min_len=6, stop_ids=[[4, -1]] * 3)
    case = SamplingCase(logits, torch.arange(3, dtype=torch.int32), state)
    for out in (run_reference(case, SamplerVariant.SHAPED), run_kernel(case, SamplerVariant.SHAPED, "cpu")):
        assert out.tokens[0] == 0
        assert out.tokens[1] != 4
        assert out.tokens[2] == 4


@needs_interpreter
def test_a_row_whose_only_finite_token_is_masked_is_flagged():
    logits = torch.tensor([[float("-inf"), 1.0, float("-inf")]])
    state = make_state(1, temperature=1.0, num_tokens=0, min_len=1, stop_ids=[[1]])
    case = SamplingCase(logits, torch.zeros(1, dtype=torch.int32), state)
    for out in (run_reference(case, SamplerVariant.SHAPED), run_kernel(case, SamplerVariant.SHAPED, "cpu")):
        assert out.nan.tolist() == [1]
        assert out.tokens.tolist() == [0]


@pytest.mark.parametrize("top", [0, 20])
def test_the_buffer_shape_decides_how_many_logprobs(top):
    case = SamplingCase(torch.randn(2, 30), torch.tensor([1, 0], dtype=torch.int32), make_state(2))
    out = poisoned_output(2, top, "cpu")
    sample(case.logits, case.slots, case.state, SamplerVariant.LOGPROBS, out)
    for row in range(2):
        check_logprobs(case, row, out, 1e-4)


def test_slots_without_stop_entries_are_legal():
    case = SamplingCase(torch.randn(1, 9), torch.zeros(1, dtype=torch.int32), make_state(1, stops=0, min_len=5))
    out = run_reference(case, SamplerVariant.GREEDY)
    assert out.tokens[0] == case.logits[0].argmax()


def test_an_empty_batch_is_legal():
    sample_reference(
        torch.empty(0, 9),
        torch.empty(0, dtype=torch.int32),
        make_state(1),
        SamplerVariant.SHAPED,
        poisoned_output(0, 0, "cpu"),
    )


def test_logprobs_without_buffers_are_refused():
    out = SampleOutput(torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32))
    with pytest.raises(ValueError, match="give SampleOutput all three"):
        sample(torch.zeros(1, 3), torch.zeros(1, dtype=torch.int32), make_state(1), SamplerVariant.LOGPROBS, out)


def test_the_largest_variant_serves_all():
    assert max(SamplerVariant.LOGPROBS, SamplerVariant.SHAPED, SamplerVariant.GREEDY) is SamplerVariant.LOGPROBS
    assert max(SamplerVariant.GREEDY, SamplerVariant.SAMPLED) is SamplerVariant.SAMPLED
    assert max(SamplerVariant.SAMPLED, SamplerVariant.SHAPED) is SamplerVariant.SHAPED
    assert sorted(SamplerVariant, reverse=True)[-1] is SamplerVariant.GREEDY
    assert SamplerVariant("sampled") == "sampled"
