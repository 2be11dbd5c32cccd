"""What bench.decode is to measure, and the command line that says so."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import get_args

from bench.method import BATCHES, TOKENS, integers, lengths_for
from bench.shapes import SHAPES, Shape
from graphexec.config import CompileMode, Device

__all__ = ["Plan", "parse"]

_SPARE_TOKENS = 16  # that a slot may get KV blocks for ahead of its steps


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        shape: see bench.shapes.
        batches: requests that decode together.
        depths: overlap depths.
        tokens: output tokens of a short and of a long run, at least; see `tokens_for`.
        prompts: lengths of the prompts, tokens; none for the shape's own.
        repeats: runs of each length.
        traced_steps: steps in a trace; 0 for none.
        captures: whether to time the captures of the whole ladder.
        kv_gib: most memory for keys and values; a batch of prompts that needs more is skipped. None for no limit.
        compile, device: as in EngineConfig.
        minutes: after so long no further part is begun.
    """

    shape: Shape
    batches: tuple[int, ...] = BATCHES
    depths: tuple[int, ...] = (0, 1, 2)
    tokens: tuple[int, int] = TOKENS
    prompts: tuple[int, ...] = ()
    repeats: int = 3
    traced_steps: int = 128
    captures: bool = True
    kv_gib: float | None = None
    compile: CompileMode | None = None
    device: Device = "auto"
    minutes: float | None = None

    @property
    def lengths(self) -> tuple[int, ...]:
        """Lengths of the prompts, tokens."""
        return self.prompts or (self.shape.prompt_tokens,)

    @property
    def max_model_len(self) -> int:
        """Longest prompt plus output that the engine must take, tokens."""
        longest = max(prompt + self.tokens_for(batch, prompt)[1] for batch, prompt in self.loads())
        return max(self.shape.max_model_len, longest + _SPARE_TOKENS)

    def tokens_for(self, batch: int, prompt: int) -> tuple[int, int]:
        """Output tokens of a short and of a long run under this load."""
        return lengths_for(self.tokens, batch, prompt, self.shape.max_num_batched_tokens)

    def kv_tokens(self, batch: int, prompt: int) -> int:
        """Tokens of a long run that have keys and values at its end, over all requests."""
        return batch * (prompt + self.tokens_for(batch, prompt)[1] + _SPARE_TOKENS)

    def fits(self, batch: int, prompt: int) -> bool:
        return self.kv_gib is None or self.kv_tokens(batch, prompt) * self.shape.kv_bytes <= self.kv_gib * 2**30

    def loads(self) -> Iterator[tuple[int, int]]:
        """Batches and lengths of prompts whose keys and values fit."""
        return ((batch, prompt) for prompt in self.lengths for batch in self.batches if self.fits(batch, prompt))

    def too_large(self) -> list[str]:
        """The rest, with the reason."""
        return [
            f"batch {batch}, prompts of {prompt}: its keys and values take "
            f"{self.kv_tokens(batch, prompt) * self.shape.kv_bytes / 2**30:.0f} GiB, more than --kv-gib {self.kv_gib:g}"
            for prompt in self.lengths
            for batch in self.batches
            if self.kv_gib is not None and not self.fits(batch, prompt)
        ]

    def as_dict(self) -> dict[str, object]:
        """For a results file: the shape by its name, and the lengths of the prompts spelled out."""
        facts = asdict(replace(self, prompts=self.lengths))
        return facts | {"shape": self.shape.name}


def parse(arguments: list[str], description: str) -> tuple[Plan, Path | None]:
    """The plan, and the file for its results. Exits with code 2 where the words make no plan."""
    parser = argparse.ArgumentParser(prog="python -m bench.decode", description=description)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen3-0.6b")
    parser.add_argument("--batch", type=integers, default=BATCHES, help="requests that decode together")
    parser.add_argument("--depth", type=integers, default=(0, 1, 2), help="overlap depths")
    parser.add_argument("--tokens", type=integers, default=TOKENS, help="of a short and of a long run")
    parser.add_argument("--prompt", type=integers, default=(), help="tokens of the prompts; the shape's own by default")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each length")
    parser.add_argument("--traced-steps", type=int, default=128, help="0 for no trace")
    parser.add_argument("--no-captures", action="store_true", help="do not time the captures of the whole ladder")
    parser.add_argument("--kv-gib", type=float, help="skip what needs more memory than this for keys and values")
    parser.add_argument("--compile", choices=get_args(CompileMode))
    parser.add_argument("--device", choices=get_args(Device), default="auto")
    parser.add_argument("--minutes", type=float, help="after so long no further part is begun")
    parser.add_argument("--json", type=Path, help="file for the results")
    given = parser.parse_args(arguments)
    if len(given.tokens) != 2 or not 0 < given.tokens[0] < given.tokens[1]:
        parser.error("--tokens takes two rising numbers")
    plan = Plan(
        shape=SHAPES[given.shape],
        batches=given.batch,
        depths=given.depth,
        tokens=given.tokens,
        prompts=given.prompt,
        repeats=given.repeats,
        traced_steps=given.traced_steps,
        captures=not given.no_captures,
        kv_gib=given.kv_gib,
        compile=given.compile,
        device=given.device,
        minutes=given.minutes,
    )
    if not any(plan.loads()):
        parser.error("nothing fits into --kv-gib: " + "; ".join(plan.too_large()))
    if plan.max_model_len > plan.shape.most_positions:
        parser.error(f"{plan.shape.name} has {plan.shape.most_positions} positions, and {plan.max_model_len} are asked")
    return plan, given.json
