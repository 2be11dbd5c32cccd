"""The bundled engine: continuous batching over an execution backend, and the first user of its public API."""

from graphexec.engine.engine import Engine
from graphexec.engine.outputs.logprobs import TokenLogprobs
from graphexec.engine.outputs.output import RequestOutput, TokenIds
from graphexec.engine.params import SamplingParams
from graphexec.engine.stats import EngineStats

__all__ = ["Engine", "EngineStats", "RequestOutput", "SamplingParams", "TokenIds", "TokenLogprobs"]
