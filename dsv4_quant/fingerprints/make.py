"""The whole way from a folder to a fingerprint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from dsv4_quant.checkpoint import Checkpoint
from dsv4_quant.checkpoint.digest import model_digest
from dsv4_quant.checkpoint.digesting import digest_tensors
from dsv4_quant.checkpoint.manifest import MANIFEST, read_manifest
from dsv4_quant.fingerprints.document import Fingerprint
from dsv4_quant.fingerprints.file import check_size
from dsv4_quant.fingerprints.prompts import choose_prompts
from dsv4_quant.fingerprints.record import record
from dsv4_quant.fingerprints.script import Activations, Arithmetic, make_script
from dsv4_quant.kernels import gpu_torch
from dsv4_quant.model import Reading
from dsv4_quant.model.on_device import Device
from dsv4_quant.progress import Progress
from dsv4_quant.team import Team


def make_fingerprint(
    path: str | Path,
    prompts: Sequence[Sequence[int]] | None = None,
    *,
    arithmetic: Arithmetic = "exact",
    activations: Activations = "float32",
    digest: bool = False,
    threads: int | None = None,
    device: Device = "auto",
    progress: Progress | None = None,
    team: Team | None = None,
    told: Callable[[Reading], None] | None = None,
) -> Fingerprint:
    """What a checkpoint says on fixed prompts.

    Args:
        path: the folder, in any layout.
        prompts: token ids; if not given, prompts that exercise the model (``prompts``).
        digest: compute the value digest where no manifest states it; reads every byte.
        threads: of a process, for the pass; they change no bit.
        device: what computes the products, as in ``model.forward``; it changes no bit either.
        team: the processes that share the prompts.
        told: is given what the pass read, and how long it waited for that.

    Raises:
        UnreadableError: the folder is no checkpoint.
        UsageError: the prompts are too many or too long, or hold ids that the model has not, or
            device is cuda and there is no GPU.
        NotANumberError: the pass gives NaN.
    """
    team = team or Team()
    progress = team.watched(progress)
    if device == "cuda":
        gpu_torch.find_gpu(team.local)  # better now than after an hour of digesting
    with Checkpoint.open(path) as ckpt:
        progress.stage("choosing prompts")
        chosen = choose_prompts(ckpt) if prompts is None else prompts
        script = make_script(ckpt.config, chosen, arithmetic=arithmetic, activations=activations)
        check_size(ckpt.config, script)
        known = known_digest(ckpt.root)
        if digest and known is None:
            progress.stage("value digest")
            known = model_digest(digest_tensors(ckpt, progress=progress, team=team))
        recording = record(
            ckpt, script,
            value_digest=known, threads=threads, device=device, progress=progress, team=team,
        )  # fmt: skip
    if told is not None:
        told(recording.reading)
    return recording.fingerprint


def known_digest(root: Path) -> str | None:
    """The value digest that a checkpoint's manifest states; None without one.

    Raises ManifestError where there is one that cannot be read.
    """
    path = root / MANIFEST
    return read_manifest(path).value_digest if path.exists() else None
