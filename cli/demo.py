"""``dsv4-quant demo``."""

from __future__ import annotations

import shutil
import tempfile
import textwrap
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from dsv4_quant.checkpoint.digest import model_digest
from dsv4_quant.checkpoint.digesting import digest_tensors
from dsv4_quant.checkpoint.reader import Checkpoint
from dsv4_quant.cli.conversion import proofs
from dsv4_quant.cli.options import Debug, Json, Quiet
from dsv4_quant.cli.output import emit
from dsv4_quant.cli.tables import duration, size
from dsv4_quant.conversion.request import Request
from dsv4_quant.conversion.run import convert
from dsv4_quant.errors import UsageError
from dsv4_quant.inspection import inspect
from dsv4_quant.synthesis import synth
from dsv4_quant.validators.verify import verify


def command(
    out: Annotated[
        Path | None,
        typer.Argument(metavar="[OUT]", help="Keep what is made there; removed if not given."),
    ] = None,
    json: Json = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """The whole loop on a small synthetic checkpoint, in under a minute.

    Make it, look at it, convert it to FP8 for two GPUs, repack it for four, and then prove that no
    value changed: by verification, by digests, by the model's own logits. Last, one byte is
    damaged, and found.

    \b
    Example:
      dsv4-quant demo
    """
    with ExitStack() as stack:
        if out is None:
            out = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dsv4-demo-")))
        elif out.exists() and any(out.iterdir()):
            raise UsageError("OUT is not empty", file=out, hint="Give a new folder.")
        loop = Loop(out, say=_silent if quiet or json == "-" else print)
        loop.run()
    ending = f"All of it held, in {duration(loop.seconds)}."
    emit(ending, loop.facts, json_to=json, quiet=quiet)


def _silent(*_: Any) -> None:
    """For --quiet."""


class Loop:
    """The steps, in order; each tells its command, then what came out."""

    def __init__(self, out: Path, say: Callable[..., None]) -> None:
        self._say = say
        self._step = 0
        self._out = out
        self.source, self.fp8 = out / "source", out / "fp8-2gpus"
        self.repacked, self.damaged = out / "fp8-4gpus", out / "damaged"
        self.facts: dict[str, Any] = {}
        self.seconds = 0.0

    def run(self) -> None:
        """All steps. Raises a Dsv4Error if one of them does not hold."""
        began = time.monotonic()
        self.make()
        self.convert()
        self.repack()
        self.verify()
        self.digests()
        self.fingerprint()
        self.damage()
        self.seconds = time.monotonic() - began

    def _tell(self, title: str, command: str) -> None:
        self._step += 1
        self._say(f"\n{self._step}. {title}\n   $ dsv4-quant {command}")

    def _show(self, text: str) -> None:
        width = shutil.get_terminal_size((80, 24)).columns
        for line in text.splitlines():
            indent = " " * (3 + len(line) - len(line.lstrip()))
            filled = textwrap.fill(
                line.strip(), width, initial_indent=indent, subsequent_indent=indent + "  ",
                break_long_words=False, break_on_hyphens=False,
            )  # fmt: skip
            self._say(filled)

    def make(self) -> None:
        """A checkpoint as published, and what it holds."""
        self._tell("Make a small checkpoint in the published format", "synth source")
        made = synth(self.source)
        self._show(f"{made.tensors} tensors, {size(made.bytes)}, in {made.shards} shards")
        self._tell("Look at it, from its headers alone", "inspect source --gpus 2")
        found = inspect(self.source, 2)
        self._show(f"layout {found.layout}, experts {found.experts}, dense {found.dense}")
        assert found.split is not None
        for held in found.split.per_gpu:
            self._show(f"each of 2 GPUs would hold {size(held.bytes)}, experts in {held.experts}")
        self.facts["source"] = {"tensors": found.tensors, "bytes": found.bytes}

    def convert(self) -> None:
        """FP4 to FP8, for two GPUs."""
        self._tell(
            "Convert the experts to FP8, one file per GPU",
            "convert source fp8-2gpus --gpus 2 --experts fp8",
        )
        report = convert(self.source, self.fp8, Request("mp", 2, "fp8"))
        self._show(f"{size(report.bytes)} in {report.seconds:.1f} s")
        for line in proofs(report.manifest):
            self._show(line)

    def repack(self) -> None:
        """Two GPUs to four."""
        self._tell("Repack the result for four GPUs", "repack fp8-2gpus fp8-4gpus --gpus 4")
        report = convert(self.fp8, self.repacked, Request("mp", 4))
        self._show(f"{size(report.bytes)} in {report.seconds:.1f} s, no value touched")

    def verify(self) -> None:
        """Against the source, value by value."""
        self._tell(
            "Verify it: structure, checksums, every value against the source",
            "verify fp8-4gpus --against source",
        )
        report = verify(self.repacked, "values", against=self.source)
        if not report.holds:
            raise UsageError(f"The demo's own output failed: {report.findings[0].what}")
        self._show(f"no findings in {report.seconds:.1f} s")

    def digests(self) -> None:
        """One line says it for all three."""
        self._tell("One digest for all formats, layouts and GPU counts", "digest FOLDER")
        found = {}
        for folder in (self.source, self.fp8, self.repacked):
            with Checkpoint.open(folder) as checkpoint:
                found[folder.name] = model_digest(digest_tensors(checkpoint))
            self._show(f"{found[folder.name]}  {folder.name}")
        if len(set(found.values())) != 1:
            raise UsageError("The demo's digests differ")
        self.facts["digests"] = found

    def fingerprint(self) -> None:
        """What the model says is the same, bit for bit."""
        from dsv4_quant.fingerprints.file import to_json  # here: only this step needs PyTorch
        from dsv4_quant.fingerprints.make import make_fingerprint

        self._tell(
            "Record what the source says on prompts that exercise it; ask the result",
            "fingerprint source --output source.json\n"
            "   $ dsv4-quant verify fp8-4gpus --fingerprint source.json",
        )
        path = self._out / "source.json"
        data = to_json(make_fingerprint(self.source))
        path.write_bytes(data)
        report = verify(self.repacked, "forward", fingerprint=path)
        if not report.holds:
            raise UsageError(f"The demo's fingerprints differ: {report.findings[0].what}")
        self._show(f"recorded {len(data):,} bytes")
        self._show(report.forward or "")
        self.facts["fingerprint"] = {"bytes": len(data), "said": report.forward}

    def damage(self) -> None:
        """A flipped bit does not hide."""
        name = self._flip()
        self._tell(f"Flip one bit of one FP8 code in {name}", "verify damaged")
        report = verify(self.damaged, "values", against=self.source)
        errors = [finding for finding in report.findings if finding.severity == "error"]
        if not errors:
            raise UsageError("The demo's damage was not found")
        for finding in errors:
            self._show(f"{finding.check}: {finding.tensor or finding.file}")
            self._show(f"   {finding.what}")
        self.facts["damage"] = {"file": name, "findings": len(errors)}

    def _flip(self) -> str:
        """A copy of the two files' folder with one wrong bit in the middle of an expert."""
        shutil.copytree(self.fp8, self.damaged)
        with Checkpoint.open(self.damaged) as checkpoint:
            weight = next(s for s in checkpoint.specs.values() if s.expert == 3)
            extent = checkpoint.locate(checkpoint.stored(weight)[0]).extents[0]
        path = self.damaged / extent.file
        at = extent.offset + extent.row_bytes * extent.rows // 2
        with path.open("r+b") as file:
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 0x01]))
        return f"{weight.name} of {extent.file}"
