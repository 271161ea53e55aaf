"""Sound checkpoints of every kind, with everything beside the weights, pinned by a manifest."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dsv4_quant.config import FLAT_KEYS, FLAT_ROPE_KEYS
from dsv4_quant.validators.pin import make_manifest
from tests.folders import golden

Sound = Callable[[str], Path]


def inference_config(config: dict[str, object]) -> dict[str, object]:
    """The flat config for a config.json, as published."""
    rope = config["rope_scaling"]
    assert isinstance(rope, dict)
    flat = {short: config[key] for short, key in FLAT_KEYS.items() if key in config}
    flat |= {short: rope[key] for short, key in FLAT_ROPE_KEYS.items()}
    return {key: value for key, value in flat.items() if key != "n_mtp_layers"} | {"dtype": "fp8"}


def dress(root: Path) -> None:
    """Adds the small files, then the manifest."""
    config = json.loads((root / "config.json").read_bytes())
    (root / "inference").mkdir()
    (root / "inference/config.json").write_text(json.dumps(inference_config(config), indent=2))
    (root / "tokenizer.json").write_text('{"version": "1.0"}')
    pinned = make_manifest(root, workers=2)
    assert pinned.report.findings == ()


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Sound:
    """``fp4`` and ``base``: the golden ones; ``mp``: fp4 as the published converter splits it."""
    made: dict[str, Path] = {}

    def make(source: str) -> Path:
        if source not in made:
            root = tmp_path_factory.mktemp("sound") / source
            if source == "mp":
                from tests.oracle.published_converter import convert  # torch: 2 s, only here

                convert(golden("tiny-fp4"), root, 2, "fp4")
                shutil.copyfile(golden("tiny-fp4") / "config.json", root / "config.json")
            else:
                shutil.copytree(golden(f"tiny-{source}"), root)
            dress(root)
            made[source] = root
        return made[source]

    return make
