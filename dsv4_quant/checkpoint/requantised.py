"""The manifest's section on what a lossy conversion cost: per weight, per layer, for the model."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from dsv4_quant.catalogue import TensorSpec
from dsv4_quant.formats.cost import Cost, total


@dataclass(frozen=True, slots=True)
class Requantised:
    """Costs by name. Read back from a file, only the layers know their scale exponents."""

    rule: str
    """How rounded blocks got their scales."""
    tensors: Mapping[str, Cost]
    layers: Mapping[str, Cost]
    """By number, the MTP block's counting on; ``""`` is what belongs to no layer."""
    calibration: Mapping[str, Any] | None = None
    """What second-order rounding was made with, and how many weights took it; None without."""

    @property
    def model(self) -> Cost:
        """All of it."""
        return total(self.layers.values())

    def to_json(self) -> str:
        """Readable, stable; a line per layer and per weight; ``sqnr_db`` is null where exact."""
        head = {"rule": self.rule, "calibration": self.calibration}
        text = json.dumps(head, indent=2)[:-2].replace("\n", "\n  ")
        text += ',\n    "model": ' + json.dumps(_figures(self.model))
        text += ',\n    "layers": ' + _lines({n: _figures(c) for n, c in self.layers.items()})
        bare = {n: replace(c, exponents=Counter()) for n, c in self.tensors.items()}
        text += ',\n    "tensors": ' + _lines({n: _figures(c) for n, c in sorted(bare.items())})
        return text + "\n  }"

    @classmethod
    def from_json(cls, raw: Any) -> Requantised:
        """The inverse. Raises KeyError, TypeError or ValueError for anything else."""
        tensors = {name: _cost(figures) for name, figures in raw["tensors"].items()}
        layers = {name: _cost(figures) for name, figures in raw["layers"].items()}
        return cls(str(raw["rule"]), tensors, layers, raw["calibration"])


def by_layer(specs: Iterable[TensorSpec], costs: Mapping[str, Cost]) -> dict[str, Cost]:
    """Adds up the costs of each layer, in the model's order."""
    held: dict[str, list[Cost]] = {}
    for spec in specs:
        if spec.name in costs:
            layer = "" if spec.layer is None else str(spec.layer)
            held.setdefault(layer, []).append(costs[spec.name])
    return {layer: total(group) for layer, group in held.items()}


def _figures(cost: Cost) -> dict[str, Any]:
    figures = cost.to_json()
    if not cost.exponents:
        del figures["exponents"]
    return {"sqnr_db": round(cost.sqnr, 4) if math.isfinite(cost.sqnr) else None, **figures}


def _cost(figures: Mapping[str, Any]) -> Cost:
    return Cost.from_json({"exponents": {}, **figures})


def _lines(table: Mapping[str, Any]) -> str:
    rows = (f"      {json.dumps(key)}: {json.dumps(value)}" for key, value in table.items())
    return "{\n" + ",\n".join(rows) + "\n    }"
