"""Several processes that share one job, on one machine or on many.

    torchrun --nnodes 2 --nproc-per-node 4 ... -m dsv4_quant convert SRC OUT --gpus 8
    srun --ntasks 8 dsv4-quant verify OUT

team      the verbs: every process runs the same program, ``gather`` and ``lead`` bring it together
launch    what torchrun or srun said of this process
crew      the same verbs for processes that meet at a board
board     what they write to each other, in bytes; ``board_torch`` makes one
asked     for how long the board has owed an answer
watch     who is still alive, and how far the others are
shares    who does what

The board is the TCPStore of torch.distributed: what torchrun itself is built on. Only plans,
digests and errors travel, a few MB in hours; the tensors never leave the process that read them,
so there is nothing that nccl could carry faster. Of gloo's collectives none is used either: a
process inside one cannot be told that another has failed, and sits there until its timeout. Here
every wait looks for a failure, so that an error anywhere ends all processes within seconds.
"""

from __future__ import annotations

from dsv4_quant.team.crew import join
from dsv4_quant.team.team import Team

__all__ = ["Team", "join"]
