"""The compiled sampling kernels on a GPU, held to the references on the CPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graphexec.kernels.sample import SampleOutput, SamplerVariant, sample
from tests.support.penalty_cases import check_penalties_of_long_sequences
from tests.support.sampling_cases import (
    KNOWN_ANSWERS,
    check_kernel_agrees_with_reference,
    check_kernel_words,
    check_rows_ignore_their_batch,
    crowded_case,
    flat_case,
    kernel_words,
    poisoned_output,
    run_kernel,
    sampling_cases,
    zeros_case,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
VOCABULARIES = (1, 7, 2048, 5003)
suite = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def test_the_kernel_gives_the_published_philox_words():
    seeds = [key[0] | (key[1] << 32) for _, key, _ in KNOWN_ANSWERS]
    words, _ = kernel_words(seeds, [counter for counter, _, _ in KNOWN_ANSWERS], "cuda")
    assert [tuple(row) for row in words.tolist()] == [words for _, _, words in KNOWN_ANSWERS]


def test_kernel_and_reference_give_the_same_words_and_uniforms():
    counters = [(0, 0, 0, 0), (5, 2**31, 0, 7), (2**32 - 1, 1, 2, 3), (9, 9, 9, 9)]
    check_kernel_words([0, 1, 2**63 + 5, 2**64 - 1], counters, "cuda")


@pytest.mark.parametrize("variant", list(SamplerVariant))
@suite
@given(data=st.data())
def test_the_kernel_agrees_with_the_reference(variant, data):
    check_kernel_agrees_with_reference(data.draw(sampling_cases(DTYPES, VOCABULARIES)), variant, "cuda")


@settings(suite, max_examples=15)
@given(case=sampling_cases(DTYPES, VOCABULARIES))
def test_a_row_ignores_its_batch(case):
    check_rows_ignore_their_batch(case, "cuda")


def test_tables_of_counts_serve_one_row_after_the_other():
    check_penalties_of_long_sequences(200, "cuda")  # three or four rows to a table


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_token_gets_its_own_noise_and_top_k_keeps_exactly_k(dtype):
    case = flat_case(dtype, 400, 8191)
    check_kernel_agrees_with_reference(case, SamplerVariant.SHAPED, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_of_both_signs_are_tied(dtype):
    case = zeros_case(dtype, 64)
    check_kernel_agrees_with_reference(case, SamplerVariant.SHAPED, "cuda")
    assert set(run_kernel(case, SamplerVariant.SHAPED, "cuda").tokens.tolist()) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_seeds_with_all_filters_agree_with_the_reference(dtype):
    differing = check_kernel_agrees_with_reference(crowded_case(dtype, 240, 5003), SamplerVariant.LOGPROBS, "cuda")
    assert differing <= 5  # each within rounding; more would mean a bias rather than rounding


@pytest.mark.parametrize("variant", list(SamplerVariant))
def test_a_real_vocabulary_agrees_with_the_reference(variant):
    case = crowded_case(torch.bfloat16, 64, 151_936)
    assert check_kernel_agrees_with_reference(case, variant, "cuda") <= 2


def test_a_row_of_a_real_vocabulary_ignores_its_batch():
    check_rows_ignore_their_batch(crowded_case(torch.bfloat16, 64, 151_936), "cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("variant", list(SamplerVariant))
def test_a_captured_sample_replays_the_eager_result(variant, dtype):
    case = crowded_case(dtype, 20, 5003).on("cuda")
    logprobs = torch.float64 if dtype == torch.float64 else torch.float32
    eager, captured = (poisoned_output(20, 4, "cuda", logprobs) for _ in range(2))
    sample(case.logits, case.slots, case.state, variant, eager)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sample(case.logits, case.slots, case.state, variant, captured)
    graph.replay()
    torch.cuda.synchronize()
    assert_same(captured, eager)

    # The graph must read slots, parameters and logits on the device at each replay.
    case.slots[::3] = -1
    case.state.num_tokens.add_(1)
    case.logits.copy_(case.logits.flip(1).contiguous())
    sample(case.logits, case.slots, case.state, variant, eager)
    graph.replay()
    torch.cuda.synchronize()
    assert_same(captured, eager)


def assert_same(captured: SampleOutput, eager: SampleOutput) -> None:
    """Equal bits; ids of the top N aside, since ties have no order."""
    for name in ("tokens", "nan", "logprobs", "rank"):
        assert torch.equal(getattr(captured, name), getattr(eager, name)), name
