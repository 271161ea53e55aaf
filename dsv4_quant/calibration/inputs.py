"""The inputs of every expert's matrices, on disk: written once, then asked for by weight name.

Per layer three files, which the experts fill one after the other: ``rows``, which tokens went to
an expert (int32); ``hidden``, what its w2 was given; and ``given``, what w1 and w3 were given,
which all experts of a layer share: a row per token. Values are BF16: what rounding to it adds to
a second moment is a ten-thousandth of what the least shrinkage does.

T tokens, n of them at an expert, d hidden_size, f moe_intermediate_size, C columns of a weight.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dsv4_quant.catalogue import TensorSpec
from dsv4_quant.config import ModelConfig
from dsv4_quant.formats import bf16
from dsv4_quant.kernels.second_order_factor_numba import Factor, factor

MOST_INPUTS = 2048
"""Of more inputs of one expert every k-th is used. Preparing one factor then takes ten seconds at
the width of V4-Flash; what more inputs would add is small (``benchmarks/calibration.py``)."""

Part = Literal["rows", "given", "hidden"]
PARTS: tuple[Part, ...] = ("rows", "given", "hidden")

Key = tuple[int, int, Part]
"""Layer, expert, and which of its inputs."""

LEAST_KEPT = 2
"""Factors that are kept for the next panel of the same expert, beside one for each thread."""


def factor_bytes(inputs: int, columns: int) -> tuple[int, int]:
    """What a factor takes, and what making it takes besides (``factor``)."""
    m = min(inputs, columns)
    return 8 * m * columns, 8 * (3 * inputs * columns + 2 * m * m)


@dataclass(frozen=True, slots=True)
class Place:
    """Where an expert's rows are in its layer's files."""

    start: int
    count: int


@dataclass(frozen=True, slots=True)
class Reach:
    """How many of a model's experts the prompts reached."""

    experts: int
    unreached: int
    """Of these, the ones that no token went to: their weights are rounded plainly."""
    median_tokens: float
    """Tokens per expert, all experts counted."""


LEAST_INPUTS = 32
"""An expert with fewer inputs is rounded plainly: neither a factor nor a check could be trusted."""

HELD_OUT = 4
"""One in so many inputs, the last ones, is held out: moved codes must win there."""

MOST_HELD_OUT = 256

METHOD = "second order, shrunk moments, held-out check, 2"
"""Another number is for codes that differ from those before."""


def part_file(folder: Path, layer: int, part: Part) -> Path:
    """The file of one part of a layer's inputs."""
    return folder / f"layer-{layer}.{part}"


def scratch_bytes(config: ModelConfig, tokens: int) -> int:
    """The most that the folder can take: tokens seen by every layer and MTP block."""
    d, f, k = config.hidden_size, config.moe_intermediate_size, config.num_experts_per_tok
    layers = config.num_hidden_layers + config.num_mtp_blocks
    return layers * tokens * (2 * d + k * (2 * f + 4))


class Calibration:
    """What ``collect`` left behind; safe to use from several threads.

    Args:
        folder: where the files are; whoever named it removes it.
        specs: the model's weights by name.
        places: by layer and expert; none for an expert that no token went to.
        prompts: token ids.
    """

    def __init__(
        self,
        folder: Path,
        specs: Mapping[str, TensorSpec],
        places: Mapping[tuple[int, int], Place],
        prompts: Sequence[Sequence[int]],
    ) -> None:
        self._folder, self._specs, self._places = folder, specs, places
        self._prompts = [list(prompt) for prompt in prompts]
        self._tokens = np.array([token for prompt in prompts for token in prompt])
        self._lock = threading.Lock()
        self._factors: OrderedDict[Key, Future[Factor | None]] = OrderedDict()
        self._makers, self._kept = threading.Semaphore(1), LEAST_KEPT

    @property
    def identity(self) -> str:
        """A hash of the prompts and the method: with the weights, all that codes depend on."""
        return hashlib.sha256(json.dumps([METHOD, self._prompts]).encode()).hexdigest()

    def reserve(self, most: int, threads: int) -> int:
        """Bytes that its factors will take, at most so many if that is enough for one.

        As many factors are made at a time as there are threads, and memory for them.
        """
        widest = max(spec.matrix[1] for spec in self._specs.values() if spec.expert is not None)
        longest = max((place.count for place in self._places.values()), default=0)
        kept, made = factor_bytes(min(longest, MOST_INPUTS), widest)
        makers = max(1, min(threads, (most - LEAST_KEPT * kept) // (made + kept)))
        self._makers, self._kept = threading.Semaphore(makers), makers + LEAST_KEPT
        return self._kept * kept + makers * made

    def describe(self) -> dict[str, Any]:
        """For a manifest: what was run, and how many experts it reached."""
        return {
            "method": METHOD,
            "identity": self.identity,
            "prompts": len(self._prompts),
            "tokens": len(self._tokens),
            **asdict(self.reach()),
        }

    def inputs(self, name: str) -> NDArray[np.float32]:
        """The rows ``[n, C]`` that a weight is multiplied with, in the order of the tokens.

        None of them, ``[0, C]``, for an expert that no token went to, and for a weight that is not
        calibrated: anything but the routed experts' matrices.
        """
        spec = self._specs[name]
        key = self._key(spec)
        if key is None:
            return np.empty((0, spec.shape[-1]), np.float32)
        layer, _, part = key
        own = self._own(key)
        at = self._open(layer, "rows", np.int32)[own] if part == "given" else own
        held = self._open(layer, part, np.uint16).reshape(-1, spec.shape[1])
        return np.asarray(bf16.decode(held[at]))

    def tokens(self, name: str) -> NDArray[np.int64]:
        """The ids ``[n]`` of the tokens that these inputs come from."""
        key = self._key(self._specs[name])
        if key is None:
            return self._tokens[:0]
        seen: NDArray[np.int64] = self._tokens[self._open(key[0], "rows", np.int32)[self._own(key)]]
        return seen

    def factor(self, name: str) -> Factor | None:
        """What rounding this weight needs; None where it is to be rounded plainly.

        w1 and w3 see the same inputs and share a factor, and so do the panels of a weight: the
        last few are kept. A second thread that asks for one waits for the first.
        """
        key = self._key(self._specs[name])
        if key is None:
            return None
        with self._lock:
            made = self._factors.get(key)
            is_mine = made is None
            if made is None:
                made = self._factors[key] = Future()
            self._factors.move_to_end(key)
            while len(self._factors) > self._kept:
                self._factors.popitem(last=False)
        if is_mine:
            try:
                with self._makers:
                    made.set_result(self._made(name))
            except BaseException as error:  # for whoever waits; it is raised below
                made.set_exception(error)
        return made.result()

    def _made(self, name: str) -> Factor | None:
        inputs, tokens = self.inputs(name), self.tokens(name)
        if len(inputs) < LEAST_INPUTS:
            return None
        seen = len(inputs) - len(inputs) // HELD_OUT
        return factor(inputs[:seen], tokens[:seen])

    def held_out(self, name: str) -> NDArray[np.float32]:
        """The inputs ``[n, C]`` that the factor of a weight has not seen."""
        inputs = self.inputs(name)
        found = inputs[len(inputs) - len(inputs) // HELD_OUT :]
        return found[:: -(-len(found) // MOST_HELD_OUT)] if len(found) else found

    def reach(self) -> Reach:
        """How well the prompts covered the experts."""
        experts = {
            (spec.layer, spec.expert)
            for spec in self._specs.values()
            if spec.layer is not None and spec.expert is not None
        }
        tokens = [self._places[key].count if key in self._places else 0 for key in experts]
        return Reach(len(experts), tokens.count(0), float(np.median(tokens)))

    def _key(self, spec: TensorSpec) -> Key | None:
        """Which inputs a weight sees; None if there are none."""
        if spec.layer is None or spec.expert is None:
            return None
        part: Part = "hidden" if spec.name.endswith("w2.weight") else "given"
        is_reached = (spec.layer, spec.expert) in self._places
        return (spec.layer, spec.expert, part) if is_reached else None

    def _own(self, key: Key) -> slice:
        """An expert's share of ``rows`` and ``hidden``, thinned to MOST_INPUTS."""
        place = self._places[key[0], key[1]]
        return slice(place.start, place.start + place.count, -(-place.count // MOST_INPUTS))

    def _open(self, layer: int, part: Part, dtype: type[np.generic]) -> NDArray[Any]:
        return np.memmap(part_file(self._folder, layer, part), dtype, "r")
