"""``dsv4-quant fingerprint``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsv4_quant.cli.appear import appearing, target
from dsv4_quant.cli.forward import Activations, Arithmetic, HowExact, HowStored, Threads
from dsv4_quant.cli.options import Computes, Debug, Device, Json, Quiet
from dsv4_quant.cli.output import emit
from dsv4_quant.cli.progress import shown
from dsv4_quant.cli.reading import describe_reading
from dsv4_quant.cli.sources import found
from dsv4_quant.cli.tables import filled
from dsv4_quant.cli.together import here
from dsv4_quant.cli.tokens import read_tokens
from dsv4_quant.errors import UsageError

if TYPE_CHECKING:
    from dsv4_quant.fingerprints.coverage import Coverage
    from dsv4_quant.fingerprints.document import Fingerprint, Measured
    from dsv4_quant.model import Reading


def command(
    output: Annotated[
        Path, typer.Option(metavar="F.json", callback=target, help="The file to write.")
    ],
    path: Annotated[
        str | None,
        typer.Argument(
            metavar="[PATH]",
            help="A checkpoint's folder, or a Hugging Face id (owner/name@revision). Not with"
            " --import.",
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="T.json",
            help="A JSON list of 1 to 8 lists of token ids, instead of the prompts that are chosen"
            " for what they exercise.",
        ),
    ] = None,
    import_: Annotated[
        Path | None,
        typer.Option(
            "--import", metavar="FILE", help="Take what a served model said, as described above."
        ),
    ] = None,
    arithmetic: HowExact = Arithmetic.exact,
    activations: HowStored = Activations.float32,
    digest: Annotated[
        bool,
        typer.Option(
            "--digest", help="Compute the value digest if no manifest states it: reads every byte."
        ),
    ] = False,
    threads: Threads = None,
    device: Computes = Device.auto,
    json: Json = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Record what a checkpoint says on fixed prompts, in a few kB.

    `dsv4-quant verify COPY --fingerprint F.json` then judges any other checkpoint of the same
    model: bit for bit on the same kind of machine, whatever its layout, format and GPU count. It
    needs the file alone, not the source. On a difference it names the layer and the tensors.

    Several processes share the prompts; each of them reads every layer.

    With --import the fingerprint holds what a served model said: its likeliest next tokens and
    their natural log-probabilities, best first, or ids alone where only their order is known.
    Position p foretells the token after tokens 0 to p. FILE is JSON:

    \b
      {"format": "dsv4-served", "version": 1, "source": "a line of text, or left out",
       "prompts": [{"tokens": [0, 671, 6102, 16],
                    "spots": [{"position": 2, "top": [[16, -0.03], [270, -4.2]]},
                              {"position": 3, "top": [1437]}]}]}

    \b
    Examples:
      dsv4-quant fingerprint DeepSeek-V4-Flash --output flash.json
      dsv4-quant fingerprint --import server-log.json --output served.json
    """
    # here: --help need not wait for PyTorch
    from dsv4_quant.fingerprints.file import to_json
    from dsv4_quant.fingerprints.make import make_fingerprint
    from dsv4_quant.fingerprints.served import import_served

    if (path is None) == (import_ is None):
        raise UsageError("Give either a checkpoint's PATH or --import FILE")
    readings: list[Reading] = []
    if import_ is not None:
        if prompts is not None or digest:
            raise UsageError("--prompts and --digest go with a checkpoint, not with --import")
        made = import_served(import_, arithmetic=arithmetic.value, activations=activations.value)
    else:
        assert path is not None
        given = None if prompts is None else read_tokens(prompts)
        with shown(quiet=quiet) as progress:
            made = make_fingerprint(
                found(path, progress), given,
                arithmetic=arithmetic.value, activations=activations.value,
                digest=digest, threads=threads, device=device.value, progress=progress,
                team=here(), told=readings.append,
            )  # fmt: skip
    data = to_json(made)
    if here().is_first:
        with appearing(output) as partial:
            partial.write_bytes(data)
    text, result = describe(made, output, len(data)), facts(made, output, len(data))
    text = "\n".join([text, *(_line("reading", describe_reading(one)) for one in readings)])
    result["reading"] = readings[0].to_json() if readings else None
    emit(text, result, json_to=json, quiet=quiet)


def describe(made: Fingerprint, output: Path, size: int) -> str:
    """For people: what was recorded, and what the prompts exercised."""
    script = made.script
    count = sum(map(len, script.spots))
    facts = {
        "file": f"{output}, {size:,} bytes",
        "run": f"{len(script.prompts)} prompts, {sum(script.lengths):,} tokens, {count} spots;"
        f" {script.arithmetic} arithmetic, {script.activations} activations",
    }
    if made.measured is None:
        facts["holds"] = "what a served model said: only the lossy gate can compare it"
    else:
        facts |= _described(made.measured)
    return "\n".join(_line(name, value) for name, value in facts.items())


def _line(name: str, value: str) -> str:
    """As many lines as it takes, the name on the left."""
    return filled(value, f"{name:10}")


def _described(measured: Measured) -> dict[str, str]:
    machine, found = measured.machine, measured.coverage
    digest = measured.value_digest or "not known: there is no manifest (--digest computes it)"
    reached = [
        f"{found.tokens:,} tokens, {found.distinct_tokens:,} of {found.vocab_size:,} ids",
        f"sliding window {found.sliding_window}, longest prompt {found.longest:,}",
        *(f"{count:,} entries of {ratio} tokens" for ratio, count in found.windows.items()),
    ]
    if found.index_topk is not None:
        reached.append(f"indexer keeps {found.index_topk:,}")
    return {
        "machine": f"{machine.machine} {machine.cpu}, torch {machine.torch}",
        "digest": digest,
        "experts": _experts(found),
        "reached": "; ".join(reached),
        "missed": "; ".join(found.missed) or "nothing",
    }


def _experts(found: Coverage) -> str:
    """How many of them were used, hash layers apart from scored ones."""
    hashed, scored = found.experts_hit[: found.hash_layers], found.experts_hit[found.hash_layers :]
    of = found.n_routed_experts
    parts = [
        f"{min(hits)} to {max(hits)} of {of} in each of {len(hits)} {kind} layers"
        if min(hits) < max(hits)
        else f"{min(hits)} of {of} in each of {len(hits)} {kind} layers"
        for kind, hits in (("hash", hashed), ("scored", scored))
        if hits
    ]
    return "; ".join(parts)


def facts(made: Fingerprint, output: Path, size: int) -> dict[str, Any]:
    """For machines."""
    measured = made.measured
    return {
        "output": str(output),
        "bytes": size,
        "kind": "served" if measured is None else "forward",
        "tokens": made.script.lengths,
        "arithmetic": made.script.arithmetic,
        "activations": made.script.activations,
        "value_digest": None if measured is None else measured.value_digest,
        "machine": None if measured is None else asdict(measured.machine),
        "coverage": None if measured is None else asdict(measured.coverage),
    }
