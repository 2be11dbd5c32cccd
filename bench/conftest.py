"""Puts the same facts into the files of pytest-benchmark as into the other results."""

from __future__ import annotations

import pytest
import torch

from bench.provenance import provenance


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, object]) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    output_json["provenance"] = provenance(["pytest", *config.invocation_params.args], device)
