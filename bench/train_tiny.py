"""Trains, saves and scores the small model that ships with graphexec: `python bench/train_tiny.py --out DIR`."""

import argparse
import dataclasses
import json
import math
import platform
import sys
import sysconfig
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from transformers import GenerationConfig, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, only bench/ is on the path

from bench.tiny.corpus import Document, Split, read_documents, source_files, split_documents
from bench.tiny.evaluation import (
    MAX_PROMPT_TOKENS,
    choose_prompts,
    complete,
    cross_entropy,
    load_checkpoint,
    sample_figures,
)
from bench.tiny.renaming import name_pool, renamed_copies
from bench.tiny.report import model_card, plot_losses
from bench.tiny.tokens import MAX_POSITIONS, encode_documents, train_tokenizer
from bench.tiny.trainer import Settings, Training, tokens_per_epoch, train

HELD_OUT_SHARE = 0.08  # of the files
MAX_FOLDER_BYTES = 12_000_000
TEMPERATURE = 0.8
SMOKE_SETTINGS = Settings(
    steps=40, rows=8, window=256, hidden=128, layers=2, heads=2, key_value_heads=1, intermediate=256, score_every=20
)


@dataclass(frozen=True)
class Plan:
    """What one run of the script does, besides the training's own settings."""

    settings: Settings
    samples: int = 200  # at each temperature
    max_new_tokens: int = 256
    minutes: float = 6.0  # safety stop of the training
    compile_steps: bool = False
    command: str = "python bench/train_tiny.py"
    source: str = "synthetic"  # of the documents, for the model card


def run(documents: Sequence[Document], plan: Plan, folder: Path, device: torch.device) -> dict[str, Any]:
    """Train on `documents`, write checkpoint, curve, metrics, samples and card into `folder`; returns the metrics."""
    folder.mkdir(parents=True, exist_ok=True)
    settings, split = plan.settings, split_documents(documents, HELD_OUT_SHARE)
    scored = [document for document in split.held_out if document.kind == "documented"]
    # The test suite would fill the vocabulary with its assertions.
    tokenizer = train_tokenizer((doc.text for doc in split.train if doc.kind != "test"), settings.vocabulary)
    encoded = encode_documents(tokenizer, [document.text for document in split.train])
    corpus = _corpus_figures(split, scored, encoded)
    print("corpus:", json.dumps(corpus), flush=True)
    copies, shares = _with_copies(split.train, tokenizer, settings)
    encoded += copies
    if not settings.steps:
        tokens = settings.epochs * tokens_per_epoch(encoded, shares, settings.window)
        settings = dataclasses.replace(settings, steps=math.ceil(tokens / (settings.rows * settings.window)))
        plan = dataclasses.replace(plan, settings=settings)
    training = train(
        encoded,
        shares,
        encode_documents(tokenizer, [document.text for document in scored]),
        len(tokenizer),
        tokenizer.eos_token_id,
        settings,
        device,
        plan.compile_steps,
        plan.minutes,
    )
    save_checkpoint(training, tokenizer, folder)
    plot_losses(training.curve, training.best, folder / "loss.png")
    print(f"saved {folder}; scoring what was saved", flush=True)
    return score(folder, plan, scored, corpus, training, device)


def save_checkpoint(training: Training, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Hugging Face layout, weights in bfloat16."""
    end = tokenizer.eos_token_id
    model = training.model.to("cpu", torch.bfloat16)
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=end)
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # written for its owner alone, which a package must not be
    tokenizer.save_pretrained(folder)


def score(
    folder: Path, plan: Plan, scored: list[Document], corpus: dict[str, int], training: Training, device: torch.device
) -> dict[str, Any]:
    """Figures of the checkpoint in `folder`, written beside it; returns them."""
    started = time.perf_counter()
    settings = plan.settings
    model, tokenizer = load_checkpoint(folder, device)
    held_out = cross_entropy(model, tokenizer, scored, settings.window, settings.rows)
    prompts = choose_prompts(tokenizer, scored, plan.samples, settings.seed)
    figures, samples = {}, {}
    for name, temperature in (("sampled", TEMPERATURE), ("greedy", 0.0)):
        samples[name] = complete(model, tokenizer, prompts, temperature, plan.max_new_tokens, settings.seed)
        figures[name] = dataclasses.asdict(sample_figures(samples[name], temperature, plan.max_new_tokens))
    with open(folder / "samples.jsonl", "w", encoding="utf-8") as stream:
        for name, members in samples.items():
            stream.writelines(json.dumps({"set": name} | dataclasses.asdict(sample)) + "\n" for sample in members)
    metrics = {
        "command": plan.command,
        "source": plan.source,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "held_out": dataclasses.asdict(held_out),
        **figures,
        "max_prompt_tokens": MAX_PROMPT_TOKENS,
        "max_positions": MAX_POSITIONS,
        "corpus": corpus,
        "settings": dataclasses.asdict(settings),
        "training": _training_figures(training),
        "scoring_seconds": round(time.perf_counter() - started, 1),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
    }
    (folder / "README.md").write_text(model_card(metrics, samples["sampled"]), encoding="utf-8")
    folder_bytes = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    metrics["folder_bytes"] = folder_bytes  # all but metrics.json itself
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    summary = {name: metrics[name] for name in ("parameters", "held_out", "sampled", "greedy", "folder_bytes")}
    print(json.dumps(summary, indent=2), flush=True)
    if folder_bytes > MAX_FOLDER_BYTES:
        print(f"{folder} holds {folder_bytes} bytes, more than the {MAX_FOLDER_BYTES} that may ship", flush=True)
    return metrics


def _with_copies(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerFast, settings: Settings
) -> tuple[list[np.ndarray], np.ndarray]:
    """Encoded copies of what is not the test suite's; and the share of epochs with each document, then each copy."""
    kind_shares = {"documented": 1.0, "plain": settings.plain_share, "test": settings.test_share}
    shares = np.array([kind_shares[document.kind] for document in documents])
    if not settings.renamed_share or not settings.renamed_copies:
        return [], shares
    copied = np.array([document.kind != "test" for document in documents])
    originals = [document for document in documents if document.kind != "test"]
    texts = renamed_copies(originals, name_pool(originals), settings.renamed_copies, settings.seed)
    copy_shares = np.repeat(shares[copied] * settings.renamed_share / settings.renamed_copies, settings.renamed_copies)
    shares[copied] *= 1 - settings.renamed_share
    return encode_documents(tokenizer, texts), np.concatenate([shares, copy_shares])


def _corpus_figures(split: Split, scored: list[Document], encoded: list[np.ndarray]) -> dict[str, int]:
    kinds = [document.kind for document in split.train]
    return {
        "train_files": len({document.path for document in split.train}),
        "train_documents": len(split.train),
        "train_documented_documents": kinds.count("documented"),
        "train_plain_documents": kinds.count("plain"),
        "train_test_documents": kinds.count("test"),
        "train_bytes": sum(len(document.text.encode()) for document in split.train),
        "train_tokens": sum(map(len, encoded)),
        "held_out_files": len({document.path for document in scored}),
        "held_out_documents": len(scored),
        "held_out_bytes": sum(len(document.text.encode()) for document in scored),
    }


def _training_figures(training: Training) -> dict[str, Any]:
    return {
        "steps_done": training.steps_done,
        "best_step": training.best.step,
        "epochs": round(training.epochs, 1),
        "seconds": round(training.seconds, 1),
        "tokens_per_second": round(training.tokens_per_second),
        "compiled": training.compiled,
        "stopped_by_clock": training.stopped_by_clock,
        "curve": [dataclasses.asdict(point) for point in training.curve],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, find the corpus and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="checkpoint folder to write")
    parser.add_argument("--stdlib", type=Path, help="source tree to read; default: this interpreter's")
    parser.add_argument("--minutes", type=float, default=6.0, help="safety stop of the training")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="torch.compile; default: on a GPU")
    parser.add_argument("--smoke", action="store_true", help="a few files, steps and samples: does it run at all")
    tunable = ["seed", "steps", "epochs", "rows", "window", "hidden", "layers", "intermediate", "warm_up_steps"]
    tunable += ["learning_rate", "weight_decay", "dropout", "plain_share", "test_share", "renamed_share"]
    for name in tunable:
        kind = type(getattr(Settings(), name))
        parser.add_argument("--" + name.replace("_", "-"), type=kind, help=f"default: {getattr(Settings(), name)}")
    options = parser.parse_args(arguments)

    given = {name: getattr(options, name) for name in tunable if getattr(options, name) is not None}
    settings = dataclasses.replace(SMOKE_SETTINGS if options.smoke else Settings(), **given)
    device = torch.device(options.device)
    own = Path(sysconfig.get_path("stdlib"))
    root = options.stdlib or own
    spelled = sys.argv[1:] if arguments is None else list(arguments)
    plan = Plan(
        settings=settings,
        samples=8 if options.smoke else 200,
        max_new_tokens=64 if options.smoke else 256,
        minutes=min(options.minutes, 1.0) if options.smoke else options.minutes,
        compile_steps=device.type == "cuda" if options.compile is None else options.compile,
        command=" ".join(["python bench/train_tiny.py", *spelled]),
        source=f"Python {platform.python_version()}" if root == own else root.name,
    )
    files = source_files(root)
    documents = list(read_documents(root, files[::8] if options.smoke else files))
    print(f"{len(documents)} functions in {len(files)} files below {root}", flush=True)
    run(documents, plan, options.out, device)


if __name__ == "__main__":
    main()
