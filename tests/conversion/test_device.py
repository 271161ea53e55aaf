"""``--device cuda``: the same bytes, proofs, costs and errors as on the processor.

Here the device is a CPU: the same code, but for pinned memory and streams, with the casts'
definitions in PyTorch, or their Triton twins in the interpreter.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from typer.testing import CliRunner

from dsv4_quant.catalogue import StoredTensor
from dsv4_quant.checkpoint import Checkpoint
from dsv4_quant.checkpoint.panels import usable_cores
from dsv4_quant.cli.main import app
from dsv4_quant.conversion.budget import DEVICE_VALUE_BYTES, budget
from dsv4_quant.conversion.casts import OnProcessor
from dsv4_quant.conversion.device import OnDevice
from dsv4_quant.conversion.journal import FOLDER
from dsv4_quant.conversion.operations import Panel, Proof
from dsv4_quant.conversion.plan import make_plan
from dsv4_quant.conversion.request import Request
from dsv4_quant.conversion.run import convert
from dsv4_quant.conversion.summary import plan_conversion
from dsv4_quant.errors import DeviceError, Dsv4Error, MiscomputedError, UsageError
from dsv4_quant.formats.blocks import BF16, FP4, Tensor, fp8
from dsv4_quant.formats.rules import ScaleRule
from dsv4_quant.kernels import device_casts_torch, gpu_torch
from dsv4_quant.kernels.device_casts_torch import DeviceCasts
from dsv4_quant.kernels.gpu_torch import check_usable
from dsv4_quant.kernels.lane_torch import ALIGNED, Lane
from dsv4_quant.model.forward import one_torch_thread
from dsv4_quant.team import Team
from tests.conversion.checkpoints import config, formats, tree, wild, write_checkpoint, write_hollow

Array = NDArray[Any]

ONE: dict[str, Any] = {
    "num_hidden_layers": 1,
    "compress_ratios": [4],
    "num_nextn_predict_layers": 0,
    "n_routed_experts": 2,
    "vocab_size": 64,
}
W2 = "layers.0.ffn.experts.1.w2.weight"
CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with one_torch_thread():
        yield


@pytest.fixture
def on_torch(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """``device="cuda"`` is a CPU, and nothing is checked; gives what goes to the processor."""
    monkeypatch.setattr(gpu_torch, "find_gpu", lambda local: CPU)
    monkeypatch.setattr(OnDevice, "_is_due", lambda self, kind: False)
    return counted(monkeypatch)


def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the processor casts, by operation or kind of work."""
    found: Counter[str] = Counter()

    def spy(name: str) -> Callable[..., Any]:
        plain = getattr(OnProcessor, name)

        def call(self: OnProcessor, *args: Any) -> Any:
            found[args[0] if isinstance(args[0], str) else name] += 1
            return plain(self, *args)

        return call

    for name in ("weight", "scale", "requantise", "rounded_scales"):
        monkeypatch.setattr(OnProcessor, name, spy(name))
    return found


def made(root: Path, experts: str, scale: Any = "e8m0", **edits: Callable[[Array], None]) -> Path:
    """One layer of wild values; scales near 2**-7. ``edits``: a tensor's name with _ for ``.``"""
    wanted = dict(edits)

    def values(tensor: StoredTensor, rng: np.random.Generator) -> Array:
        array = wild(tensor, rng)
        if array.dtype == np.uint16:  # nothing that rounds to 2**128, which is refused
            array = np.where(array & 0x7FFF >= 0x7E00, array & 0xBFFF, array)
        if tensor.is_scale:
            exponents = rng.integers(118, 123, tensor.shape)
            is_byte = tensor.dtype == "F8_E8M0"
            held = exponents if is_byte else np.ldexp(1.0, exponents - 127)
            array = held.astype(array.dtype)
        edit = wanted.pop(tensor.name.replace(".", "_"), None)
        if edit is not None:
            edit(array)
        return array

    dense = "bf16" if experts == "bf16" else "fp8"
    bare = {"quantization_config": None} if experts == "bf16" else {}
    raw = config(**ONE, **bare, expert_dtype=None if experts == "bf16" else experts)
    write_checkpoint(root, raw, formats(experts, dense, scale), values=values)
    assert not wanted, "no such tensor"
    return root


def beyond(array: Array) -> None:
    """A scale too far from the others of its tile."""
    array[3, 1] = 90


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("device")
    found = {
        "fp4": made(root / "fp4", "fp4"),
        "fp4-wild": write_checkpoint(root / "fp4-wild", config(**ONE)),
        "fp4-beyond": made(root / "fp4-beyond", "fp4", layers_0_ffn_experts_1_w2_scale=beyond),
        "fp8": made(root / "fp8", "fp8"),
        "fp8-f32": made(root / "fp8-f32", "fp8", "f32"),
        "bf16": made(root / "bf16", "bf16"),
    }
    for source, name, request in (
        ("fp4", "mp", Request("mp", 2)),  # wo_a in BF16
        ("fp8-f32", "mp-f32", Request("mp", 2)),
        ("fp4", "fp4-as-fp8", Request("hf", 1, "fp8")),
        ("fp4", "fp4-as-bf16", Request("mp", 2, "bf16")),
    ):
        convert(found[source], root / name, request)
        found[name] = root / name
    return found


LS, MAX = ScaleRule.LEAST_SQUARES, ScaleRule.MAX
ROADS = [
    ("fp4", Request("mp", 2, "fp8")),
    ("fp4-wild", Request("mp", 2, "fp8")),
    ("fp4", Request("hf", 1, "bf16", "bf16")),
    ("fp8-f32", Request("mp", 2, "bf16")),
    ("mp", Request("hf", 1)),
    ("mp-f32", Request("hf", 1)),
    ("fp4-as-fp8", Request("hf", 1, "fp4")),
    ("fp4-as-bf16", Request("hf", 1, "fp4")),
    ("fp4-as-bf16", Request("mp", 1, "fp8")),
    ("fp4-beyond", Request("mp", 2, "fp8", lossy=True)),
    ("fp4-beyond", Request("mp", 2, "fp8", lossy=True, rule=MAX)),
    ("fp8", Request("mp", 2, "fp4", lossy=True)),
    ("fp8-f32", Request("mp", 2, "fp4", lossy=True, rule=MAX)),
    ("bf16", Request("hf", 1, "fp4", "fp8", lossy=True)),
    ("bf16", Request("hf", 1, "fp8", "fp8", lossy=True, rule=MAX)),
]


@pytest.mark.parametrize(("name", "request_"), ROADS, ids=lambda value: str(value)[-60:])
def test_every_road_gives_the_same_files(
    name: str, request_: Request, sources: dict[str, Path], tmp_path: Path, on_torch: Counter[str]
) -> None:
    """Manifest included: digests, certificate, costs. And the device has done it, but for scales
    that are made of scales alone, and rounding to BF16."""
    convert(sources[name], tmp_path / "cpu", request_)
    on_torch.clear()
    convert(sources[name], tmp_path / "cuda", request_, device="cuda", workers=3)
    assert tree(tmp_path / "cuda") == tree(tmp_path / "cpu")
    made_here = {"fp4": "fp4_to_fp8", "fp4-wild": "fp4_to_fp8", "fp8-f32": "requantise"}
    assert set(on_torch) <= {"copy", made_here.get(name, "copy")}
    assert on_torch["requantise"] <= 1  # wo_a


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize(("name", "request_"), ROADS, ids=lambda value: str(value)[-60:])
def test_on_a_gpu(name: str, request_: Request, sources: dict[str, Path], tmp_path: Path) -> None:
    convert(sources[name], tmp_path / "cpu", request_)
    convert(sources[name], tmp_path / "cuda", request_, device="cuda")
    assert tree(tmp_path / "cuda") == tree(tmp_path / "cpu")


def nan_scale(array: Array) -> None:
    array[70, 2] = 0xFF


def nan_code(array: Array) -> None:
    array[5, 77] = 0x7F


def infinity(array: Array) -> None:
    array[127, 0] = 0xFF80


def smallest_scale(array: Array) -> None:
    array[0, 0] = 0


def huge_scale(array: Array) -> None:
    array[9, 3] = 254


SCALE = "layers_0_ffn_experts_1_w2_scale"
WEIGHT = "layers_0_ffn_experts_1_w2_weight"


@pytest.mark.parametrize(
    ("held", "experts", "lossy", "edits"),
    [
        ("fp4", "fp8", False, {SCALE: beyond}),
        ("fp4", "fp8", False, {SCALE: nan_scale}),
        ("fp4", "fp8", True, {SCALE: nan_scale}),
        ("fp4", "bf16", False, {SCALE: huge_scale}),
        ("fp4", "bf16", False, {SCALE: nan_scale}),
        ("fp8", "bf16", False, {WEIGHT: nan_code}),
        ("fp8", "fp4", False, {}),
        ("fp8", "fp4", True, {WEIGHT: nan_code}),
        ("bf16", "fp8", False, {}),
        ("bf16", "fp4", False, {WEIGHT: infinity}),
        ("bf16", "fp4", True, {WEIGHT: infinity}),
        ("bf16", "fp8", True, {WEIGHT: infinity}),
    ],
)
def test_refusals_have_the_same_words(
    held: str, experts: Any, lossy: bool, edits: Any, tmp_path: Path, on_torch: Counter[str]
) -> None:
    source = made(tmp_path / "src", held, **edits)
    request = Request("mp", 2, experts, lossy=lossy)
    found = []
    for device in ("cpu", "cuda"):
        with pytest.raises(Dsv4Error) as caught:
            convert(source, tmp_path / "out", request, device=device, workers=1)  # type: ignore[arg-type]
        found.append((type(caught.value), str(caught.value)))
        assert not (tmp_path / "out").exists()
    assert found[0] == found[1]


def test_what_bf16_cannot_hold_is_rounded_by_the_processor(
    tmp_path: Path, on_torch: Counter[str]
) -> None:
    """The device rounds what it has decoded to BF16, which FP8 times 2**-127 is too small for."""
    source = made(tmp_path / "src", "fp8", layers_0_ffn_experts_1_w2_scale=smallest_scale)
    request = Request("mp", 2, "fp4", lossy=True)
    convert(source, tmp_path / "cpu", request)
    on_torch.clear()
    convert(source, tmp_path / "cuda", request, device="cuda")
    assert tree(tmp_path / "cuda") == tree(tmp_path / "cpu")
    assert on_torch["requantise"] == on_torch["rounded_scales"] == 1


INTERPRETED = """
import sys
from pathlib import Path
import torch
from dsv4_quant.conversion.device import OnDevice
from dsv4_quant.conversion.request import Request
from dsv4_quant.conversion.run import convert
from dsv4_quant.kernels import gpu_torch

gpu_torch.find_gpu = lambda local: torch.device("cpu")
OnDevice._is_due = lambda self, kind: False
root = Path(sys.argv[1])
for number, (source, *request) in enumerate({jobs}):
    convert(source, root / str(number), Request(*request), device="cuda", workers=2)
names = ("fp4_to_fp8", "fp8_to_bf16", "fp4_to_bf16", "quantise_fp8")
assert {{f"dsv4_quant.kernels.{{name}}_triton" for name in names}} <= set(sys.modules)
"""


def test_triton_in_its_interpreter(sources: dict[str, Path], tmp_path: Path) -> None:
    jobs: list[tuple[str, ...]] = [
        ("fp4", "mp", 2, "fp8"),
        ("fp4", "hf", 1, "bf16"),
        ("mp", "hf", 1),
        ("bf16", "hf", 1, "fp8", "keep", True),
    ]  # type: ignore[list-item]
    placed = [(str(sources[name]), *request) for name, *request in jobs]
    environment = {"TRITON_INTERPRET": "1", "DSV4_QUANT_KERNELS": "triton", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED.format(jobs=placed), str(tmp_path / "cuda")],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    for number, (name, *request) in enumerate(jobs):
        convert(sources[name], tmp_path / str(number), Request(*request))  # type: ignore[arg-type]
        assert tree(tmp_path / "cuda" / str(number)) == tree(tmp_path / str(number))


class TestChecks:
    """A device that computes something else is found out."""

    @pytest.fixture(autouse=True)
    def on_cpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gpu_torch, "find_gpu", lambda local: CPU)

    @pytest.mark.parametrize(
        ("name", "request_", "method", "part"),
        [
            ("fp4", Request("mp", 2, "fp8"), "fp4_to_fp8", 0),
            ("fp4", Request("mp", 2, "fp8"), "fp4_to_fp8", 1),
            ("fp4", Request("hf", 1, "bf16"), "to_bf16", None),
            ("mp", Request("hf", 1), "encode", 0),
            ("mp", Request("hf", 1), "encode", 1),
            ("fp8", Request("hf", 1, "fp4", lossy=True), "quantise", 0),
            ("fp8", Request("hf", 1, "fp4", lossy=True), "quantise", 1),
            ("fp8", Request("hf", 1, "fp4", lossy=True), "quantise", 2),
        ],
    )
    def test_one_wrong_bit(
        self,
        name: str,
        request_: Request,
        method: str,
        part: int | None,
        sources: dict[str, Path],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        plain = getattr(DeviceCasts, method)

        def wrong(self: DeviceCasts, *args: Any) -> Any:
            result = plain(self, *args)
            spoilt = result if part is None else result[part]
            if isinstance(spoilt, Counter):
                spoilt[3] += 1
            else:
                array = spoilt if isinstance(spoilt, np.ndarray) else spoilt.error_squares
                array.reshape(-1).view(np.uint8)[-1] ^= 1
            return result

        monkeypatch.setattr(DeviceCasts, method, wrong)
        with pytest.raises(MiscomputedError, match="otherwise than the processor") as caught:
            convert(sources[name], tmp_path / "out", request_, device="cuda")
        assert caught.value.tensor
        assert not (tmp_path / "out").exists()

    def test_the_first_of_every_so_many(self, monkeypatch: pytest.MonkeyPatch) -> None:
        handed = counted(monkeypatch)
        casts = OnDevice(DeviceCasts(CPU), every=3)
        panel = Panel("w", 0, fp4_weight(128, 128), BF16)
        for _ in range(7):
            casts.weight("fp4_to_bf16", panel, Proof())
        assert handed["fp4_to_bf16"] == 3  # the 1st, the 4th, the 7th


def fp4_weight(rows: int, cols: int) -> Tensor:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, (rows, cols // 2), np.uint8)
    scales = rng.integers(118, 123, (rows, cols // 32)).astype(np.uint8)
    return Tensor(FP4, (rows, cols), codes, scales)


class TestFailures:
    def test_too_little_memory_is_told_and_the_work_continues(
        self, sources: dict[str, Path], tmp_path: Path, on_torch: Counter[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        request = Request("mp", 2, "fp8", lossy=True)
        convert(sources["fp4"], tmp_path / "cpu", request)

        def full(*args: Any, **kwargs: Any) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

        with monkeypatch.context() as patch:
            patch.setattr(device_casts_torch, "_quantised", full)
            with pytest.raises(DeviceError, match=r"too little free memory.*fewer --workers"):
                convert(sources["fp4"], tmp_path / "out", request, device="cuda")
        assert [path.name for path in (tmp_path / "out").iterdir()] == [FOLDER]
        convert(sources["fp4"], tmp_path / "out", request, device="cpu")
        assert tree(tmp_path / "out") == tree(tmp_path / "cpu")

    def test_any_other_failure(self) -> None:
        def fail(codes: torch.Tensor) -> None:
            raise torch.AcceleratorError("CUDA error: unspecified launch failure\nmore")

        with pytest.raises(DeviceError) as caught:
            Lane(CPU).run(fail, np.zeros(1, np.uint8))  # type: ignore[arg-type]
        assert caught.value.what == "The device cpu failed: CUDA error: unspecified launch failure"
        assert type(caught.value.__cause__) is torch.AcceleratorError

    def test_no_gpu(self, sources: dict[str, Path], tmp_path: Path, monkeypatch: Any) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        wanted = "No CUDA device can be used here. --device cpu does the same on the processor."
        for job in (convert, plan_conversion):
            with pytest.raises(UsageError) as caught:
                job(sources["fp4"], tmp_path / "out", Request("hf"), device="cuda")  # type: ignore[operator]
            assert str(caught.value) == wanted
        arguments = ["convert", sources["fp4"], tmp_path / "out", "--gpus", 2, "--device", "cuda"]
        told = CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "200"})
        assert told.exit_code == 2 and wanted in told.stderr
        assert not (tmp_path / "out").exists()

    def test_processes_share_out_the_gpus(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
        monkeypatch.setattr(gpu_torch, "check_usable", lambda device: device)
        found = [str(gpu_torch.find_gpu(local)) for local in range(6)]
        assert found == ["cuda:0", "cuda:1", "cuda:2", "cuda:3", "cuda:0", "cuda:1"]

    def test_a_process_takes_the_gpu_of_its_place_on_its_machine(
        self, sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Second(Team):
            """The sixth of all processes, and the second of its machine."""

            local = 1

        asked: list[int] = []

        def find(local: int) -> torch.device:
            asked.append(local)
            raise UsageError("none")

        monkeypatch.setattr(gpu_torch, "find_gpu", find)
        with pytest.raises(UsageError, match="none"):
            convert(sources["fp4"], tmp_path, Request("hf"), device="cuda", team=Second())
        assert asked == [1]

    def test_no_torch(self) -> None:
        script = """
import sys
sys.modules["torch"] = None
from dsv4_quant.conversion.device import casts_on
from dsv4_quant.errors import UsageError
try:
    casts_on("cuda")
except UsageError as error:
    print(error)
"""
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert done.stdout.startswith("No CUDA device can be used: PyTorch cannot be loaded (")
        assert done.stdout.endswith("). --device cpu does the same on the processor.\n")

    def test_a_backend_that_does_not_exist(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert check_usable(CPU) == CPU
        monkeypatch.setenv("DSV4_QUANT_KERNELS", "cutlass")
        with pytest.raises(UsageError, match="DSV4_QUANT_KERNELS is 'cutlass'"):
            check_usable(CPU)


class TestLane:
    def test_results_are_the_caller_s_own(self) -> None:
        lane = Lane(CPU)
        first = np.arange(1000, dtype=np.uint8)
        (kept,) = lane.run(lambda codes: [codes], first)
        (other,) = lane.run(lambda codes: [codes + 1], first)
        assert kept.tobytes() == first.tobytes() and other.tobytes() == (first + 1).tobytes()

    def test_arrays_begin_where_kernels_may_load(self) -> None:
        def starts(*parts: torch.Tensor) -> list[torch.Tensor]:
            base = parts[0].data_ptr()
            assert [(part.data_ptr() - base) % ALIGNED for part in parts] == [0, 0, 0]
            assert [part.dtype for part in parts] == [torch.uint8, torch.bfloat16, torch.float32]
            return list(parts)

        arrays = (
            np.arange(3, dtype=np.uint8),
            np.arange(15, dtype=np.uint16).reshape(5, 3).T,  # not contiguous
            np.arange(7, dtype=np.float32),
        )
        back = Lane(CPU).run(starts, *arrays)
        for array, found in zip(arrays, back, strict=True):
            assert found.dtype == array.dtype and np.array_equal(found, array)

    def test_lanes_of_several_threads(self) -> None:
        weights = [fp4_weight(128, 128 * n) for n in (1, 3, 2, 1)]
        wanted = [DeviceCasts(CPU).to_bf16(weight) for weight in weights]

        def work(number: int) -> bool:
            casts = DeviceCasts(CPU)
            return all(
                np.array_equal(casts.to_bf16(weights[n % 4]), wanted[n % 4])  # type: ignore[arg-type]
                for n in range(number, number + 8)
            )

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(work, range(4)))

    @pytest.mark.parametrize("after", [FP4, fp8((128, 128)), fp8((1, 128))], ids=str)
    def test_its_memory_is_in_the_budget(self, after: Any) -> None:
        """The largest cast there is: two bytes a value in, codes and figures of blocks out."""
        casts = DeviceCasts(CPU)
        rows, cols = 128, 640  # just beyond a power of two
        for height in (rows // 2, rows):
            half = Tensor(BF16, (height, cols), np.zeros((height, cols), np.uint16))
            assert casts.quantise(half, after, LS) is not None
        sides = (casts._lane._inwards, casts._lane._outwards)
        held = sum(side.memory.numel() for side in sides)
        assert 2 * held <= DEVICE_VALUE_BYTES * rows * cols  # as much again was outgrown

    def test_one_thread_more_than_cores(self, tmp_path: Path) -> None:
        with Checkpoint.open(write_hollow(tmp_path / "src", config())) as source:
            plan = make_plan(source, Request("mp", 2, "fp8"))
        limits = budget(plan, workers=None, max_memory=8 << 30, device="cuda")
        assert limits.workers == usable_cores() + 1
        assert budget(plan, workers=1, max_memory=8 << 30, device="cuda").workers == 1
        for bound in (2 << 30, 3 << 30):
            assert budget(plan, workers=64, max_memory=bound, device="cuda").peak_bytes <= bound
        with pytest.raises(UsageError, match="at least"):
            budget(plan, workers=1, max_memory=1 << 30, device="cuda")
