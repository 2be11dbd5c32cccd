"""What a training leaves beside its weights: the loss curve as PNG, and the model card filled from the metrics."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display on the machines that train
from matplotlib import pyplot

from bench.tiny.evaluation import Sample
from bench.tiny.trainer import Point

CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
language: [code]
tags: [python, qwen3, toy]
---
# graphexec tiny

A Qwen3-architecture causal language model of {parameters:,} parameters that continues Python functions. It exists so
that graphexec has a real model without a download: it stops by itself, its lengths are uneven, and its text reads as
Python. It is a toy: it knows what code looks like, not what code does.

- Layers {layers}, hidden size {hidden}, {heads} heads of size 64 over {key_value_heads} key-value heads,
  MLP {intermediate}, tied embeddings, bfloat16.
- Byte-level BPE of {vocabulary:,} entries. `<|end|>` closes a document, and pads. There is no start token.
- {max_positions} positions; trained on the first {window} of each document.
- A prompt is a header at column 0 and its docstring: `def name(...):`, newline, four blanks,
  `\"\"\"Docstring.\"\"\"`, newline.

## Figures

All of the saved bfloat16 checkpoint, on functions of files it was not trained on ({device}):

| figure | value |
|---|---|
| held-out cross-entropy | {nats_per_token:.3f} nats per token, {bits_per_byte:.3f} bits per byte |
| held-out perplexity | {perplexity_per_token:.2f} per token, {perplexity_per_byte:.3f} per byte |
| cross-entropy of the bodies alone | {nats_per_body_token:.3f} nats per token |
{sample_rows}

Samples continue header and docstring (up to {max_prompt_tokens} tokens) of held-out functions, without top-k or top-p.

```
{command}
```

gave these figures, `metrics.json`, `loss.png` and `samples.jsonl`: {steps_done:,} steps of {step_tokens:,} tokens,
{epochs:.0f} readings of the corpus, {seconds:.0f} s of training (seed {seed}; Python {python}, torch {torch},
transformers {transformers}, tokenizers {tokenizers}). The weights are those of step {best_step:,}, where the held-out
loss was lowest; so that loss is a little better than on files that chose nothing.

## Data

Functions and methods of the standard library's own source files ({source}, {test_note}), one
function to a document:
{train_documents:,} functions of {train_files:,} files ({train_megabytes:.1f} MB) to train on, and
{held_out_documents:,} documented functions of {held_out_files:,} other files ({held_out_megabytes:.2f} MB) held out,
split by a hash of the file's path. {renamed_share:.0%} of the readings of a function outside the test suite are of
copies with local names changed. Exact duplicates are dropped; files that resemble each other can lie on both sides.

## License

The weights and this folder: Apache-2.0, as graphexec. They were trained on text of the Python standard library,
Copyright (c) Python Software Foundation, under the PSF License Version 2; see graphexec's NOTICE. The model can
repeat passages of that text.

## Limits

Python only, English docstrings only, short functions only. Names that do not exist, logic that does not hold and
unbalanced brackets are normal. Do not run what it writes.

## First samples

The first three at temperature {temperature}, not picked:

{samples}
"""


def plot_losses(curve: Sequence[Point], best: Point, file: Path) -> None:
    """Training and held-out loss by step, as PNG."""
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.plot([point.step for point in curve], [point.train for point in curve], label="train, with dropout")
    axes.plot([point.step for point in curve], [point.held_out for point in curve], label="held-out files")
    axes.scatter([best.step], [best.held_out], zorder=3, label=f"kept: {best.held_out:.3f} at step {best.step}")
    axes.set(xlabel="step", ylabel="cross-entropy (nats per token)", title="graphexec tiny")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def model_card(metrics: Mapping[str, Any], samples: Sequence[Sample]) -> str:
    """README.md of the checkpoint folder, from the same metrics that metrics.json holds."""
    settings, corpus, training = metrics["settings"], metrics["corpus"], metrics["training"]
    rows = [
        f"| {name}, {share['samples']} samples: ended by themselves within {share['max_new_tokens']} tokens"
        f" | {share['ended']:.1%} |\n"
        f"| {name}: `ast.parse` accepts prompt and completion | {share['parses']:.1%} |"
        for name, share in (
            (f"temperature {metrics['sampled']['temperature']}", metrics["sampled"]),
            ("greedy", metrics["greedy"]),
        )
    ]
    fields = settings | corpus | training | metrics["versions"] | metrics["held_out"] | metrics["sampled"]
    return CARD.format(
        **(fields | {"samples": "\n\n".join(map(_fenced, samples[:3]))}),
        parameters=metrics["parameters"],
        device=metrics["device"],
        command=metrics["command"],
        max_positions=metrics["max_positions"],
        max_prompt_tokens=metrics["max_prompt_tokens"],
        step_tokens=settings["rows"] * settings["window"],
        sample_rows="\n".join(rows),
        source=metrics["source"],
        test_note="its test suite among them" if corpus["train_test_documents"] else "without its test suite",
        train_megabytes=corpus["train_bytes"] / 1e6,
        held_out_megabytes=corpus["held_out_bytes"] / 1e6,
    )


def _fenced(sample: Sample) -> str:
    fence = "```" if "```" not in sample.prompt + sample.text else "~~~~"
    return f"{fence}python\n{(sample.prompt + sample.text).rstrip()}\n{fence}"
