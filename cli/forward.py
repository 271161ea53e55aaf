"""``dsv4-quant forward``."""

from __future__ import annotations

import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from dsv4_quant.checkpoint import Checkpoint
from dsv4_quant.cli.appear import appearing, check_room, target
from dsv4_quant.cli.options import At, Computes, Debug, Device, Json, Quiet
from dsv4_quant.cli.output import emit
from dsv4_quant.cli.progress import shown
from dsv4_quant.cli.reading import describe_reading
from dsv4_quant.cli.tables import duration, filled, size
from dsv4_quant.cli.tokens import read_tokens
from dsv4_quant.hub import resolve


class Arithmetic(StrEnum):
    """What is rounded."""

    exact = "exact"
    deployed = "deployed"


class Activations(StrEnum):
    """What stored results can hold."""

    float32 = "float32"
    bfloat16 = "bfloat16"


Threads = Annotated[
    int | None,
    typer.Option("--threads", metavar="N", min=1, max=256, help="They change no bit."),
]
HowExact = Annotated[
    Arithmetic,
    typer.Option(
        "--arithmetic",
        help="exact: nothing is rounded but float32. deployed: inputs are rounded to FP8 and FP4"
        " as the published kernels do.",
    ),
]
HowStored = Annotated[
    Activations, typer.Option("--activations", help="What results are rounded to.")
]


def command(
    path: At,
    tokens: Annotated[
        Path,
        typer.Option(metavar="T.json", help="Prompts: a JSON list of lists of token ids."),
    ],
    output: Annotated[
        Path,
        typer.Option(metavar="L.safetensors", callback=target, help="The file to write."),
    ],
    arithmetic: HowExact = Arithmetic.exact,
    activations: HowStored = Activations.float32,
    decode: Annotated[
        int,
        typer.Option(metavar="N", min=0, help="Compute the last N positions one at a time."),
    ] = 0,
    mtp: Annotated[bool, typer.Option("--mtp", help="Run the MTP block, too.")] = False,
    threads: Threads = None,
    device: Computes = Device.auto,
    json: Json = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Logits of the reference forward pass, for every position of some prompts.

    A layer at a time, so that memory holds one layer's weights and the prompts' streams, whatever
    the size of the model, and the logits or the output matrix, whichever is smaller. Any layout,
    format and GPU count; equal weights give bit-equal logits. Every byte that is needed is read
    once, and the last line says how long the disk was waited for.

    The output holds a tensor logits.i [tokens, vocab_size] float32 for prompt i, and with --mtp
    mtp_logits.i.

    \b
    Example:
      echo '[[0, 5, 17], [3]]' > T.json
      dsv4-quant forward DeepSeek-V4-Flash --tokens T.json --output logits.safetensors
    """
    from dsv4_quant.cli.logits import LogitsFile  # here: --help need not wait for PyTorch
    from dsv4_quant.model import forward

    began = time.monotonic()
    prompts = read_tokens(tokens)
    lengths = [len(prompt) for prompt in prompts]
    with (
        shown(quiet=quiet) as progress,
        Checkpoint.open(resolve(path, progress=progress)) as checkpoint,
    ):
        needed = 4 * sum(lengths) * checkpoint.config.vocab_size * (1 + mtp)
        check_room(output, needed)
        progress.stage("forward pass", "steps")
        vocab_size = checkpoint.config.vocab_size
        with (
            appearing(output) as partial,
            LogitsFile(partial, lengths, vocab_size, mtp=mtp, progress=progress) as file,
        ):
            result = forward(
                checkpoint, prompts,
                arithmetic=arithmetic.value, activations=activations.value,
                decode=decode, mtp=mtp, observer=file, threads=threads, keep_logits=False,
                device=device.value,
            )  # fmt: skip
    hit = [len(experts) for experts in result.experts_hit]
    seconds = time.monotonic() - began
    text = (
        f"{output}: logits of {sum(lengths):,} tokens in {len(prompts)}"
        f" prompt{'s' if len(prompts) > 1 else ''}, {size(needed)} in {duration(seconds)}\n"
        f"{arithmetic} arithmetic, {activations} activations; experts used per layer:"
        f" {min(hit)} to {max(hit)} of {checkpoint.config.n_routed_experts}\n"
        f"{filled(describe_reading(result.reading))}"
    )
    facts = {
        "output": str(output),
        "tokens": lengths,
        "vocab_size": vocab_size,
        "arithmetic": arithmetic.value,
        "activations": activations.value,
        "decode": decode,
        "mtp": mtp,
        "experts_hit": result.experts_hit,
        "seconds": round(seconds, 3),
        "reading": result.reading.to_json(),
    }
    emit(text, facts, json_to=json, quiet=quiet)
