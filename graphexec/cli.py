"""The command line: `generate`, `warmup`, `env`. Exit codes: 0, 1 for a failed run, 2 for bad input."""

from __future__ import annotations

import logging
import math
import reprlib
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from graphexec.capture.budget import Budget
from graphexec.config import BackendConfig, EngineConfig, read_toml
from graphexec.engine import Engine, EngineStats, RequestOutput, SamplingParams
from graphexec.environment import configuration_table, machine_table, version_of
from graphexec.errors import ConfigError, GraphexecError, RequestError
from graphexec.models.loader import model_folder, model_license
from graphexec.warmup.tool import Wishes, capture_modes, warm_up

__all__ = ["app", "main"]

app = typer.Typer(
    help="CUDA-graph execution backend for LLM decode.",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
)
_notes = Console(stderr=True, highlight=False)
_REPORT_WIDTH = 132
"""Columns with which the figures of a report are whole; a file has no width, and a narrow terminal breaks lines."""

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
        print(version_of("graphexec"))
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
    trace_out: Annotated[Path | None, typer.Option(help="File for the sizes of the steps, see warmup --trace.")] = None,
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
    if trace_out is not None and (not trace_out.parent.is_dir() or trace_out.is_dir()):
        raise ConfigError(f"Cannot write the trace to {trace_out}: give a file in a folder that exists.")
    with Engine(engine_config) as engine:
        refused = _stream_all(engine, prompts, params, _as_turn(engine) if chat else str, echo)
        if trace_out is not None:
            engine.stats().traffic.write(trace_out)
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
    report: Annotated[Path, typer.Option(help="JSON file to write; a PNG comes beside it.")] = Path(
        "graphexec-report.json"
    ),
    compare: Annotated[Path | None, typer.Option(help="Fail if something is worse than in this report.")] = None,
    tolerance: Annotated[float, typer.Option(help="By which share time and memory may grow.", min=0.0)] = 0.2,
    budget_mib: Annotated[float | None, typer.Option(help="Choose sizes whose graphs fit into so many MiB.")] = None,
    budget_seconds: Annotated[float | None, typer.Option(help="Choose sizes captured in so many seconds.")] = None,
    trace: Annotated[Path | None, typer.Option(help="What to choose for: a file of generate --trace-out.")] = None,
    modes: Annotated[str | None, typer.Option(help='Measure these, too, e.g. "full,piecewise".')] = None,
    check_frozen: Annotated[bool, typer.Option("--check-frozen", help="Look for host numbers in the graphs.")] = False,
    verbose: Verbose = False,
) -> None:
    """Compile, capture and verify what the configuration needs or a budget allows, and report what it costs."""
    _set_up_logging(verbose)
    settings = {
        "model": model, "load_format": load_format, "device": device, "dtype": dtype, "compile": compile,
        "max_num_seqs": max_num_seqs, "max_model_len": max_model_len, "overlap_depth": overlap_depth,
    }  # fmt: skip
    for name, limit in (("--budget-mib", budget_mib), ("--budget-seconds", budget_seconds)):
        if limit is not None and not limit > 0:
            raise ConfigError(f"{name}={limit:g} is a budget of nothing: it must be above 0.")
    limits = [math.inf if limit is None else limit for limit in (budget_mib, budget_seconds)]
    wishes = Wishes(
        report=report, compare=compare, tolerance=tolerance, trace=trace,
        budget=Budget(*limits) if min(limits) < math.inf else None, modes=() if modes is None else capture_modes(modes),
        check_frozen=check_frozen,
    )  # fmt: skip
    engine_config = _engine_config(config, settings, backend, default_slots=None)
    output = Console(width=max(Console().width, _REPORT_WIDTH))
    if not warm_up(engine_config, wishes, output, _notes):
        raise typer.Exit(1)


@app.command()
def env(model: Model = None, config: Config = None) -> None:
    """Print what the machine offers, and the configuration with every open question decided."""
    console = Console(highlight=False)
    console.print(machine_table())
    console.print(configuration_table(_engine_config(config, {"model": model}, None, default_slots=None)))


def _as_turn(engine: Engine) -> Callable[[str], list[int]]:
    return lambda prompt: engine.chat([{"role": "user", "content": prompt}])


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


def _set_up_logging(verbose: bool) -> None:
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # type: ignore[no-untyped-call]  # unannotated there; our own bar says what takes time
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(message)s", stream=sys.stderr)
