"""Copies of a function with its local names changed, so that a small corpus read often is not learnt by heart."""

import ast
import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence

from bench.tiny.corpus import Document

# Names that stand for a role, not for a value of the function's own.
KEPT_NAMES = {"self", "cls", "args", "kwargs", "_", "__class__"}
MIN_USES = 3  # of a name in the corpus, before it is given to another function


def local_names(text: str) -> list[str]:
    """Parameters and assigned names of the function in `text`, in alphabetical order."""
    names = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return sorted(name for name in names - KEPT_NAMES if not name.startswith("__"))


def name_pool(documents: Iterable[Document]) -> list[str]:
    """Local names of `documents`, each as often as functions use it, to draw new names from."""
    uses = Counter(name for document in documents for name in local_names(document.text))
    return [name for name, count in sorted(uses.items()) if count >= MIN_USES for _ in range(count)]


def renamed_copies(documents: Iterable[Document], pool: Sequence[str], count: int, seed: int) -> list[str]:
    """`count` texts for each document, in order; one without local names comes back as it is."""
    generator = random.Random(seed)
    return [
        renamed(document.text, names, pool, generator)
        for document in documents
        for names in [local_names(document.text)]
        for _ in range(count)
    ]


def renamed(text: str, names: Sequence[str], pool: Sequence[str], generator: random.Random) -> str:
    """`text` with about half of its local `names` replaced, everywhere but after a dot, also in its docstring."""
    taken = set(re.findall(r"\w+", text))
    replacements = {}
    for name in names:
        new = generator.choice(pool) if pool else name
        if generator.random() < 0.5 and new not in taken:
            taken.add(new)
            replacements[name] = new
    if not replacements:
        return text
    pattern = r"(?<![\w.])(?:" + "|".join(map(re.escape, replacements)) + r")(?!\w)"
    return re.sub(pattern, lambda match: replacements[match.group()], text)
