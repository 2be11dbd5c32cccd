"""The layers: who may import whom, what is packaged, and that our folders do not stand in anybody's way."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RANKS = {
    "kernels": 0,
    "runtime": 0,
    "models": 1,
    "capture": 1,
    "controller": 1,
    "rings": 1,
    "lifetime": 1,
    "slots": 1,
    "deltas": 1,
    "pipeline": 2,
    "backends": 2,
    "engine": 3,
    "warmup": 4,
    "environment": 4,
    "cli": 5,
}
ANYWHERE = {"config", "errors", "plan"}
OUTSIDE = {"", "__main__"}  # the front doors: `import graphexec` and `python -m graphexec`


def package_folders() -> dict[str, Path]:
    """Packages by their dotted names; links are followed."""
    found = {}
    for folder, _, files in os.walk(ROOT / "graphexec", followlinks=True):
        if any(name.endswith(".py") for name in files):
            found[".".join(Path(folder).relative_to(ROOT).parts)] = Path(folder)
    return found


def modules() -> dict[str, Path]:
    """Every module by its dotted name."""
    found = {}
    for package, folder in package_folders().items():
        for path in sorted(folder.glob("*.py")):
            found[package if path.stem == "__init__" else f"{package}.{path.stem}"] = path
    return found


def imports(path: Path, known: Mapping[str, Path]) -> Iterator[str]:
    """Modules of ours that `path` imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                if name in known:
                    yield name
                elif node.module in known:
                    yield node.module


def component(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def forbidden(importer: str, imported: str) -> bool:
    """Whether an import goes upward. Sideways is another question: it must only not close a circle."""
    below, above = component(imported), component(importer)
    if above in OUTSIDE or above == below:
        return False
    if below in ANYWHERE:
        return False
    return above in ANYWHERE or below in OUTSIDE or RANKS[below] > RANKS[above]


def test_every_module_has_a_layer() -> None:
    assert {component(module) for module in modules()} == {*RANKS, *ANYWHERE, *OUTSIDE}


def test_nothing_imports_upward() -> None:
    known = modules()
    upward = [
        f"{module} -> {target}"
        for module, path in known.items()
        for target in imports(path, known)
        if forbidden(module, target)
    ]
    assert upward == []


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("graphexec.kernels.update", "graphexec.capture.buckets"),
        ("graphexec.controller", "graphexec.pipeline"),
        ("graphexec.backends.eager", "graphexec.engine"),
        ("graphexec.engine.engine", "graphexec.cli"),
        ("graphexec.config", "graphexec.rings"),
        ("graphexec.slots", "graphexec"),
    ],
)
def test_the_rule_knows_an_upward_import(importer: str, imported: str) -> None:
    assert forbidden(importer, imported)


def test_components_do_not_import_each_other_in_a_circle() -> None:
    known = modules()
    graph: dict[str, set[str]] = {}
    for module, path in known.items():
        if component(module) not in OUTSIDE:
            targets = {component(target) for target in imports(path, known)}
            graph.setdefault(component(module), set()).update(targets - {component(module)})
    _assert_no_circle(graph)


def test_files_do_not_import_each_other_in_a_circle() -> None:
    """Not even for types alone, nor within a function: two files that need each other are one."""
    known = modules()
    graph = {
        module: set(imports(path, known)) - {module}
        for module, path in known.items()
        if component(module) not in OUTSIDE
    }
    packages = set(package_folders())
    for module in graph:  # a module within a package may be imported by the package's front door, and not the reverse
        assert not {target for target in graph[module] if target in packages and module.startswith(f"{target}.")}, (
            module
        )
    _assert_no_circle(graph)


def test_nobody_imports_a_private_name_of_another_module() -> None:
    known = modules()
    private = [
        f"{module}: {node.module}.{alias.name}"
        for module, path in known.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("graphexec")
        for alias in node.names
        if alias.name.startswith("_")
    ]
    assert private == []


def test_nobody_imports_capture_or_kernels_by_their_bare_names() -> None:
    """Two copies of a module would register its operators twice."""
    bare = []
    for path in ROOT.rglob("*.py"):
        if not {"build", ".venv", ".git"} & set(path.relative_to(ROOT).parts):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
                bare += [f"{path}: {name}" for name in names if name.split(".")[0] in ("capture", "kernels")]
    assert bare == []


@pytest.mark.parametrize("folder", ["capture", "kernels"])
def test_the_linked_folders_open_with_a_docstring_only(folder: str) -> None:
    """transformers imports a module `kernels` where it finds one; ours must then do nothing."""
    tree = ast.parse((ROOT / folder / "__init__.py").read_text())
    assert len(tree.body) == 1
    assert ast.get_docstring(tree)
    link = ROOT / "graphexec" / folder
    assert link.is_symlink()
    assert link.readlink() == Path("..") / folder


def test_every_module_says_in_its_first_line_what_it_is_for() -> None:
    silent = [str(path) for path in modules().values() if not ast.get_docstring(ast.parse(path.read_text()))]
    assert silent == []


def test_the_packages_listed_are_the_package_folders() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(package_folders())


def test_transformers_works_in_the_repository_root_and_does_not_take_our_kernels_for_its_own() -> None:
    """It probes for a Hugging Face package of that name, finds our folder, and must not come to use it."""
    code = (
        "import sys, transformers\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "from transformers.utils import is_kernels_available\n"
        "LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,"
        " num_attention_heads=1, num_key_value_heads=1))\n"
        "ours = [name for name in sys.modules if name.startswith(('kernels.', 'capture', 'graphexec'))]\n"
        "print(is_kernels_available(), ours)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "False []"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel built from a copy, so that no build folder is left in the repository."""
    source, target = tmp_path_factory.mktemp("source") / "repository", tmp_path_factory.mktemp("wheel")
    source.mkdir()
    for name in ("graphexec", "capture", "kernels"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--no-index", "-q"]
    done = subprocess.run(
        [*command, "--wheel-dir", str(target)], cwd=source, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    (built,) = target.glob("*.whl")
    return zipfile.ZipFile(built)


def test_the_wheel_holds_every_module_and_every_checkpoint(wheel: zipfile.ZipFile) -> None:
    expected = {module.replace(".", "/") for module in modules()}
    held = {name.removesuffix(".py").removesuffix("/__init__") for name in wheel.namelist() if name.endswith(".py")}
    assert held == expected
    checkpoints = [path for path in (ROOT / "graphexec" / "checkpoints").rglob("*") if path.is_file()]
    assert checkpoints
    wanted = {path.relative_to(ROOT).as_posix() for path in checkpoints} | {"graphexec/py.typed"}
    assert wanted <= set(wheel.namelist())


def test_the_wheel_installs_nothing_at_the_top_level_but_graphexec(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"graphexec"}


def _assert_no_circle(graph: Mapping[str, set[str]]) -> None:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as circle:
        pytest.fail(f"circle: {' -> '.join(circle.args[1])}")


def test_everything_imports_without_triton() -> None:
    """Its kernels cannot be launched then, and the references need none."""
    names = sorted(modules().keys() - {"graphexec.__main__"})
    code = f"import sys, importlib; sys.modules['triton'] = None\nfor name in {names}: importlib.import_module(name)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
