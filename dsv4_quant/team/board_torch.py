"""The board of torch.distributed: a TCPStore, kept by the first process or by torchrun."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import cast

from dsv4_quant.errors import TeamError
from dsv4_quant.team.board import Board
from dsv4_quant.team.launch import Launch

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # a lost peer is told by us, in one sentence

from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]  # it is public


def connect(launch: Launch, seconds: float) -> Board:
    """Where all processes of a launch meet. Raises TeamError if nobody answers for so long."""
    keeps = launch.rank == 0 and not launch.is_served
    try:
        store = TCPStore(
            launch.host, launch.port,
            is_master=keeps, timeout=timedelta(seconds=seconds), wait_for_workers=False,
        )  # fmt: skip
    except RuntimeError as error:
        where = f"{launch.host}:{launch.port}"
        why = "cannot be used" if keeps else "does not answer"
        raise TeamError(
            f"The processes cannot find each other: {where} {why}",
            hint=f"{str(error).splitlines()[0]} To work alone, unset WORLD_SIZE.",
        ) from None
    return cast(Board, PrefixStore(f"dsv4-quant/{launch.attempt}", store))
