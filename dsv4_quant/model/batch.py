"""Several prompts at once, position after position, and the chunks in which attention takes them.

Everything but attention treats positions alike, so the positions of all prompts are simply rows of
one tensor. Attention goes through them chunk by chunk: first all that is prefilled, then decode
steps, each with the next position of every prompt.

t positions, of all prompts or of one chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 1024
"""Positions of a prefill chunk; bounds memory and moves no bit."""


@dataclass(frozen=True)
class Span:
    """Consecutive positions of one prompt."""

    prompt: int
    start: int
    """Position of the first, counted in the prompt."""
    stop: int
    rows: slice
    """Where they are among the rows of a chunk."""


@dataclass(frozen=True)
class Chunk:
    """Positions that go through attention together."""

    spans: tuple[Span, ...]
    positions: Tensor
    """``[t]``, counted in each prompt."""
    rows: Tensor
    """``[t]``: where they are among the rows of the batch."""


class Batch:
    """Prompts whose last ``decode`` positions are computed one at a time."""

    def __init__(self, prompts: list[list[int]], decode: int) -> None:
        self.lengths = [len(prompt) for prompt in prompts]
        self.tokens = torch.tensor([token for prompt in prompts for token in prompt])  # [t]
        ends = torch.tensor(self.lengths).cumsum(0).tolist()
        self._starts = [end - length for end, length in zip(ends, self.lengths, strict=True)]
        self._decode = decode

    def __len__(self) -> int:
        return len(self.tokens)

    def rows(self, prompt: int) -> slice:
        """A prompt's rows."""
        return slice(self._starts[prompt], self._starts[prompt] + self.lengths[prompt])

    def parts(self, first: int, count: int) -> Iterator[tuple[int, int, slice]]:
        """Whose the rows from ``first`` on are: prompt, position, and where among those rows."""
        for prompt, start in enumerate(self._starts):
            low, high = max(start, first), min(start + self.lengths[prompt], first + count)
            if low < high:
                yield prompt, low - start, slice(low - first, high - first)

    def chunks(self) -> Iterator[Chunk]:
        """Every position once, in an order in which each comes after all before it."""
        prefilled = [max(length - self._decode, 0) for length in self.lengths]
        pending: list[tuple[int, int, int]] = []
        room = CHUNK
        for prompt, stop in enumerate(prefilled):
            start = 0
            while start < stop:
                count = min(stop - start, room)
                pending.append((prompt, start, start + count))
                start, room = start + count, room - count
                if not room:
                    yield self._make(pending)
                    pending, room = [], CHUNK
        if pending:
            yield self._make(pending)
        for step in range(max(map(int.__sub__, self.lengths, prefilled), default=0)):
            pieces = [
                (prompt, start + step, start + step + 1)
                for prompt, start in enumerate(prefilled)
                if start + step < self.lengths[prompt]
            ]
            yield self._make(pieces)

    def _make(self, pieces: list[tuple[int, int, int]]) -> Chunk:
        spans, at = [], 0
        for prompt, start, stop in pieces:
            spans.append(Span(prompt, start, stop, slice(at, at + stop - start)))
            at += stop - start
        positions = [torch.arange(start, stop) for _, start, stop in pieces]
        rows = [own + self._starts[piece[0]] for own, piece in zip(positions, pieces, strict=True)]
        return Chunk(tuple(spans), torch.cat(positions), torch.cat(rows))
