"""Typed, bounded access to the keys of a config that a stranger wrote."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from dsv4_quant.errors import ConfigError, some
from dsv4_quant.strict_json import clip, shown


@dataclass(frozen=True, slots=True)
class Keys:
    """A JSON object's values under config.json's keys; errors spell a key as the file does."""

    values: Mapping[str, Any]
    path: Path | str
    spelling: Mapping[str, str] = field(default_factory=dict)

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def fail(self, key: str, what: str) -> NoReturn:
        """Raises the ConfigError of one key: ``what`` completes a sentence that it begins."""
        raise ConfigError(f"{self.spelling.get(key, key)} {what}", file=self.path)

    def require(self, wanted: frozenset[str]) -> None:
        """Raises a ConfigError that names the keys that are missing."""
        missing = [self.spelling.get(key, key) for key in wanted - self.values.keys()]
        if missing:
            raise ConfigError(
                f"Missing keys: {some(missing)}",
                file=self.path,
                hint="Is this a DeepSeek-V4 config?",
            )

    def _shown(self, key: str) -> str:
        return shown(self.values[key]) if key in self.values else "missing"

    def integer(self, key: str, least: int, most: int) -> int:
        """An integer in ``least..most``; true and 1.0 are none."""
        value = self.values.get(key)
        if type(value) is not int or not least <= value <= most:
            self.fail(key, f"is {self._shown(key)}, not an integer in {least}..{most}")
        return value

    def number(self, key: str) -> float:
        """A positive number below 10**12."""
        value = self.values.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e12:
            self.fail(key, f"is {self._shown(key)}, not a positive number")
        return float(value)

    def integers(self, key: str) -> tuple[int, ...]:
        """A list of at most 2,048 integers from 0 to 2**20."""
        value = self.values.get(key)
        if not isinstance(value, list) or not all(type(v) is int for v in value):
            self.fail(key, f"is {self._shown(key)}, not a list of integers")
        if len(value) > 2048 or not all(0 <= v < 1 << 20 for v in value):
            self.fail(key, f"is {self._shown(key)}: too long, or a value is not in 0..2**20")
        return tuple(value)

    def choice(self, key: str, choices: tuple[Any, ...]) -> Any:
        """One of a few values, compared with their types."""
        value = self.values.get(key)
        if not any(type(value) is type(known) and value == known for known in choices):
            known = " or ".join(shown(c) for c in choices if c is not None)
            self.fail(key, f"is {self._shown(key)}; this tool knows only {known}")
        return value

    def nested(self, key: str, known: frozenset[str]) -> Keys | None:
        """An object inside this one, its keys checked; None where it is absent or null."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            self.fail(key, f"is {self._shown(key)}, not an object")
        unknown = value.keys() - known
        if unknown:
            self.fail(key, f"holds unknown keys: {some(map(clip, unknown))}")
        return Keys(value, self.path, self.spelling)
