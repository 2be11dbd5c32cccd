"""Figures of a saved checkpoint: held-out cross-entropy, and what its completions of held-out headers are worth."""

import ast
import itertools
import math
import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3ForCausalLM,
)

from bench.tiny.corpus import Document
from bench.tiny.packing import IGNORED, Rows, pack
from bench.tiny.tokens import encode_documents
from bench.tiny.trainer import token_losses

MAX_PROMPT_TOKENS = 256


@dataclass(frozen=True)
class CrossEntropy:
    """Loss of documents cut to a window; a document's first token is given, not scored."""

    nats_per_token: float
    perplexity_per_token: float
    bits_per_byte: float
    perplexity_per_byte: float
    nats_per_body_token: float  # of the tokens after header and docstring: what a completion has to write
    documents: int
    tokens: int
    bytes: int


@dataclass(frozen=True)
class Sample:
    """One completion of a held-out header and docstring."""

    path: str
    prompt: str
    text: str
    tokens: int  # generated, the end token not counted
    ended: bool  # by the end token, within the limit
    parses: bool  # ast.parse accepts prompt + text


@dataclass(frozen=True)
class SampleFigures:
    """Shares (0 to 1) over the samples of one temperature."""

    temperature: float  # 0 is greedy
    samples: int
    max_new_tokens: int
    ended: float
    parses: float
    ended_and_parses: float
    empty: float  # ended with nothing but blanks, which ast.parse accepts after a docstring
    mean_tokens: float


def load_checkpoint(folder: Path, device: torch.device) -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerFast]:
    """The saved model, computing in bfloat16 as it is stored, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="sdpa")
    return model.to(device).eval(), AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def cross_entropy(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    documents: Sequence[Document],
    window: int,
    rows_per_batch: int,
) -> CrossEntropy:
    """Loss of `documents`, each cut to `window` tokens; from the logits on in float32, summed in float64."""
    end = tokenizer.eos_token_id
    encoded = encode_documents(tokenizer, [document.text for document in documents])
    prompts = encode_documents(tokenizer, [document.prompt for document in documents])
    # A byte-level entry is spelled with one character for each of its bytes; the end token stands for none.
    entry_bytes = torch.tensor([len(entry) for entry in tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))])
    entry_bytes[end] = 0
    nats = body_nats = 0.0
    tokens = body_tokens = num_bytes = 0
    for first in range(0, len(encoded), rows_per_batch):
        chosen = range(first, min(first + rows_per_batch, len(encoded)))
        # One document to a row, so that a row's prompt is known.
        alone = [pack([encoded[index]], window, end) for index in chosen]
        rows = Rows(*map(torch.cat, zip(*alone, strict=True))).to(model.device)
        losses = token_losses(model, rows).double()
        scored = rows.targets != IGNORED
        # The position of a prompt's last token predicts the body's first; prompts carry an end token here.
        body_from = torch.tensor([len(prompts[index]) - 2 if documents[index].prompt else window for index in chosen])
        in_body = scored & (rows.positions >= body_from.to(model.device)[:, None])
        nats += losses.sum().item()
        tokens += int(scored.sum())
        num_bytes += int(entry_bytes[rows.targets[scored].cpu()].sum())
        body_nats += losses[in_body].sum().item()
        body_tokens += int(in_body.sum())
    return CrossEntropy(
        nats_per_token=nats / tokens,
        perplexity_per_token=math.exp(nats / tokens),
        bits_per_byte=nats / num_bytes / math.log(2),
        perplexity_per_byte=math.exp(nats / num_bytes),
        nats_per_body_token=body_nats / max(body_tokens, 1),
        documents=len(documents),
        tokens=tokens,
        bytes=num_bytes,
    )


def choose_prompts(
    tokenizer: PreTrainedTokenizerFast, documents: Sequence[Document], count: int, seed: int
) -> list[Document]:
    """`count` documents whose prompt fits in MAX_PROMPT_TOKENS, in a seeded order, repeated where there are fewer."""
    fitting = [
        document
        for document in documents
        if document.prompt and len(tokenizer(document.prompt, verbose=False)["input_ids"]) <= MAX_PROMPT_TOKENS
    ]
    if not fitting:
        raise ValueError(f"no held-out function has a header and docstring of at most {MAX_PROMPT_TOKENS} tokens")
    random.Random(seed).shuffle(fitting)
    return list(itertools.islice(itertools.cycle(fitting), count))


@torch.no_grad()
def complete(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    documents: Sequence[Document],
    temperature: float,
    max_new_tokens: int,
    seed: int,
) -> list[Sample]:
    """One completion of each document's prompt, in one batch padded on the left; temperature 0 is greedy."""
    end = tokenizer.eos_token_id
    torch.manual_seed(seed)
    batch = tokenizer([document.prompt for document in documents], return_tensors="pt", padding=True)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
    config = GenerationConfig(
        **({"do_sample": False} | sampling), max_new_tokens=max_new_tokens, eos_token_id=end, pad_token_id=end
    )
    output = model.generate(
        input_ids=batch["input_ids"].to(model.device),
        attention_mask=batch["attention_mask"].to(model.device),
        generation_config=config,
    )
    samples = []
    for document, row in zip(documents, output[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
        ids = row[: row.index(end)] if end in row else row
        text = tokenizer.decode(ids)
        samples.append(
            Sample(document.path, document.prompt, text, len(ids), end in row, accepted(document.prompt + text))
        )
    return samples


def accepted(text: str) -> bool:
    """Whether `ast.parse` takes `text` for Python."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is odd but accepted: invalid escapes, `is` with a literal
        try:
            ast.parse(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return False
    return True


def sample_figures(samples: Sequence[Sample], temperature: float, max_new_tokens: int) -> SampleFigures:
    """The figures of `samples`, which must not be empty."""
    count = len(samples)
    return SampleFigures(
        temperature=temperature,
        samples=count,
        max_new_tokens=max_new_tokens,
        ended=sum(sample.ended for sample in samples) / count,
        parses=sum(sample.parses for sample in samples) / count,
        ended_and_parses=sum(sample.ended and sample.parses for sample in samples) / count,
        empty=sum(sample.ended and not sample.text.strip() for sample in samples) / count,
        mean_tokens=sum(sample.tokens for sample in samples) / count,
    )
