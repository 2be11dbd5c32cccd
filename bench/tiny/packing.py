"""Rows of a fixed length packed with whole documents; positions restart, and no document sees another."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

IGNORED = -100  # cross_entropy's ignore_index
OPEN_ROWS = 64  # first-fit looks this far back; more would only slow the packing


class Rows(NamedTuple):
    """Packed rows, int64 [num_rows, window] each; a row's padding is one more document without targets."""

    tokens: Tensor
    positions: Tensor  # 0 at each document's first token
    documents: Tensor  # number of the document in its row
    targets: Tensor  # the document's next token; IGNORED at its last and in padding

    def to(self, device: torch.device) -> "Rows":
        return Rows(*(field.to(device) for field in self))

    def at(self, index: Tensor) -> "Rows":
        return Rows(*(field[index] for field in self))


def pack(encoded: Sequence[np.ndarray], window: int, pad: int) -> Rows:
    """First-fit packing of `encoded` (int arrays), in their order; a document longer than `window` keeps its start."""
    rows: list[list[np.ndarray]] = []
    room: list[int] = []
    open_rows: list[int] = []
    for whole in encoded:
        document = whole[:window]
        row = next((candidate for candidate in open_rows if room[candidate] >= len(document)), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(window)
            open_rows = [*open_rows, row][-OPEN_ROWS:]
        rows[row].append(document)
        room[row] -= len(document)
        if room[row] == 0:
            open_rows.remove(row)
    fields = np.zeros((4, len(rows), window), dtype=np.int64)
    tokens, positions, documents, targets = fields
    tokens[:], targets[:] = pad, IGNORED
    for row, members in enumerate(rows):
        start = 0
        for number, document in enumerate(members):
            end = start + len(document)
            tokens[row, start:end] = document
            targets[row, start : end - 1] = document[1:]
            positions[row, start:end] = np.arange(len(document))
            documents[row, start:end] = number
            start = end
        positions[row, start:] = np.arange(window - start)
        documents[row, start:] = len(members)
    return Rows(*map(torch.from_numpy, fields))


def attention_mask(documents: Tensor) -> Tensor:
    """Where a token may look, bool [num_rows, 1, window, window]: back, and within its own document."""
    same = documents[:, None, :, None] == documents[:, None, None, :]
    return same & torch.ones(same.shape[-2:], dtype=torch.bool, device=same.device).tril()


def endless_batches(
    encoded: Sequence[np.ndarray],
    shares: np.ndarray,
    rows_per_batch: int,
    window: int,
    pad: int,
    seed: int,
    device: torch.device,
) -> Iterator[Rows]:
    """Batches of packed rows without end; each epoch draws document i with probability `shares[i]` and packs anew."""
    generator = np.random.default_rng(seed)
    while True:
        order = generator.permutation(len(encoded))
        drawn = order[generator.random(len(order)) < shares[order]]
        rows = pack([encoded[index] for index in drawn], window, pad).to(device)
        num_rows = len(rows.tokens)
        # The rows that fill no batch are left for another epoch, unless there is no other batch.
        size = min(rows_per_batch, num_rows)
        shuffled = torch.from_numpy(generator.permutation(num_rows)).to(device)
        for start in range(0, num_rows - size + 1, max(size, 1)):
            yield rows.at(shuffled[start : start + size])
