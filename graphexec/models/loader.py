"""Loads a Hugging Face checkpoint folder: configuration, weights, tokenizer, end tokens."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

import torch

from graphexec.errors import ConfigError
from graphexec.models.layers import swap_modules
from graphexec.models.tokenizer import Tokenizer

__all__ = ["LoadedModel", "load_config", "load_model", "load_tokenizer", "model_folder", "model_license"]


@dataclass(frozen=True)
class LoadedModel:
    """A model ready for serving.

    Attributes:
        model: the transformers model with our modules in its layers, in evaluation mode, on its device.
        eos_token_ids: end tokens of the checkpoint.
    """

    model: Any
    eos_token_ids: tuple[int, ...]


def model_folder(name: str) -> Path:
    """The folder of a model given by path, or by the name of one in the package.

    Raises:
        ConfigError: neither exists.
    """
    path = Path(name)
    if path.is_dir():
        return path
    bundled = Path(str(files("graphexec"))) / "checkpoints"
    if (bundled / name / "config.json").is_file():
        return bundled / name
    known = ", ".join(sorted(entry.name for entry in bundled.iterdir() if entry.is_dir()))
    raise ConfigError(
        f"There is no folder {name!r}, and no model of that name in the package (it has: {known}). "
        "Nothing is downloaded: give the folder of a checkpoint."
    )


def model_license(folder: Path) -> str | None:
    """The license that a checkpoint's model card names in its front matter, or None."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    front = card.read_text(encoding="utf-8", errors="replace").split("\n---", 1)[0]
    found = re.search(r"^license:\s*(\S+)", front, re.MULTILINE)
    return found.group(1) if found else None


def load_config(folder: Path) -> Any:
    """The transformers configuration of a checkpoint.

    Raises:
        ConfigError: there is none, or it cannot be read.
    """
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} is not a checkpoint: it has no config.json.")
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as failure:  # transformers raises many kinds for a broken or unknown configuration
        raise ConfigError(f"Cannot read {folder / 'config.json'}: {failure}") from failure


def load_model(
    folder: Path, config: Any, load_format: str, device: torch.device, dtype: torch.dtype, seed: int
) -> LoadedModel:
    """Loads the weights, or draws them for `load_format` "random", and swaps our modules in.

    Raises:
        ConfigError: a weight is missing, broken or of another shape.
    """
    with torch.no_grad():
        if load_format == "random":
            model = _random_model(config, device, dtype, seed)
        else:
            model = _read_model(folder, dtype).to(device)
        model.eval().requires_grad_(False)
        swap_modules(model)
    return LoadedModel(model, _eos_token_ids(folder, config))


def load_tokenizer(folder: Path) -> Tokenizer | None:
    """The checkpoint's tokenizer, or None if it has none.

    Raises:
        ConfigError: its files cannot be read.
    """
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        return None
    from transformers import AutoTokenizer

    try:
        return cast(Tokenizer, AutoTokenizer.from_pretrained(folder, local_files_only=True))
    except Exception as failure:  # see load_config
        raise ConfigError(f"Cannot read the tokenizer in {folder}: {failure}") from failure


def _auto_model() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM


def _random_model(config: Any, device: torch.device, dtype: torch.dtype, seed: int) -> Any:
    auto_model = _auto_model()
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), device:
        torch.manual_seed(seed)
        return auto_model.from_config(config, dtype=dtype)


def _read_model(folder: Path, dtype: torch.dtype) -> Any:
    _check_shards(folder)
    try:
        model, info = _auto_model().from_pretrained(
            folder, dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except Exception as failure:  # see load_config
        raise ConfigError(f"Cannot read the weights in {folder}: {failure}") from failure
    for kind in ("missing_keys", "mismatched_keys", "error_msgs"):
        if info.get(kind):
            shown = ", ".join(str(entry) for entry in list(info[kind])[:4])
            raise ConfigError(f"The checkpoint in {folder} is incomplete or broken ({kind}: {shown}).")
    return model


def _check_shards(folder: Path) -> None:
    """Names what is missing, which transformers would report as an attempt to download."""
    if (folder / "model.safetensors").is_file():
        return
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        raise ConfigError(
            f"{folder} has neither model.safetensors nor model.safetensors.index.json. "
            'To run a bare configuration with random weights, set load_format="random".'
        )
    try:
        shards = set(json.loads(index.read_text())["weight_map"].values())
    except (ValueError, KeyError, AttributeError) as failure:
        raise ConfigError(f"{index} is not a safetensors index: {failure}.") from failure
    absent = sorted(shard for shard in shards if not (folder / shard).is_file())
    if absent:
        raise ConfigError(f"The checkpoint in {folder} is incomplete: {', '.join(absent)} missing.")


def _eos_token_ids(folder: Path, config: Any) -> tuple[int, ...]:
    value = getattr(config, "eos_token_id", None)
    generation = folder / "generation_config.json"
    if generation.is_file():
        try:
            value = json.loads(generation.read_text()).get("eos_token_id", value)
        except ValueError as failure:
            raise ConfigError(f"Cannot read {generation}: {failure}.") from failure
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)
