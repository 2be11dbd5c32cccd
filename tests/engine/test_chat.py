"""The chat template of a checkpoint, where it has one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from graphexec import Engine, EngineConfig, RequestError, SamplingParams
from graphexec.models.loader import model_folder

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[me]"
TURN = [{"role": "user", "content": "hi"}]


def test_a_conversation_becomes_the_templates_prompt(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folder("tiny-random"), folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    config = EngineConfig(model=str(folder), load_format="random", device="cpu", max_num_seqs=1, max_model_len=64)
    with Engine(config) as engine:
        prompt = engine.chat(TURN)
        assert engine.tokenizer is not None
        assert engine.tokenizer.decode(prompt) == "[user]hi[me]"
        assert len(engine.generate(prompt, SamplingParams(max_tokens=3, ignore_eos=True))[0].token_ids) == 3


def test_a_model_without_a_template_says_so() -> None:
    config = EngineConfig(device="cpu", max_num_seqs=1, max_model_len=64)
    with Engine(config) as engine, pytest.raises(RequestError, match="no chat template"):
        engine.chat(TURN)
