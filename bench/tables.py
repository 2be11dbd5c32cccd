"""Makes the benchmark tables and plots from the committed results, or checks that they are up to date.

    python -m bench.tables            writes into README.md, bench/RESULTS.md, bench/results/plots/  (needs matplotlib)
    python -m bench.tables --check    exit code 1 where they are not what the results say

A section stands between `<!-- bench:NAME -->` and `<!-- /bench -->`; what lies between is made, never written by hand.
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from bench.committed import Committed
from bench.plots import PLOTS, draw, fingerprint_in
from bench.sections import SECTIONS, figures

__all__ = ["Page", "filled"]

_REGION = re.compile(r"(?P<begin><!-- bench:(?P<name>[\w-]+) -->\n)(?P<text>.*?)(?P<end><!-- /bench -->)", re.DOTALL)
_MARKER = re.compile(r"<!-- /?bench\b.*?-->")


@dataclass(frozen=True)
class Page:
    """A repository's README, the page of further results, and its plots."""

    root: Path

    @property
    def readme(self) -> Path:
        return self.root / "README.md"

    @property
    def pages(self) -> list[Path]:
        """Those with sections: the README alone, where there is no other."""
        return [page for page in (self.readme, self.root / "bench" / "RESULTS.md") if page.exists()]

    @property
    def plots(self) -> Path:
        return self.root / PLOTS

    def committed(self) -> Committed:
        return Committed.read(self.root / "bench" / "results" / "h200")

    def write(self) -> None:
        committed = self.committed()
        for page in self.pages:
            page.write_text(self._made(page, committed))
        wanted = {figure.name: figure for figure in figures(committed)}
        for name in self._drawn() - wanted.keys():
            (self.plots / name).unlink()
        for name, figure in wanted.items():
            if fingerprint_in(self.plots / name) != figure.fingerprint:  # or every run would change the file
                draw(figure, self.plots)

    def out_of_date(self) -> list[str]:
        """What is not as the results say; needs no matplotlib."""
        committed = self.committed()
        wrong = [
            str(page.relative_to(self.root)) for page in self.pages if self._made(page, committed) != page.read_text()
        ]
        wanted = {figure.name: figure.fingerprint for figure in figures(committed)}
        wrong += [f"{PLOTS}/{name}" for name, each in wanted.items() if fingerprint_in(self.plots / name) != each]
        return wrong + [f"{PLOTS}/{name}, which nothing shows" for name in sorted(self._drawn() - wanted.keys())]

    def _made(self, page: Path, committed: Committed) -> str:
        """The page with its sections made anew; paths to plots are from the page's folder."""
        text = filled(page.read_text(), committed)
        return text if page == self.readme else text.replace("](bench/", "](")

    def _drawn(self) -> set[str]:
        return {path.name for path in self.plots.glob("*.png")}


def filled(text: str, committed: Committed) -> str:
    """The text with its sections made anew.

    Raises:
        ValueError: it has no section, one that is unknown, or a marker without its partner.
    """
    names = [match["name"] for match in _REGION.finditer(text)]
    unknown = [name for name in names if name not in SECTIONS]
    if unknown or not names:
        raise ValueError(f"The page has the benchmark sections {names}; known are {', '.join(SECTIONS)}.")
    if len(_MARKER.findall(text)) != 2 * len(names):
        raise ValueError("The page has a marker of a benchmark section without its partner.")
    return _REGION.sub(lambda match: f"{match['begin']}{_content(match['name'], committed)}\n{match['end']}", text)


def _content(name: str, committed: Committed) -> str:
    make, command = SECTIONS[name]
    return "\n".join(make(committed)).strip() or f"No figures are committed yet; `{command}` measures them."


def main(arguments: list[str], root: Path = Path(__file__).parents[1]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.tables", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if something is out of date")
    page = Page(root)
    if not parser.parse_args(arguments).check:
        page.write()
        return 0
    wrong = page.out_of_date()
    for each in wrong:
        print(f"Out of date: {each}. Run `python -m bench.tables` and commit what it changes.", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
