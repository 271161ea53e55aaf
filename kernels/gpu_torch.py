"""Which GPU a process uses, and whether it can be used at all."""

from __future__ import annotations

import warnings
from functools import cache
from importlib.util import find_spec

import torch

from dsv4_quant.errors import UsageError
from dsv4_quant.kernels import ops

NO_GPU = "No CUDA device can be used"
ON_CPU = "--device cpu does the same on the processor."


def has_gpu() -> bool:
    """Whether PyTorch finds a GPU, or one that it cannot use and ``find_gpu`` can tell why."""
    return bool(_complaint()) or torch.cuda.is_available()


def find_gpu(local: int = 0) -> torch.device:
    """One of the GPUs that this process may use; the processes of a machine share them out.

    Args:
        local: which process of its machine this is.

    Raises UsageError where there is no GPU that works.
    """
    if not has_gpu():
        raise UsageError(f"{NO_GPU} here", hint=ON_CPU)
    if why := _complaint():
        raise UsageError(f"{NO_GPU}: {why}", hint=ON_CPU)
    return check_usable(torch.device("cuda", local % torch.cuda.device_count()))


@cache
def _complaint() -> str:
    """Why a GPU that is there cannot be used: a driver that is too old, say. Empty if it can be, or
    there is none. PyTorch tells it once in a process, as a warning."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = torch.cuda.is_available()
    if found or not told:
        return ""
    return str(told[0].message).splitlines()[0].split(" (Triggered internally")[0].rstrip(".")


def check_usable(device: torch.device) -> torch.device:
    """The device, if its memory can be had and its kernels chosen; else UsageError.

    Without Triton a GPU would be slower than a processor: thousands of launches for every product.
    """
    if device.type == "cuda" and find_spec("triton") is None:
        raise UsageError(f"{NO_GPU} without Triton", hint=f"Install triton. {ON_CPU}")
    try:
        with warnings.catch_warnings():
            # of GPUs that PyTorch was not built for: what they compute is compared anyway
            warnings.simplefilter("ignore")
            ops.choose_backend(None, torch.empty(1, device=device))
    except (RuntimeError, ValueError) as error:
        raise UsageError(f"{NO_GPU}: {str(error).splitlines()[0]}", hint=ON_CPU) from error
    return device
