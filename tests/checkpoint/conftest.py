"""Rank files as the published converter writes them, made once per session."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.folders import golden
from tests.oracle.published_converter import convert

Ranks = Callable[[str, int, str], Path]


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """(case, GPUs, "fp4" or "fp8" experts) -> a folder: rank files and a config.json that fits."""
    made: dict[tuple[str, int, str], Path] = {}

    def make(case: str, gpus: int, experts: str) -> Path:
        key = (case, gpus, experts)
        if key not in made:
            out = tmp_path_factory.mktemp(f"{case}-mp{gpus}-{experts}")
            convert(golden(case), out, gpus, None if case == "tiny-base" else experts)
            config = json.loads((golden(case) / "config.json").read_bytes())
            config["expert_dtype"] = experts
            (out / "config.json").write_text(json.dumps(config, indent=2))
            made[key] = out
        return made[key]

    return make
