"""What `graphexec env` shows: the machine, and a configuration with every open question decided."""

from __future__ import annotations

import platform
from importlib import metadata

import torch
from rich.table import Table

from graphexec.capture.buckets import chunk_slot_ladder, default_ladder, row_ladder
from graphexec.config import EngineConfig, backend_names
from graphexec.engine.program import DecoderProgram
from graphexec.engine.resolve import resolve
from graphexec.models.loader import load_config, model_folder

__all__ = ["configuration_table", "machine_table", "version_of"]


def machine_table() -> Table:
    """Versions, backends and devices."""
    table = Table("machine", "", show_header=False, title="Machine")
    for name, value in _machine():
        table.add_row(name, value)
    return table


def configuration_table(config: EngineConfig) -> Table:
    """Every setting, its value, and who decided it.

    Raises:
        ConfigError: a wish cannot be met on this machine.
    """
    resolved = resolve(config, load_config(model_folder(config.model)))
    max_rows = resolved.max_num_batched_tokens + config.max_num_seqs
    ladders = {
        "capture_sizes": config.backend.capture_sizes or default_ladder(config.max_num_seqs),
        "prefill_sizes": config.backend.prefill_sizes or row_ladder(max_rows),
        "prefill_slots": config.backend.prefill_slots or chunk_slot_ladder(config.max_num_seqs),
        "decode": config.backend.decode or "full",
        "prefill": config.backend.prefill or "full",
        "variants": config.backend.variants or DecoderProgram.common_variants,
        "verify": resolved.device.type == "cuda" if (asked := config.backend.verify) is None else asked,
    }
    table = Table("setting", "value", "why", title="Configuration")
    for name in EngineConfig.model_fields:
        if name == "backend":
            continue
        asked = getattr(config, name)
        value = getattr(resolved, name, asked)
        given = "as configured" if name in config.model_fields_set else "default"
        default = "measured after loading" if value is None else given
        table.add_row(name, str(value), resolved.reasons.get(name, default))
    for name, value in config.backend.model_dump().items():
        given = "as configured" if name in config.backend.model_fields_set else "default"
        table.add_row(f"backend.{name}", _shown(ladders.get(name, value)), given)
    return table


def _shown(value: object) -> str:
    if isinstance(value, tuple) and len(value) > 8:
        return f"{', '.join(map(str, value[:6]))} ... {value[-1]} ({len(value)} sizes)"
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _machine() -> list[tuple[str, str]]:
    rows = [("python", platform.python_version()), ("torch", str(torch.__version__))]
    packages = ("graphexec", "cuda-python", "triton", "transformers")
    rows.extend((package, version_of(package)) for package in packages)
    rows.append(("backends", ", ".join(backend_names())))
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = f"{properties.total_memory / 2**30:.0f} GiB, {properties.multi_processor_count} SMs"
        rows.append((f"cuda:{index}", f"{properties.name}, {memory}"))
    if not torch.cuda.is_available():
        rows.append(("cuda", "no device; the CPU runtime serves"))
    return rows


def version_of(package: str) -> str:
    """Of an installed package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
