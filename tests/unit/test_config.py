"""The configuration: unknown names and impossible values are refused, with what to write instead."""

from __future__ import annotations

from pathlib import Path

import pytest

from graphexec.backends import CudaGraphBackend, EagerBackend, create_backend
from graphexec.config import BackendConfig, EngineConfig, backend_names, read_toml
from graphexec.errors import ConfigError
from graphexec.runtime import CpuRuntime


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"max_num_seq": 4}, "'max_num_seq'.*Did you mean 'max_num_seqs'"),
        ({"overlap_dept": 2}, "overlap_dept'.*Did you mean 'overlap_depth'"),
        ({"zzz": 1}, "'zzz'.*Known: model, load_format, device"),
    ],
)
def test_an_unknown_setting_names_the_nearest_valid_one(values: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        EngineConfig(**values)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs=0 is not possible"),
        ({"kv_block_size": 24}, "kv_block_size=24 is not a power of two"),
        ({"kv_block_size": 4}, "kv_block_size=4"),
        ({"kv_memory_fraction": 1.5}, "kv_memory_fraction=1.5"),
        ({"device": "tpu"}, "device='tpu'"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"seed": 2**63}, "seed="),
        ({"max_num_seqs": 8, "max_num_batched_tokens": 4}, "max_num_batched_tokens=4 is less than max_num_seqs=8"),
        ({"max_num_seqs": 8, "backend": {"capture_sizes": [4, 16]}}, "has 16, above max_num_seqs=8"),
        ({"overlap_depth": 5}, "overlap_depth=5"),
        ({"overlap_depth": -1}, "overlap_depth=-1"),
        ({"backend": {"step_timeout_s": 0}}, "step_timeout_s=0"),
        ({"backend": {"capture_sizes": []}}, "at least one"),
        ({"backend": {"capture_sizes": [2, 2]}}, "none twice"),
        ({"backend": {"prefill_sizes": [0]}}, "prefill_sizes.0=0"),
        ({"backend": {"name": "cudagraf"}}, "no such backend.*Did you mean 'cudagraph'"),
    ],
)
def test_an_impossible_value_is_refused_by_name(values: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        EngineConfig(**values)


def test_all_mistakes_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as raised:
        EngineConfig(max_num_seqs=0, kv_memory_fraction=2, moddel="x")
    assert all(name in str(raised.value) for name in ("max_num_seqs", "kv_memory_fraction", "moddel"))


def test_the_backend_by_itself_explains_its_mistakes_too() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'lazy_capture'"):
        BackendConfig(lazy_captures=True)


def test_a_configuration_cannot_be_changed_afterwards() -> None:
    config = EngineConfig()
    with pytest.raises(ValueError, match="frozen"):
        config.max_num_seqs = 3  # type: ignore[misc]  # frozen, which is the point


@pytest.mark.parametrize("moved", [{"overlap_depth": 2}, {"overlap_prefill": False}], ids=["depth", "prefill"])
@pytest.mark.parametrize("kind", [dict, lambda **values: BackendConfig(**values)], ids=["table", "object"])
def test_a_setting_that_once_was_the_backends_is_taken_from_there_with_a_warning(moved: dict, kind: type) -> None:
    (name,) = moved
    with pytest.warns(FutureWarning, match=f"backend.{name} is now {name} of the engine: EngineConfig"):
        config = EngineConfig(backend=kind(name="eager", **moved))
    assert getattr(config, name) == moved[name]
    assert config.backend == BackendConfig(name="eager")
    with pytest.warns(FutureWarning):
        assert EngineConfig(**moved, backend=kind(**moved)) == EngineConfig(**moved)
    with pytest.raises(ConfigError, match=f"{name}.*backend.{name}"):
        EngineConfig(**{name: not moved[name] if name == "overlap_prefill" else 3}, backend=kind(**moved))


def test_a_configuration_without_moved_settings_warns_of_nothing(recwarn: pytest.WarningsRecorder) -> None:
    EngineConfig(overlap_depth=2, overlap_prefill=False, backend={"name": "eager"})
    EngineConfig(backend=BackendConfig())
    assert not recwarn.list


def test_every_setting_is_documented() -> None:
    for model in (BackendConfig, EngineConfig):
        undocumented = [name for name in model.model_fields if f"\n        {name}:" not in (model.__doc__ or "")]
        assert undocumented == []


def test_toml_fills_the_top_level_and_the_backend_table(tmp_path: Path) -> None:
    path = tmp_path / "engine.toml"
    path.write_text('max_num_seqs = 8\ndtype = "float32"\n\n[backend]\nname = "eager"\ncapture_sizes = [1, 8]\n')
    config = EngineConfig.from_toml(path)
    assert (config.max_num_seqs, config.dtype) == (8, "float32")
    assert config.backend == BackendConfig(name="eager", capture_sizes=(1, 8))


def test_toml_has_the_same_manners_about_names(tmp_path: Path) -> None:
    path = tmp_path / "engine.toml"
    path.write_text("[backend]\nstrickt = true\n")
    with pytest.raises(ConfigError, match="Did you mean 'strict'"):
        EngineConfig.from_toml(path)


def test_a_file_that_is_not_there_or_not_toml_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Cannot read"):
        read_toml(tmp_path / "missing.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("max_num_seqs = \n")
    with pytest.raises(ConfigError, match="is not TOML"):
        read_toml(broken)
    broken.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="is not TOML"):
        read_toml(broken)


@pytest.mark.parametrize(("name", "kind"), [("cudagraph", CudaGraphBackend), ("eager", EagerBackend)])
def test_the_built_in_backends_are_found_by_name(name: str, kind: type) -> None:
    assert name in backend_names()
    assert type(create_backend(BackendConfig(name=name), CpuRuntime())) is kind


PLUG_IN = """
from graphexec.backends import EagerBackend
class Registered(EagerBackend):
    pass
def make_nonsense(config, runtime):
    return 7
"""


@pytest.fixture
def plug_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed package that registers two backends."""
    (tmp_path / "graphexec_plug_in.py").write_text(PLUG_IN)
    info = tmp_path / "graphexec_plug_in-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: graphexec-plug-in\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[graphexec.backends]\nregistered = graphexec_plug_in:Registered\nnonsense = graphexec_plug_in:make_nonsense\n"
    )
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("plug_in")
def test_a_package_adds_a_backend_by_an_entry_point() -> None:
    assert {"registered", "cudagraph", "eager"} <= set(backend_names())
    backend = create_backend(EngineConfig(backend={"name": "registered"}).backend, CpuRuntime())
    assert type(backend).__name__ == "Registered"
    assert isinstance(backend, EagerBackend)


@pytest.mark.usefixtures("plug_in")
def test_an_entry_point_that_makes_something_else_is_refused() -> None:
    with pytest.raises(ConfigError, match="graphexec_plug_in:make_nonsense.*int"):
        create_backend(BackendConfig(name="nonsense"), CpuRuntime())


def test_a_backend_that_no_package_registers_is_refused() -> None:
    with pytest.raises(ConfigError, match="registered"):
        BackendConfig(name="registered")
