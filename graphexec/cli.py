"""The command line: `generate`, `warmup`, `env`. Exit codes: 0, 1 for a failed run, 2 for bad input."""

from __future__ import annotations

import logging
import platform
import reprlib
import sys
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from graphexec.capture.buckets import chunk_slot_ladder, default_ladder, row_ladder
from graphexec.capture.manifest import Manifest
from graphexec.capture.regressions import regressions
from graphexec.config import BackendConfig, EngineConfig, backend_names, read_toml
from graphexec.engine import Engine, EngineStats, RequestOutput, SamplingParams
from graphexec.engine.program import DecoderProgram
from graphexec.engine.resolve import resolve
from graphexec.errors import ConfigError, GraphexecError, RequestError
from graphexec.models.loader import load_config, model_folder, model_license
from graphexec.plan import GraphKey

__all__ = ["app", "main"]

app = typer.Typer(
    help="CUDA-graph execution backend for LLM decode.",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
)
_notes = Console(stderr=True, highlight=False)

Model = Annotated[str | None, typer.Option(help="Checkpoint folder, or the name of a bundled model.")]
LoadFormat = Annotated[str | None, typer.Option(help='"auto", or "random" for random weights from a bare config.')]
DeviceOption = Annotated[str | None, typer.Option(help='"auto", "cpu" or "cuda".')]
Dtype = Annotated[str | None, typer.Option(help='"auto", "bfloat16", "float16", "float32" or "float64".')]
Backend = Annotated[str | None, typer.Option(help='"cudagraph", "eager", or a registered name.')]
Depth = Annotated[int | None, typer.Option(help="Steps submitted ahead of the one being collected, 0 to 4.")]
Compile = Annotated[str | None, typer.Option(help='torch.compile: "model", "layer" or "off".')]
MaxNumSeqs = Annotated[int | None, typer.Option(help="Requests that run at the same time.")]
MaxModelLen = Annotated[int | None, typer.Option(help="Longest prompt plus output, tokens.")]
Config = Annotated[Path | None, typer.Option(help="TOML file with the settings of EngineConfig.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Log every decision.")]


def main() -> None:
    """Runs the command line; every expected error becomes one line and an exit code."""
    try:
        app(standalone_mode=True)
    except (ConfigError, RequestError) as error:
        _notes.print(f"error: {error}", markup=False, soft_wrap=True)
        sys.exit(2)
    except GraphexecError as error:
        _notes.print(f"error: {error}", markup=False, soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


@app.callback(invoke_without_command=True)
def common(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", is_eager=True, help="Print the version and stop.")] = False,
) -> None:
    """CUDA-graph execution backend for LLM decode."""
    if version:
        print(_version_of("graphexec"))
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(2)


@app.command()
def generate(
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT", help="Texts to continue.", show_default=False)],
    model: Model = None,
    load_format: LoadFormat = None,
    device: DeviceOption = None,
    dtype: Dtype = None,
    backend: Backend = None,
    overlap_depth: Depth = None,
    compile: Compile = None,
    max_num_seqs: MaxNumSeqs = None,
    max_model_len: MaxModelLen = None,
    config: Config = None,
    max_tokens: Annotated[int, typer.Option(help="Most output tokens of a prompt.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="0 for all.")] = 0,
    top_p: Annotated[float, typer.Option(help="1 for all.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="0 for all.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="1 for none.")] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="A text that ends the output; may be given again.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the random numbers, with a temperature.")] = None,
    echo: Annotated[bool, typer.Option("--echo", help="Print each PROMPT before what continues it.")] = False,
    chat: Annotated[bool, typer.Option("--chat", help="Each PROMPT is a user turn of a chat.")] = False,
    verbose: Verbose = False,
) -> None:
    """Continue PROMPTs: the text goes to standard output as it comes, the figures to standard error."""
    _set_up_logging(verbose)
    settings = {
        "model": model, "load_format": load_format, "device": device, "dtype": dtype, "compile": compile,
        "max_num_seqs": max_num_seqs, "max_model_len": max_model_len, "overlap_depth": overlap_depth,
    }  # fmt: skip
    params = SamplingParams(
        max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        repetition_penalty=repetition_penalty, stop=stop or (), seed=seed,
    )  # fmt: skip
    # No more slots than prompts: capturing a ladder of 256 to serve one prompt would only make it wait.
    engine_config = _engine_config(config, settings, backend, default_slots=min(len(prompts), 256))
    with Engine(engine_config) as engine:
        refused = _stream_all(engine, prompts, params, _as_turn(engine) if chat else str, echo)
    if refused:
        raise typer.Exit(2)


@app.command()
def warmup(
    model: Model = None,
    load_format: LoadFormat = None,
    device: DeviceOption = None,
    dtype: Dtype = None,
    backend: Backend = None,
    overlap_depth: Depth = None,
    compile: Compile = None,
    max_num_seqs: MaxNumSeqs = None,
    max_model_len: MaxModelLen = None,
    config: Config = None,
    manifest: Annotated[Path, typer.Option(help="Where to write the manifest.")] = Path("graphexec-manifest.json"),
    compare: Annotated[Path | None, typer.Option(help="Fail if something is worse than in this manifest.")] = None,
    tolerance: Annotated[float, typer.Option(help="By which share time and memory may grow.", min=0.0)] = 0.2,
    verbose: Verbose = False,
) -> None:
    """Compile, capture and verify everything that the configuration needs, and write down what was captured."""
    _set_up_logging(verbose)
    settings = {
        "model": model, "load_format": load_format, "device": device, "dtype": dtype, "compile": compile,
        "max_num_seqs": max_num_seqs, "max_model_len": max_model_len, "overlap_depth": overlap_depth,
    }  # fmt: skip
    engine_config = _engine_config(config, settings, backend, default_slots=None)
    if not manifest.parent.is_dir() or manifest.is_dir():
        raise ConfigError(f"Cannot write the manifest to {manifest}: give a file in a folder that exists.")
    old = None if compare is None else Manifest.read(compare)  # before the new one takes its place
    started = time.perf_counter()
    columns = (TextColumn("capturing"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Progress(*columns, TimeElapsedColumn(), console=_notes) as bar:
        task = bar.add_task("", total=None)

        def show(done: int, total: int, key: GraphKey) -> None:
            bar.update(task, completed=done, total=total, description=str(key))

        with Engine(engine_config, progress=show) as engine:
            captured = engine.manifest
    captured.write(manifest)
    if captured.graphs:
        Console().print(_manifest_table(captured))
    seconds = time.perf_counter() - started
    _notes.print(
        f"{len(captured.graphs)} graphs on {captured.device} in {captured.capture_s:.2f} s, "
        f"{captured.pool_bytes / 2**20:.0f} MiB; ready after {seconds:.1f} s; manifest in {manifest}",
        markup=False,
    )
    for key, reason in captured.missing.items():
        _notes.print(f"no graph for the {key}: {reason}", markup=False)
    worse = [] if old is None else regressions(old, captured, tolerance)
    for sentence in worse:
        _notes.print(f"worse: {sentence}", markup=False, soft_wrap=True)
    if worse:
        raise typer.Exit(1)


@app.command()
def env(model: Model = None, config: Config = None) -> None:
    """Print what the machine offers, and the configuration with every open question decided."""
    console = Console(highlight=False)
    machine = Table("machine", "", show_header=False, title="Machine")
    for name, value in _machine():
        machine.add_row(name, value)
    console.print(machine)
    engine_config = _engine_config(config, {"model": model}, None, default_slots=None)
    resolved = resolve(engine_config, load_config(model_folder(engine_config.model)))
    max_rows = resolved.max_num_batched_tokens + engine_config.max_num_seqs
    ladders = {
        "capture_sizes": engine_config.backend.capture_sizes or default_ladder(engine_config.max_num_seqs),
        "prefill_sizes": engine_config.backend.prefill_sizes or row_ladder(max_rows),
        "prefill_slots": engine_config.backend.prefill_slots or chunk_slot_ladder(engine_config.max_num_seqs),
        "decode": engine_config.backend.decode or "full",
        "prefill": engine_config.backend.prefill or "full",
        "variants": engine_config.backend.variants or DecoderProgram.common_variants,
        "verify": resolved.device.type == "cuda" if (asked := engine_config.backend.verify) is None else asked,
    }
    table = Table("setting", "value", "why", title="Configuration")
    for name in EngineConfig.model_fields:
        if name == "backend":
            continue
        asked = getattr(engine_config, name)
        value = getattr(resolved, name, asked)
        given = "as configured" if name in engine_config.model_fields_set else "default"
        default = "measured after loading" if value is None else given
        table.add_row(name, str(value), resolved.reasons.get(name, default))
    for name, value in engine_config.backend.model_dump().items():
        given = "as configured" if name in engine_config.backend.model_fields_set else "default"
        table.add_row(f"backend.{name}", _shown(ladders.get(name, value)), given)
    console.print(table)


def _as_turn(engine: Engine) -> Callable[[str], list[int]]:
    return lambda prompt: engine.chat([{"role": "user", "content": prompt}])


def _shown(value: object) -> str:
    if isinstance(value, tuple) and len(value) > 8:
        return f"{', '.join(map(str, value[:6]))} ... {value[-1]} ({len(value)} sizes)"
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _stream_all(
    engine: Engine, prompts: list[str], params: SamplingParams, encode: Callable[[str], str | list[int]], echo: bool
) -> bool:
    """Prints the prompts' texts one below the other, each as it comes; returns whether some prompt was refused."""
    ids: list[str] = []
    heads: list[str] = []  # what is printed before the text of each
    refused = False
    for prompt in prompts:
        try:
            ids.append(engine.add_request(encode(prompt), params))
            heads.append(prompt if echo else "")
        except RequestError as refusal:
            refused = True
            _notes.print(f"error: prompt {reprlib.repr(prompt)}: {refusal}", markup=False, soft_wrap=True)
    started = time.perf_counter()
    latest: dict[str, RequestOutput] = {}
    failed: list[RequestOutput] = []
    shown, printed, tokens = 0, 0, 0
    while engine.has_unfinished():
        for output in engine.step():
            latest[output.request_id] = output
            tokens += len(output.new_token_ids)
            if output.finish_reason == "error":
                failed.append(output)
        while shown < len(ids) and ids[shown] in latest:
            output = latest[ids[shown]]
            text = heads[shown] + output.text
            sys.stdout.write(_printable(text[printed:]))
            sys.stdout.flush()
            printed = len(text)
            if not output.finished:
                break
            sys.stdout.write("\n")
            sys.stdout.flush()
            shown, printed = shown + 1, 0
    _notes.print(_figures(engine, tokens, time.perf_counter() - started), markup=False, soft_wrap=True)
    if failed:
        raise GraphexecError("; ".join(f"request {output.request_id}: {output.error}" for output in failed))
    return refused


def _printable(text: str) -> str:
    """What a terminal may be sent: a model must not be able to drive it with control characters."""
    if not sys.stdout.isatty():
        return text
    return "".join(character if character in "\n\t" or character.isprintable() else "\ufffd" for character in text)


def _figures(engine: Engine, tokens: int, seconds: float) -> str:
    stats: EngineStats = engine.stats()
    per_step = stats.host_us / max(stats.steps, 1)
    license_name = model_license(model_folder(engine.config.model))
    model = engine.config.model + (f" (license {license_name})" if license_name else "")
    return (
        f"[{model} on {engine.resolved.device}: {tokens} tokens in {seconds:.2f} s, "
        f"{tokens / seconds:.0f} tokens/s, {stats.replays} of {stats.steps} steps as graphs, "
        f"depth {engine.config.overlap_depth}, host {per_step:.0f} us a step]"
    )


def _engine_config(
    path: Path | None,
    settings: Mapping[str, object],
    backend: str | None,
    default_slots: int | None,
) -> EngineConfig:
    """The settings of the file, overridden by those of the command line."""
    values: dict[str, Any] = read_toml(path) if path is not None else {}
    values |= {name: value for name, value in settings.items() if value is not None}
    chosen = {} if backend is None else {"name": backend}
    section = values.get("backend", {})
    if not isinstance(section, dict):
        raise ConfigError(f"{path}: backend must be a table, [backend].")
    values["backend"] = BackendConfig(**(section | chosen))
    if default_slots is not None:
        values.setdefault("max_num_seqs", max(default_slots, 1, *(values["backend"].capture_sizes or ())))
    return EngineConfig(**values)


def _manifest_table(manifest: Manifest) -> Table:
    table = Table("step", "sampler", "slots", "rows", "graphs", "nodes", "MiB", "ms", "verified")
    for group in manifest.groups():
        key, last, graphs = group.first.key, group.last.key, group.graphs
        nodes = [graph.nodes for graph in graphs]
        table.add_row(
            key.phase,
            key.variant,
            _from_to(key.bucket, last.bucket),
            _from_to(key.rows, last.rows),
            str(len(graphs)),
            _from_to(min(nodes), max(nodes)),
            f"{sum(graph.pool_bytes for graph in graphs) / 2**20:.1f}",
            f"{sum(graph.capture_s for graph in graphs) * 1e3:.1f}",
            str(sum(graph.verified for graph in graphs)),
        )
    return table


def _from_to(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


def _machine() -> list[tuple[str, str]]:
    rows = [("python", platform.python_version()), ("torch", str(torch.__version__))]
    packages = ("graphexec", "cuda-python", "triton", "transformers")
    rows.extend((package, _version_of(package)) for package in packages)
    rows.append(("backends", ", ".join(backend_names())))
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = f"{properties.total_memory / 2**30:.0f} GiB, {properties.multi_processor_count} SMs"
        rows.append((f"cuda:{index}", f"{properties.name}, {memory}"))
    if not torch.cuda.is_available():
        rows.append(("cuda", "no device; the CPU runtime serves"))
    return rows


def _version_of(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _set_up_logging(verbose: bool) -> None:
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # type: ignore[no-untyped-call]  # unannotated there; our own bar says what takes time
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(message)s", stream=sys.stderr)
