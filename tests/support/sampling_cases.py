"""Sampling cases and checks that serve the CPU (interpreter) and the GPU alike.

The judge of a token, `defensible`, is written from the definition with sorting and float64, apart from both
implementations; it grants a token only what rounding can explain.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from hypothesis import strategies as st

from graphexec.kernels.lang import tl, triton
from graphexec.kernels.philox import philox_reference, philox_words, uniform, uniform_reference
from graphexec.kernels.sample import SampleOutput, SamplerVariant, sample_reference, sample_triton
from graphexec.kernels.state import SlotTensors
from tests.support.step_cases import slots_on

POISON = -77
SCORE_ROUNDING = 1e-4
MASS_ROUNDING = 1e-5
KNOWN_ANSWERS = (  # Random123, kat_vectors, philox4x32 with 10 rounds: counter, key (low word first), words
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)


@dataclass(frozen=True)
class SamplingCase:
    """One call of the sampler, on the CPU."""

    logits: torch.Tensor  # [B, V]
    slots: torch.Tensor  # [B]
    state: SlotTensors

    def on(self, device: str) -> SamplingCase:
        """The same case there, with the row stride kept."""
        rows, vocabulary = self.logits.shape
        wide = torch.zeros(rows, self.logits.stride(0), dtype=self.logits.dtype, device=device)
        wide[:, :vocabulary] = self.logits.to(device)
        return SamplingCase(wide[:, :vocabulary], self.slots.to(device), slots_on(self.state, device))

    def row(self, index: int) -> SamplingCase:
        """That row alone in its batch."""
        return replace(self, logits=self.logits[index : index + 1], slots=self.slots[index : index + 1])


def make_state(size: int, stops: int = 2, **changes: object) -> SlotTensors:
    """Greedy slots without filters, except for `changes` (a list by slot, or one value for all).

    `biases` is a dict by slot from id to value; `tokens` a list of ids by slot.
    """
    stop_ids = changes.pop("stop_ids", [[-1] * stops] * size)
    biases, tokens = changes.pop("biases", []), changes.pop("tokens", [[]] * size)
    state = SlotTensors.allocate(
        size, torch.device("cpu"), tokens=max([301, *map(len, tokens)]), biases=5, stop_ids=len(stop_ids[0])
    )
    state.bias_values.fill_(float("nan"))
    for name, value in changes.items():
        column = getattr(state, name)
        column.copy_(torch.tensor(value if isinstance(value, list) else [value] * size, dtype=column.dtype))
    state.stop_ids.copy_(torch.tensor(stop_ids, dtype=torch.int32).reshape(size, -1))
    for slot, entries in enumerate(biases):
        for entry, (token, value) in enumerate(entries.items()):
            state.bias_ids[slot, 4 - entry], state.bias_values[slot, 4 - entry] = token, value
    for slot, ids in enumerate(tokens):
        state.token_ids[slot, : len(ids)] = torch.tensor(ids, dtype=torch.int32)
    return state


def _make_logits(style: str, rows: int, vocabulary: int, generator: torch.Generator) -> torch.Tensor:
    logits = 3 * torch.randn(rows, vocabulary, generator=generator)
    if style == "ties":
        logits = (logits / 2).round()  # holds -0.0 beside 0.0
    elif style == "constant":
        logits = torch.full_like(logits, 1.5)
    elif style == "peaked":
        logits[:, torch.randint(vocabulary, (1,), generator=generator)] += 12
    elif style == "infinities":
        chance = torch.rand(rows, vocabulary, generator=generator)
        logits = logits.masked_fill(chance < 0.4, float("-inf")).masked_fill(chance > 0.995, float("inf"))
    elif style == "broken":
        logits[0, torch.randint(vocabulary, (1,), generator=generator)] = float("nan")
        logits[-1] = float("-inf")
    return logits


@st.composite
def sampling_cases(
    draw: st.DrawFn, dtypes: tuple[torch.dtype, ...], vocabularies: tuple[int, ...], max_rows: int = 5
) -> SamplingCase:
    """Cases with padding rows anywhere, holes among the slots, filters in all combinations, ties and broken rows."""
    rows = draw(st.integers(1, max_rows))
    vocabulary = draw(st.sampled_from(vocabularies))
    dtype = draw(st.sampled_from(dtypes))
    style = draw(st.sampled_from(["normal", "ties", "constant", "peaked", "infinities", "broken"]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    size = rows + 3
    slots = torch.randperm(size, generator=generator)[:rows].to(torch.int32)
    padding = draw(st.lists(st.booleans(), min_size=rows, max_size=rows))
    slots[torch.tensor(padding)] = -1

    def by_slot(values: list[float]) -> list[float]:
        return draw(st.lists(st.sampled_from(values), min_size=size, max_size=size))

    stops = [[draw(st.integers(-1, min(vocabulary, 8) - 1)), -1, vocabulary - 1] for _ in range(size)]
    num_tokens = draw(st.lists(st.sampled_from([0, 1, 20, 130]), min_size=size, max_size=size))
    few_ids = max(1, min(vocabulary, draw(st.sampled_from([3, 40, 6000]))))
    bias = st.sampled_from([float("-inf"), -100.0, -1.5, 0.5, 4.0, 100.0])
    biases = st.just({}) | st.dictionaries(st.integers(0, vocabulary - 1), bias, max_size=5)
    state = make_state(
        size,
        tokens=[torch.randint(few_ids, (count,), generator=generator).tolist() for count in num_tokens],
        prompt_len=[draw(st.integers(0, count)) for count in num_tokens],
        repetition_penalty=by_slot([1.0, 1.0, 1.25, 2.0, 0.5]),
        # These multiply without rounding, so that a fused multiplication and addition gives the same.
        presence_penalty=by_slot([0.0, 0.0, 0.75, -0.5]),
        frequency_penalty=by_slot([0.0, 0.0, 0.25, -1.5]),
        biases=draw(st.lists(biases, min_size=size, max_size=size)),
        log_min_p=by_slot([float("-inf"), float("-inf"), -0.1, -1.0, -4.0, 0.0]),
        temperature=by_slot([0.0, 0.01, 0.6, 1.0, 2.5]),
        top_k=by_slot([0, 0, 1, 2, 5, 50, 6000]),
        top_p=by_slot([1.0, 1.0, 0.999, 0.9, 0.5, 0.01, 0.0]),
        seed=draw(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=size, max_size=size)),
        num_tokens=num_tokens,
        min_len=by_slot([0, 0, 21, 1000]),
        stop_ids=stops,
    )
    stride = vocabulary + draw(st.sampled_from([0, 3, 16]))
    wide = torch.full((rows, stride), float("nan"), dtype=dtype)  # what lies beyond a row must not matter
    wide[:, :vocabulary] = _make_logits(style, rows, vocabulary, generator).to(dtype)
    return SamplingCase(wide[:, :vocabulary], slots, state)


def crowded_case(dtype: torch.dtype, rows: int, vocabulary: int) -> SamplingCase:
    """Every row sampled, with all combinations of filters, over different logits; one slot in reverse order each."""
    generator = torch.Generator().manual_seed(11)
    logits = (3 * torch.randn(rows, vocabulary, generator=generator)).to(dtype)
    state = make_state(
        rows,
        temperature=[(0.5, 1.0, 3.0)[slot % 3] for slot in range(rows)],
        top_k=[(0, 40, 3, 200)[slot % 4] for slot in range(rows)],
        top_p=[(1.0, 0.95, 0.6, 0.3, 0.999)[slot % 5] for slot in range(rows)],
        seed=[slot * 0x9E3779B97F4A7C15 % 2**63 for slot in range(rows)],
        num_tokens=list(range(rows)),
        log_min_p=[(float("-inf"), -3.0, -6.0)[slot // 2 % 3] for slot in range(rows)],
    )
    return SamplingCase(logits, torch.arange(rows, dtype=torch.int32).flip(0), state)


def flat_case(dtype: torch.dtype, rows: int, vocabulary: int) -> SamplingCase:
    """So hot that a token wrongly kept, wrongly cut, or given another's noise is soon chosen."""
    logits = torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(12)).to(dtype)
    top_k = [(0, 1, 2, 3, 0)[slot % 5] for slot in range(rows)]
    top_p = [(1.0, 1.0, 1.0, 1.0, 0.0)[slot % 5] for slot in range(rows)]
    seed = [slot - 9 for slot in range(rows)]
    state = make_state(rows, temperature=40.0, top_k=top_k, top_p=top_p, seed=seed, num_tokens=7)
    return SamplingCase(logits, torch.arange(rows, dtype=torch.int32), state)


def zeros_case(dtype: torch.dtype, rows: int) -> SamplingCase:
    """Zeros of both signs are tied for the second place; top-k 2 must keep them all."""
    logits = torch.tensor([0.5, 0.0, -0.0, 0.0, -0.0, -2.0]).to(dtype).expand(rows, -1).contiguous()
    state = make_state(rows, temperature=40.0, top_k=2, seed=list(range(rows)))
    return SamplingCase(logits, torch.arange(rows, dtype=torch.int32), state)


def poisoned_output(rows: int, top: int, device: str, dtype: torch.dtype = torch.float32) -> SampleOutput:
    """Buffers in which an entry that was not written shows."""
    return SampleOutput(
        tokens=torch.full((rows,), POISON, dtype=torch.int32, device=device),
        nan=torch.full((rows,), POISON, dtype=torch.int32, device=device),
        logprobs=torch.full((rows, 1 + top), POISON, dtype=dtype, device=device),
        logprob_ids=torch.full((rows, 1 + top), POISON, dtype=torch.int32, device=device),
        rank=torch.full((rows,), POISON, dtype=torch.int32, device=device),
    )


def run_kernel(case: SamplingCase, variant: SamplerVariant, device: str, top: int = 4) -> SampleOutput:
    """What the kernel writes, brought to the CPU."""
    there, out = case.on(device), poisoned_output(case.logits.shape[0], top, device)
    sample_triton(there.logits, there.slots, there.state, variant, out)
    return SampleOutput(**{f.name: getattr(out, f.name).cpu() for f in fields(SampleOutput)})


def run_reference(case: SamplingCase, variant: SamplerVariant, top: int = 4) -> SampleOutput:
    """What the reference writes, on the CPU."""
    dtype = torch.float64 if case.logits.dtype == torch.float64 else torch.float32
    out = poisoned_output(case.logits.shape[0], top, "cpu", dtype)
    sample_reference(case.logits.clone(), case.slots, case.state, variant, out)
    return out


def adjusted_row(case: SamplingCase, row: int) -> torch.Tensor:
    """`[V]`: the row with bias and penalties, id by id, rounded to the type of the logits after either."""
    slot, state, values = int(case.slots[row]), case.state, case.logits[row].clone()

    def rounded(value: torch.Tensor) -> torch.Tensor:
        return value.to(values.dtype)

    def wide(value: torch.Tensor) -> torch.Tensor:
        return value if value.dtype == torch.float64 else value.float()

    for token, bias in zip(state.bias_ids[slot].tolist(), state.bias_values[slot], strict=True):
        if token >= 0:
            values[token] = rounded(wide(values[token]) + bias)
    sequence = state.token_ids[slot, : state.num_tokens[slot]].tolist()
    output = sequence[state.prompt_len[slot] :]
    repetition, presence, frequency = (
        float(t[slot]) for t in (state.repetition_penalty, state.presence_penalty, state.frequency_penalty)
    )
    for token in set(sequence):
        value = wide(values[token])
        value = value / repetition if value > 0 else value * repetition
        value = value - frequency * output.count(token)
        values[token] = rounded(value - presence * (token in output))
    return values


def masked_row(case: SamplingCase, row: int, variant: SamplerVariant) -> torch.Tensor:
    """float64 `[V]`: the row after bias and penalties, where the variant has them, and the minimum-length mask."""
    slot = int(case.slots[row])
    values = (adjusted_row(case, row) if variant >= SamplerVariant.SHAPED else case.logits[row].clone()).double()
    if case.state.num_tokens[slot] < case.state.min_len[slot]:
        for stop in case.state.stop_ids[slot].tolist():
            if 0 <= stop < len(values):
                values[stop] = float("-inf")
    return values


def scaled_row(values: torch.Tensor, temperature: float) -> torch.Tensor:
    """`(values - maximum) / temperature`, with +inf logits on a par."""
    return torch.where(values == values.max(), 0.0, (values - values.max()) / temperature)


def kept_by_sorting(
    values: torch.Tensor, temperature: float, top_k: int, top_p: float, log_min_p: float = float("-inf")
) -> torch.Tensor:
    """bool `[V]`: min-p, top-k, then top-p, from their definitions: whole groups of equal logits, from the top."""
    keep = scaled_row(values, temperature) >= log_min_p
    if 0 < top_k < len(values):
        keep &= values >= sorted(values.tolist(), reverse=True)[top_k - 1]
    if top_p < 1:
        weights = torch.where(keep, scaled_row(values, temperature).exp(), 0.0)
        distinct, group = values.unique(return_inverse=True)
        by_group = torch.zeros(len(distinct), dtype=torch.float64).index_add_(0, group, weights)
        at_or_above = by_group.flip(0).cumsum(0).flip(0)
        enough = (at_or_above >= top_p * weights.sum()).nonzero()
        threshold = distinct[enough.max()] if len(enough) else distinct[0]
        keep &= values >= threshold
    return keep & (values > float("-inf"))


def noise_row(case: SamplingCase, row: int) -> torch.Tensor:
    """float64 `[V]`: the noise, from its definition by token id."""
    slot, ids = int(case.slots[row]), torch.arange(case.logits.shape[1])
    zero = torch.zeros_like(ids)
    counter = 1024 * (ids // 4096) + ids % 1024
    words = philox_reference(case.state.seed[slot], counter, case.state.num_tokens[slot].long(), zero, zero)
    word = torch.stack(words).gather(0, (ids // 1024 % 4)[None])[0]
    return -(-uniform_reference(word, torch.float64).log()).log()


def defensible(case: SamplingCase, row: int, token: int, variant: SamplerVariant) -> bool:
    """Whether rounding of scores and masses can explain `token`."""
    slot, state, values = int(case.slots[row]), case.state, masked_row(case, row, variant)
    if not 0 <= token < len(values):
        return False
    temperature, top_k, top_p = (float(t[slot]) for t in (state.temperature, state.top_k, state.top_p))
    if temperature <= 0:
        return token == int(values.argmax())
    log_min_p = float(state.log_min_p[slot])
    if variant is SamplerVariant.SAMPLED:
        top_k, top_p = 0.0, 1.0
    loose_p = top_p + MASS_ROUNDING if top_p < 1 else 1.0
    strict_p = top_p - MASS_ROUNDING if top_p < 1 else 1.0
    loose = kept_by_sorting(values, temperature, int(top_k), loose_p, log_min_p - SCORE_ROUNDING)
    strict = kept_by_sorting(values, temperature, int(top_k), strict_p, min(log_min_p + SCORE_ROUNDING, 0.0))
    scores = scaled_row(values, temperature) + noise_row(case, row)
    return bool(loose[token]) and float(scores[token]) >= float(scores[strict].max()) - SCORE_ROUNDING


def check_kernel_agrees_with_reference(case: SamplingCase, variant: SamplerVariant, device: str) -> int:
    """Holds the kernel to the reference on the CPU; returns how many tokens differ within rounding."""
    kernel, reference = run_kernel(case, variant, device), run_reference(case, variant)
    assert torch.equal(kernel.nan, reference.nan)
    differing = 0
    for row, slot in enumerate(case.slots.tolist()):
        if slot < 0:
            for name in ("tokens", "nan", "logprobs", "logprob_ids", "rank"):
                assert (getattr(kernel, name)[row] == POISON).all(), f"{name}: a padding row was written"
                assert (getattr(reference, name)[row] == POISON).all(), f"{name}: a padding row was written"
            continue
        check_flag(case, row, kernel, variant)
        if kernel.nan[row]:
            assert kernel.tokens[row] == 0
        elif variant is SamplerVariant.GREEDY:
            assert kernel.tokens[row] == reference.tokens[row] == masked_row(case, row, variant).argmax()
        else:
            assert defensible(case, row, int(reference.tokens[row]), variant)
            assert defensible(case, row, int(kernel.tokens[row]), variant)
            differing += int(kernel.tokens[row] != reference.tokens[row])
        if variant is SamplerVariant.LOGPROBS:
            check_logprobs(case, row, kernel, 1e-4)
            check_logprobs(case, row, reference, 1e-4)
        else:
            assert (kernel.logprobs[row] == POISON).all()
    return differing


def check_flag(case: SamplingCase, row: int, out: SampleOutput, variant: SamplerVariant) -> None:
    """A row is flagged exactly when it holds a NaN or leaves nothing finite to choose."""
    values = adjusted_row(case, row) if variant >= SamplerVariant.SHAPED else case.logits[row]
    expected = bool(values.isnan().any()) or not bool(masked_row(case, row, variant).isfinite().any())
    assert bool(out.nan[row]) == expected


def check_logprobs(case: SamplingCase, row: int, out: SampleOutput, tolerance: float) -> None:
    """Log-softmax of the raw logits at the sampled token and at the top N, and the rank."""
    logprobs, ids = out.logprobs[row].double(), out.logprob_ids[row].tolist()
    if out.nan[row]:
        assert bool(logprobs.isnan().all())
        assert set(ids) == {0}
        assert out.rank[row] == 0
        return
    values, token = case.logits[row].double(), int(out.tokens[row])
    scaled = scaled_row(values, 1.0)
    expected = scaled - scaled.exp().sum().log()
    top = min(len(ids) - 1, len(values))
    assert ids[0] == token
    assert len(set(ids[1 : top + 1])) == top
    assert ids[top + 1 :] == [-1] * (len(ids) - 1 - top)
    assert torch.equal(values[ids[1 : top + 1]], values.sort(descending=True).values[:top])
    torch.testing.assert_close(logprobs[: top + 1], expected[ids[: top + 1]], rtol=1e-5, atol=tolerance)
    assert bool((logprobs[top + 1 :] == float("-inf")).all())
    assert out.rank[row] == 1 + int((values > values[token]).sum())


def check_rows_ignore_their_batch(case: SamplingCase, device: str | None) -> None:
    """Alone and in the crowd a row gets the same bits; `device` None means the reference."""

    def run(some: SamplingCase) -> SampleOutput:
        if device is None:
            return run_reference(some, SamplerVariant.LOGPROBS)
        return run_kernel(some, SamplerVariant.LOGPROBS, device)

    crowd = run(case)
    for row in range(len(case.slots)):
        alone = run(case.row(row))
        for name in ("tokens", "nan", "rank"):
            assert torch.equal(getattr(crowd, name)[row], getattr(alone, name)[0])
        # Bits, because a flagged row holds NaN. Ids are left out: ties in the top N have no order.
        assert torch.equal(crowd.logprobs[row].view(torch.uint8), alone.logprobs[0].view(torch.uint8))


@triton.jit
def _words_kernel(seed_ptr, counter_ptr, words_ptr, uniforms_ptr, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)  # each lane asks for the same words; one lane writes them
    c0 = tl.load(counter_ptr + 4 * at + lanes * 0)
    c1 = tl.load(counter_ptr + 4 * at + 1)
    c2 = tl.load(counter_ptr + 4 * at + 2)
    c3 = tl.load(counter_ptr + 4 * at + 3)
    w0, w1, w2, w3 = philox_words(tl.load(seed_ptr + at), c0, c1, c2, c3)
    first = lanes == 0
    tl.store(words_ptr + 4 * at + lanes, w0.to(tl.int64), mask=first)
    tl.store(words_ptr + 4 * at + 1 + lanes, w1.to(tl.int64), mask=first)
    tl.store(words_ptr + 4 * at + 2 + lanes, w2.to(tl.int64), mask=first)
    tl.store(words_ptr + 4 * at + 3 + lanes, w3.to(tl.int64), mask=first)
    tl.store(uniforms_ptr + at + lanes, uniform(w0), mask=first)


def kernel_words(seeds: list[int], counters: list[tuple[int, ...]], device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Words `[n, 4]` int64 and the uniforms `[n]` of the first words, from the kernel's generator."""
    count = len(seeds)
    seed = torch.tensor([s - 2**64 if s >= 2**63 else s for s in seeds], device=device)
    counter = torch.tensor(counters, device=device).to(torch.int32)
    words = torch.full((count, 4), POISON, dtype=torch.int64, device=device)
    uniforms = torch.full((count,), float(POISON), device=device)
    _words_kernel[(count,)](seed, counter, words, uniforms, COUNT=count, BLOCK=16)
    return words.cpu(), uniforms.cpu()


def check_kernel_words(seeds: list[int], counters: list[tuple[int, ...]], device: str) -> None:
    """Kernel and reference give the same words and the same uniforms, bit for bit."""
    words, uniforms = kernel_words(seeds, counters, device)
    seed = torch.tensor([s - 2**64 if s >= 2**63 else s for s in seeds])
    expected = torch.stack(philox_reference(seed, *torch.tensor(counters).unbind(1)), dim=1)
    assert torch.equal(words, expected)
    assert torch.equal(uniforms, uniform_reference(expected[:, 0], torch.float32))
