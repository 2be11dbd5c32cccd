"""What a user can configure: frozen models that refuse unknown names. `None` means "decide for me" (see resolve.py)."""

from __future__ import annotations

import difflib
import tomllib
import warnings
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from graphexec.errors import ConfigError

__all__ = [
    "BACKEND_GROUP",
    "BackendConfig",
    "CaptureMode",
    "CompileMode",
    "Device",
    "Dtype",
    "EngineConfig",
    "backend_names",
    "read_toml",
]

Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "bfloat16", "float16", "float32", "float64"]
CompileMode = Literal["model", "layer", "off"]
CaptureMode = Literal["full", "piecewise", "off"]
BACKEND_GROUP = "graphexec.backends"
"""Entry-point group of backends: callables `(config, runtime) -> ExecutionBackend`."""
_BUILT_IN = ("cudagraph", "eager")
PositiveInt = Annotated[int, Field(ge=1)]
OverlapDepth = Annotated[int, Field(ge=0, le=4)]
_MOVED = ("overlap_depth", "overlap_prefill")
"""Settings of the engine that were once the backend's."""


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as failure:
            raise ConfigError(_explain(type(self), failure)) from None


class BackendConfig(_Config):
    """How steps are executed.

    Attributes:
        name: "cudagraph", "eager", or a name registered under the entry-point group `graphexec.backends`.
        capture_sizes: batch sizes (slots) to capture; None for 1, 2, 4, then steps of 8 to 256, then of 16.
        prefill_sizes: padded row counts of steps with prompt chunks; None for a ladder of about 12 % steps.
        prefill_slots: padded slot counts of steps with prompt chunks; None for 8, 32, 96 and all.
        decode: how steps without prompt chunks run. "full" replays a whole graph; "piecewise" the pieces between the
            program's eager breaks, the optional ones too; "off" runs them eagerly. None: whole, unless the program
            marks a break that is not optional.
        prefill: the same of steps with prompt chunks.
        variants: variants whose graphs are captured in the warm-up; None for those that the program calls common. The
            others are captured, shape by shape, on first use.
        lazy_capture: capture a missing graph when it is first needed, which stalls that step.
        strict: refuse, instead of counting, a step that has no graph, and at the start ladders that leave one out.
            Nobody refuses idle steps, steps that report log-probabilities of a prompt, and phases that are "off".
        verify: compare every graph with the eager step after its capture, or none; None: on CUDA those of decode steps,
            and the largest, the middle and the smallest of steps with prompt chunks (a CPU graph is the step).
        measure: time a few replays of every graph in the warm-up, for its manifest.
        step_timeout_s: seconds after which a step that has not finished is an error.
        overlap_depth: has moved to EngineConfig, which takes it from here with a FutureWarning; no backend reads it.
        overlap_prefill: has moved likewise.
    """

    name: str = "cudagraph"
    capture_sizes: tuple[PositiveInt, ...] | None = None
    prefill_sizes: tuple[PositiveInt, ...] | None = None
    prefill_slots: tuple[PositiveInt, ...] | None = None
    decode: CaptureMode | None = None
    prefill: CaptureMode | None = None
    variants: tuple[str, ...] | None = None
    lazy_capture: bool = False
    strict: bool = False
    verify: bool | None = None
    measure: bool = False
    step_timeout_s: Annotated[float, Field(gt=0)] = 120.0
    overlap_depth: OverlapDepth | None = None
    overlap_prefill: bool | None = None

    @field_validator("name")
    @classmethod
    def _registered(cls, name: str) -> str:
        known = backend_names()
        if name not in known:
            raise ValueError(f"there is no such backend. {_nearest(name, known)}".rstrip("."))
        return name

    @field_validator("capture_sizes", "prefill_sizes", "prefill_slots", "variants")
    @classmethod
    def _distinct(cls, values: tuple[object, ...] | None) -> tuple[object, ...] | None:
        if values is not None and (not values or len(set(values)) != len(values)):
            raise ValueError("it must name at least one, and none twice")
        return values


class EngineConfig(_Config):
    """The bundled engine: which model, where, how large, and how its steps are executed.

    Attributes:
        model: a folder with a Hugging Face checkpoint, or the name of a model in the package.
        load_format: "auto" reads the weights; "random" needs only config.json and draws them with `seed`.
        device: "auto" takes a CUDA device if there is one.
        dtype: of weights, activations and KV cache; "auto" is the checkpoint's on CUDA and float32 on the CPU.
        max_num_seqs: slots, i.e. requests that run at the same time.
        max_model_len: longest prompt plus output, tokens; None for what the model allows, at most 4096.
        max_num_batched_tokens: most rows of a step with prompt chunks; None for max(2048, max_num_seqs).
        max_chunk_tokens: most prompt tokens in a step that also decodes; None for no limit beside the former. With
            fewer the time between tokens is steadier, and first tokens come later.
        long_prompt_share: of a step's prompt tokens, how large a share one prompt may take while others wait, 0 to 1.
            Below 1, short prompts get past a long one.
        kv_block_size: tokens of a KV block, a power of two from 8 to 256.
        num_kv_blocks: KV blocks beside the reserved one; None to size the cache by the free memory.
        kv_memory_fraction: share of the free device memory that a cache sized by itself may take.
        prefix_caching: keep the KV blocks of computed tokens, and compute no whole block twice while it is kept.
        max_stop_token_ids: width of the table of stop ids of a slot, the model's own included.
        max_stop_sequences: stop sequences of a request.
        max_stop_sequence_tokens: tokens of a stop sequence.
        max_biased_token_ids: entries of logit_bias and bad_token_ids of a request, together.
        seed: of random weights, and of requests that bring none.
        compile: torch.compile of the whole "model", of each "layer", or "off"; None: "layer" on CUDA, else "off".
        overlap_depth: steps that the engine submits ahead of the one it collects, 0 to 4. 0 is the classical loop.
        overlap_prefill: let steps with prompt chunks overlap too; false drains the pipeline around them.
        expected_manifest: a report that `graphexec warmup` wrote. The engine refuses to start where its device, its
            versions or its settings are others than those of the report.
        backend: see BackendConfig.
    """

    model: str = "tiny"
    load_format: Literal["auto", "random"] = "auto"
    device: Device = "auto"
    dtype: Dtype = "auto"
    max_num_seqs: Annotated[int, Field(ge=1, le=4096)] = 256
    max_model_len: PositiveInt | None = None
    max_num_batched_tokens: PositiveInt | None = None
    max_chunk_tokens: PositiveInt | None = None
    long_prompt_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    kv_block_size: Annotated[int, Field(ge=8, le=256)] = 16
    num_kv_blocks: PositiveInt | None = None
    kv_memory_fraction: Annotated[float, Field(gt=0, le=1)] = 0.9
    prefix_caching: bool = True
    max_stop_token_ids: Annotated[int, Field(ge=1, le=128)] = 16
    max_stop_sequences: Annotated[int, Field(ge=1, le=64)] = 8
    max_stop_sequence_tokens: Annotated[int, Field(ge=1, le=64)] = 16
    max_biased_token_ids: Annotated[int, Field(ge=1, le=4096)] = 300
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    compile: CompileMode | None = None
    overlap_depth: OverlapDepth = 1
    overlap_prefill: bool = True
    expected_manifest: str | None = None
    backend: BackendConfig = BackendConfig()

    def __init__(self, **values: Any) -> None:
        super().__init__(**_with_moved_settings(values))

    @field_validator("model", "expected_manifest", mode="before")
    @classmethod
    def _path(cls, value: object) -> object:
        return str(value) if isinstance(value, Path) else value

    @field_validator("backend", mode="before")
    @classmethod
    def _table(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        try:
            return BackendConfig(**value)
        except ConfigError as failure:
            raise ConfigError(f"In [backend]: {failure}") from None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.kv_block_size & (self.kv_block_size - 1):
            raise ValueError(f"kv_block_size={self.kv_block_size} is not a power of two.")
        if self.max_num_batched_tokens is not None and self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens={self.max_num_batched_tokens} is less than max_num_seqs={self.max_num_seqs}: "
                "a step must hold one token of every running request."
            )
        largest = max(self.backend.capture_sizes or (1,))
        if largest > self.max_num_seqs:
            raise ValueError(f"backend.capture_sizes has {largest}, above max_num_seqs={self.max_num_seqs}.")
        refuses = self.backend.strict and not self.backend.lazy_capture
        if refuses and self.backend.capture_sizes and largest < self.max_num_seqs:
            raise ValueError(
                f"backend.strict refuses batches without a graph, and backend.capture_sizes ends at {largest}, below "
                f"max_num_seqs={self.max_num_seqs}. Add that size, or set strict=false."
            )
        return self

    @classmethod
    def from_toml(cls, path: str | Path) -> Self:
        """Reads a TOML file: these fields at the top level, the backend's in the table `[backend]`.

        Raises:
            ConfigError: the file cannot be read, is not TOML, or has a wrong name or value.
        """
        values = read_toml(path)
        try:
            return cls(**values)
        except ConfigError as failure:
            raise ConfigError(f"{path}: {failure}") from None


def read_toml(path: str | Path) -> dict[str, Any]:
    """The content of a TOML file.

    Raises:
        ConfigError: it cannot be read, or is not TOML.
    """
    try:
        return tomllib.loads(Path(path).read_text())
    except OSError as failure:
        raise ConfigError(f"Cannot read {path}: {failure.strerror}.") from failure
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as failure:
        raise ConfigError(f"{path} is not TOML: {failure}.") from failure


def backend_names() -> list[str]:
    """The names that a backend can be chosen by on this machine."""
    return sorted({*_BUILT_IN, *(point.name for point in entry_points(group=BACKEND_GROUP))})


def _with_moved_settings(values: dict[str, Any]) -> dict[str, Any]:
    """The values of an EngineConfig, with what stands in its backend for historical reasons taken over.

    Raises:
        ConfigError: the engine and its backend name different values.
    """
    backend = values.get("backend")
    given = backend if isinstance(backend, dict) else backend.model_dump() if isinstance(backend, BackendConfig) else {}
    moved = {name: given[name] for name in _MOVED if given.get(name) is not None}
    if not moved:
        return values
    for name, value in moved.items():
        if values.get(name, value) != value:
            raise ConfigError(f"{name}={values[name]!r}, and backend.{name}={value!r}. Leave out the latter.")
        warnings.warn(
            f"backend.{name} is now {name} of the engine: EngineConfig({name}={value!r}), in TOML above [backend].",
            FutureWarning,
            stacklevel=3,
        )
    if isinstance(backend, BackendConfig):
        cleared: object = backend.model_copy(update=dict.fromkeys(moved))
    else:
        cleared = {name: value for name, value in given.items() if name not in moved}
    return values | moved | {"backend": cleared}


def _explain(model: type[BaseModel], failure: ValidationError) -> str:
    return " ".join(_explain_one(model, dict(error)) for error in failure.errors())


def _explain_one(model: type[BaseModel], error: dict[str, Any]) -> str:
    path = [str(part) for part in error["loc"]]
    name = ".".join(path)
    if error["type"] == "extra_forbidden":
        if model is not BackendConfig and path[-1] in BackendConfig.model_fields:
            return f"Unknown setting {name!r}. It belongs to the backend (in TOML, under [backend])."
        return f"Unknown setting {name!r}. {_nearest(path[-1], list(model.model_fields))}"
    reason = str(error["msg"]).removeprefix("Value error, ")
    end = "" if reason.endswith(("?", ".")) else "."
    return f"{name}={error['input']!r} is not possible: {reason}{end}" if name else f"{reason}{end}"


def _nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(known)}."
