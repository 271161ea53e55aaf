"""What torchrun and srun say of a process, as tables."""

from __future__ import annotations

import pytest

from dsv4_quant.errors import UsageError
from dsv4_quant.team.launch import PORTS, Launch, first_host, launched

TORCHRUN = {"RANK": "2", "WORLD_SIZE": "4", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
SRUN = {
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NODELIST": "nid[004-007]",
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "0",
}
BATCH = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "1", "SLURM_NODELIST": "n[1-4]"}


@pytest.mark.parametrize(
    "environ",
    [{}, BATCH, {**SRUN, "SLURM_STEP_NUM_TASKS": "1"}, {"WORLD_SIZE": "1"},
     {**SRUN, "WORLD_SIZE": "1", "RANK": "0"}],
    ids=["nothing", "a batch script", "a step of one", "torchrun of one", "that in a step"],
)  # fmt: skip
def test_alone(environ: dict[str, str]) -> None:
    assert launched(environ) is None


def test_torchrun() -> None:
    assert launched(TORCHRUN) == Launch(2, 4, "node1", 29500)
    by_agent = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "2"}
    wanted = Launch(2, 4, "node1", 29500, is_served=True, attempt="2")
    assert launched(TORCHRUN | by_agent) == wanted
    assert launched(SRUN | TORCHRUN | by_agent) == wanted, "torchrun inside of srun decides"


def test_which_of_its_machine() -> None:
    """What the launcher says: ranks go through all machines, GPUs begin anew on each."""
    found = launched(TORCHRUN | {"LOCAL_RANK": "0"}), launched(SRUN | {"SLURM_LOCALID": "1"})
    assert [one and one.local for one in found] == [0, 1]
    inside = launched(SRUN | {"SLURM_LOCALID": "1"} | TORCHRUN)
    assert inside is not None and inside.local is None
    for unsaid in (TORCHRUN | {"LOCAL_RANK": ""}, SRUN | {"SLURM_LOCALID": ""}):
        found_none = launched(unsaid)
        assert found_none is not None and found_none.local is None
    with pytest.raises(UsageError, match="LOCAL_RANK is no number"):
        launched(TORCHRUN | {"LOCAL_RANK": "first"})


def test_srun() -> None:
    found = launched(SRUN)
    assert found is not None and (found.rank, found.size, found.host) == (3, 8, "nid004")
    assert found.port in PORTS and not found.is_served
    assert launched({**SRUN, "SLURM_PROCID": "0"}) == Launch(0, 8, "nid004", found.port)
    beside = launched({**SRUN, "SLURM_STEP_ID": "1"})
    assert beside is not None and beside.port != found.port, "steps of a job run side by side"
    chosen = launched({**SRUN, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4000"})
    assert chosen == Launch(3, 8, "10.0.0.1", 4000)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("login", "login"),
        ("node7,node8", "node7"),
        ("node[01-04,7]", "node01"),
        ("node[7,01-04],login1", "node7"),
        ("gpu-a[12],gpu-b[1-3]", "gpu-a12"),
        ("r[1-2]n[03-04]", "r1n03"),
        ("x[8-9]-ib.cluster.example", "x8-ib.cluster.example"),
    ],
)
def test_the_first_host_of_a_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"RANK": None}, "RANK is not set"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR is not set"),
        ({"MASTER_PORT": None}, "MASTER_PORT is not set"),
        ({"RANK": "4"}, "process 4 of 4"),
        ({"RANK": "-1"}, "RANK is no number: '-1'"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is no number"),
        ({"MASTER_PORT": "70000"}, "port 70000"),
        ({"WORLD_SIZE": "0"}, "process 2 of 0"),
    ],
)
def test_what_makes_no_sense(changes: dict[str, str | None], text: str) -> None:
    environ = {key: value for key, value in (TORCHRUN | changes).items() if value is not None}
    with pytest.raises(UsageError, match=text):
        launched(environ)
