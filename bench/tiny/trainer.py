"""Training of the tiny model: a fixed number of steps, the weights with the lowest held-out loss kept."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Qwen3Config, Qwen3ForCausalLM

from bench.tiny.packing import IGNORED, Rows, attention_mask, endless_batches, pack
from bench.tiny.tokens import MAX_POSITIONS

LossFunction = Callable[[Rows], Tensor]


@dataclass(frozen=True)
class Settings:
    """What a training depends on, besides the corpus and the machine."""

    seed: int = 0
    steps: int = 0  # 0: as many as `epochs` need; never from the clock, so two runs of one seed do the same work
    epochs: float = 24.0  # readings of the corpus; read oftener, it is learnt by heart
    rows: int = 64  # per step, of `window` tokens each
    window: int = 512
    hidden: int = 256
    layers: int = 6
    heads: int = 4
    key_value_heads: int = 2
    intermediate: int = 768
    vocabulary: int = 2_048
    learning_rate: float = 2e-3  # peak, after the warm-up
    weight_decay: float = 0.3  # strong, and dropout with it: the corpus is small
    dropout: float = 0.1  # on what attention and MLP add to the residual stream
    warm_up_steps: int = 200
    score_every: int = 100  # steps between two held-out scores
    plain_share: float = 1.0  # of the functions without docstring, drawn anew for each epoch
    test_share: float = 0.3  # of the test suite's functions, likewise
    renamed_share: float = 0.5  # of the readings of a function outside the test suite, with its local names changed
    renamed_copies: int = 8  # that those readings draw from


@dataclass(frozen=True)
class Point:
    """One point of the loss curves, in nats per token."""

    step: int
    train: float  # mean since the last point, with dropout
    held_out: float


@dataclass(frozen=True)
class Training:
    """What a training left behind; its model holds the best weights, in float32."""

    model: Qwen3ForCausalLM
    curve: list[Point]
    best: Point
    steps_done: int
    epochs: float
    seconds: float
    tokens_per_second: float  # in steady state: window tokens, compilation left out
    compiled: bool
    stopped_by_clock: bool


def build_model(settings: Settings, vocabulary: int, end: int) -> Qwen3ForCausalLM:
    """A fresh Qwen3 with tied embeddings and head size 64, float32, on the CPU."""
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=settings.hidden,
        intermediate_size=settings.intermediate,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.key_value_heads,
        head_dim=64,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=end,
        attn_implementation="sdpa",
    )
    return Qwen3ForCausalLM(config)


def add_dropout(model: Qwen3ForCausalLM, probability: float) -> list[torch.utils.hooks.RemovableHandle]:
    """Hooks that drop from what each block adds to the residual stream, which Qwen3 itself does not offer."""

    def drop(module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return functional.dropout(output, probability, training=module.training)

    modules = [module for layer in model.model.layers for module in (layer.self_attn.o_proj, layer.mlp.down_proj)]
    return [module.register_forward_hook(drop) for module in modules] if probability else []


def build_optimizers(model: Qwen3ForCausalLM, settings: Settings) -> list[torch.optim.Optimizer]:
    """Muon (Jordan and others, 2024) for the matrices inside the blocks, AdamW for the rest, with one learning rate."""
    blocks = [parameter for parameter in model.model.layers.parameters() if parameter.dim() == 2]
    norms = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    embedding = list(model.model.embed_tokens.parameters())
    return [
        torch.optim.Muon(
            blocks,
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            adjust_lr_fn="match_rms_adamw",  # so that both optimizers take steps of one size
        ),
        torch.optim.AdamW(
            [{"params": embedding, "weight_decay": settings.weight_decay}, {"params": norms, "weight_decay": 0.0}],
            lr=settings.learning_rate,
            betas=(0.9, 0.95),
        ),
    ]


def token_losses(model: Qwen3ForCausalLM, rows: Rows) -> Tensor:
    """Loss of each target in nats, float32 [num_rows, window]; 0 where there is none."""
    logits = model(
        input_ids=rows.tokens,
        position_ids=rows.positions,
        attention_mask=attention_mask(rows.documents),
        use_cache=False,
    ).logits
    losses = functional.cross_entropy(
        logits.flatten(0, 1).float(), rows.targets.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return losses.view_as(rows.targets)


@torch.no_grad()
def held_out_loss(model: Qwen3ForCausalLM, rows: Rows, rows_per_batch: int, device: torch.device) -> float:
    """Mean loss over every target of `rows`, without dropout, in nats per token."""
    model.eval()
    total, count = 0.0, 0
    for index in torch.arange(len(rows.tokens), device=device).split(rows_per_batch):
        batch = rows.at(index)
        with torch.autocast(device.type, torch.bfloat16):
            total += token_losses(model, batch).sum().item()
        count += int((batch.targets != IGNORED).sum())
    model.train()
    return total / max(count, 1)


def learning_rate_share(step: int, settings: Settings) -> float:
    """Share of the peak learning rate at `step`: a linear warm-up, then half a cosine down to 2 %."""
    warm_up = min(settings.warm_up_steps, settings.steps // 5)
    if step < warm_up:
        return (step + 1) / warm_up
    progress = min((step - warm_up) / max(settings.steps - warm_up, 1), 1.0)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))


def tokens_per_epoch(encoded: Sequence[np.ndarray], shares: np.ndarray, window: int) -> float:
    """Tokens that one epoch reads on average: of each document its start, as often as its share says."""
    return float(sum(share * min(len(ids), window) for share, ids in zip(shares, encoded, strict=True)))


def train(
    encoded: Sequence[np.ndarray],
    shares: np.ndarray,
    held_out: Sequence[np.ndarray],
    vocabulary: int,
    end: int,
    settings: Settings,
    device: torch.device,
    compile_steps: bool,
    minutes: float,
) -> Training:
    """Train on `encoded` (token ids, each with its end token) and keep the weights that score best on `held_out`.

    `shares[i]` is the probability that an epoch reads document i. `minutes` is a safety stop: a run that meets it ends
    early, before its schedule does, and says so.
    """
    torch.manual_seed(settings.seed)
    torch.set_float32_matmul_precision("high")
    model = build_model(settings, vocabulary, end).to(device).train()
    hooks = add_dropout(model, settings.dropout)
    optimizers = build_optimizers(model, settings)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_share(step, settings))
        for optimizer in optimizers
    ]
    batches = endless_batches(encoded, shares, settings.rows, settings.window, end, settings.seed, device)
    scored_rows = pack(held_out, settings.window, end).to(device)

    def mean_loss(rows: Rows) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return token_losses(model, rows).sum() / (rows.targets != IGNORED).sum()

    started = time.perf_counter()
    trial = next(batches)  # drawn either way, so that the steps see the same data compiled or not
    loss_function = _compiled(mean_loss, trial) if compile_steps else None
    model.zero_grad(set_to_none=True)
    compiled = loss_function is not None
    step_loss: LossFunction = loss_function or mean_loss
    print(f"compiled: {compiled}, after {time.perf_counter() - started:.0f} s", flush=True)

    curve: list[Point] = []
    best, best_weights = Point(0, math.inf, math.inf), dict[str, Tensor]()
    running, since, tokens_read = torch.zeros((), device=device), 0, 0
    steady_from, steady_steps, stopped, step = time.perf_counter(), 0, False, 0
    for step in range(1, settings.steps + 1):
        rows = next(batches)
        loss = step_loss(rows)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for follower in (*optimizers, *schedules):
            follower.step()
        model.zero_grad(set_to_none=True)
        running, since = running + loss.detach(), since + 1
        tokens_read += rows.tokens.numel()
        stopped = time.perf_counter() - started > 60 * minutes
        if step % settings.score_every and step != settings.steps and not stopped:
            continue
        train_loss = running.item() / since
        seconds = time.perf_counter() - steady_from
        steady_steps += since
        point = Point(step, train_loss, held_out_loss(model, scored_rows, settings.rows, device))
        curve.append(point)
        if point.held_out < best.held_out:
            best = point
            best_weights = {name: weight.detach().clone() for name, weight in model.state_dict().items()}
        rate = since * rows.tokens.numel() / max(seconds, 1e-9)
        print(
            f"step {step:5d}/{settings.steps}  train {point.train:.4f}  held-out {point.held_out:.4f}"
            f"  best {best.held_out:.4f} at {best.step}  {rate / 1e3:.0f} k tokens/s",
            flush=True,
        )
        running, since, steady_from = torch.zeros((), device=device), 0, time.perf_counter()
        if stopped:
            print(f"stopped by the clock after {step} of {settings.steps} steps", flush=True)
            break
    if not best_weights:
        raise FloatingPointError("no held-out loss was finite: lower --learning-rate")
    for hook in hooks:
        hook.remove()
    model.load_state_dict(best_weights)
    return Training(
        model=model.eval(),
        curve=curve,
        best=best,
        steps_done=step,
        epochs=tokens_read / tokens_per_epoch(encoded, shares, settings.window),
        seconds=time.perf_counter() - started,
        tokens_per_second=rate,
        compiled=compiled,
        stopped_by_clock=stopped,
    )


def _compiled(mean_loss: LossFunction, rows: Rows) -> LossFunction | None:
    """`mean_loss` compiled and tried, backward too, or None where the machine cannot."""
    try:
        compiled = torch.compile(mean_loss)
        compiled(rows).backward()
    except Exception as error:  # a training without the compiler is slower, not wrong
        print(f"torch.compile failed, training goes on without it: {type(error).__name__}: {error}"[:2_000], flush=True)
        return None
    return compiled
