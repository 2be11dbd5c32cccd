"""Functions of a Python source tree as training documents; a file lies on one side of the held-out split only."""

import ast
import hashlib
import textwrap
import tokenize
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef
Kind = Literal["documented", "plain", "test"]

MIN_BYTES = 60
MAX_BYTES = 4_000
# Installed packages are not the standard library; lib2to3 ships files that are broken on purpose.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "data", "turtledemo"}
TEST_FOLDERS = {"test", "tests", "idle_test"}


class Document(NamedTuple):
    """One function, dedented, without its decorators, ending in one newline."""

    path: str  # of its file, relative to the source tree, with forward slashes
    text: str
    prompt: str  # header and docstring, up to and with their last newline; "" where no statement follows a docstring
    kind: Kind


class Split(NamedTuple):
    """Documents by side; no file, and no text, is on both."""

    train: list[Document]
    held_out: list[Document]


def is_held_out(path: str, share: float, split_seed: int = 0) -> bool:
    """Whether the file at relative `path` belongs to the held-out `share` (0 to 1), by a hash of its path alone."""
    digest = hashlib.sha256(f"{split_seed}:{path}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def source_files(root: Path) -> list[Path]:
    """Python files under `root`, sorted by relative path, installed packages and broken samples left out."""
    found = (file for file in root.rglob("*.py") if not SKIPPED_FOLDERS.intersection(file.relative_to(root).parts))
    return sorted(found, key=lambda file: file.relative_to(root).as_posix())


def read_documents(root: Path, files: Iterable[Path]) -> Iterator[Document]:
    """Documents of `files`, in order; files that do not decode or parse are skipped, exact duplicates are dropped."""
    seen: set[str] = set()
    for file in files:
        path = file.relative_to(root)
        is_test = bool(TEST_FOLDERS.intersection(path.parts)) or path.name.startswith("test_")
        for document in _documents_of_file(file, path.as_posix(), is_test):
            if document.text not in seen:
                seen.add(document.text)
                yield document


def split_documents(documents: Iterable[Document], share: float, split_seed: int = 0) -> Split:
    """Split by file; raises ValueError, saying what was found, where a side would have nothing to train or score on."""
    split = Split([], [])
    for document in documents:
        (split.held_out if is_held_out(document.path, share, split_seed) else split.train).append(document)
    if not split.train or not any(document.prompt and document.kind != "test" for document in split.held_out):
        raise ValueError(
            f"{len(split.train)} training and {len(split.held_out)} held-out functions found: too few files with"
            " documented functions; name a complete source tree with --stdlib"
        )
    return split


def _documents_of_file(file: Path, path: str, is_test: bool) -> Iterator[Document]:
    try:
        with tokenize.open(file) as stream:
            source = stream.read()
        tree = _parse(source)
    except (OSError, SyntaxError, UnicodeDecodeError, ValueError, RecursionError):
        return
    lines = source.split("\n")
    for node in _outer_functions(tree):
        text = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno])).rstrip() + "\n"
        document = _document(text, path, is_test)
        if document is not None:
            yield document


def _document(text: str, path: str, is_test: bool) -> Document | None:
    if not MIN_BYTES <= len(text.encode()) <= MAX_BYTES or "\t" in text or "\f" in text:
        return None
    try:
        body = _parse(text).body
    except (SyntaxError, ValueError):  # a string with lines left of the function's own indentation
        return None
    if len(body) != 1 or not isinstance(body[0], FunctionNode):
        return None
    function = body[0]
    if is_test:
        return Document(path, text, "", "test")
    if ast.get_docstring(function, clean=False) is None:
        return Document(path, text, "", "plain")
    docstring_end = function.body[0].end_lineno or 0
    has_room = len(function.body) > 1 and function.body[1].lineno > docstring_end
    prompt = "".join(text.splitlines(keepends=True)[:docstring_end]) if has_room else ""
    return Document(path, text, prompt, "documented")


def _outer_functions(node: ast.AST) -> Iterator[FunctionNode]:
    """Functions and methods; those inside another function are part of its document."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, FunctionNode):
            yield child
        elif isinstance(child, ast.stmt | ast.excepthandler):
            yield from _outer_functions(child)


def _parse(text: str) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in old sources
        return ast.parse(text)
