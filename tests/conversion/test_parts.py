"""A plan in parts: nothing is lost, nothing is made twice, and each part is a plan by itself."""

from __future__ import annotations

from collections import Counter

import pytest

from dsv4_quant.checkpoint import Checkpoint
from dsv4_quant.conversion.notes import Cut, Journal
from dsv4_quant.conversion.parts import journal_of, part_of
from dsv4_quant.conversion.plan import Plan, cuts, make_plan
from dsv4_quant.conversion.request import Request
from tests.conversion.checkpoints import config, write_hollow

REQUESTS = [Request("mp", 4, "fp8"), Request("hf", 1, "bf16"), Request("mp", 1)]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    raw = config(num_attention_heads=8, index_n_heads=8, o_groups=4)
    return Checkpoint.open(write_hollow(tmp_path_factory.mktemp("parts") / "src", raw))


def writes(plan: Plan) -> Counter[tuple[str, int, str]]:
    """File, offset and tensor of everything that a plan writes."""
    return Counter(
        (plan.files[target.file].name, target.offset, step.out.name)
        for step in plan.steps
        for target in step.targets
    )


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda one: f"{one.layout}{one.gpus}")
@pytest.mark.parametrize("count", [1, 2, 3])
def test_together_they_are_the_plan(source: Checkpoint, request_: Request, count: int) -> None:
    plan = make_plan(source, request_)
    parts = [part_of(plan, number, count) for number in range(count)]
    assert sum(map(writes, parts), Counter()) == writes(plan)
    assert sorted(file.name for part in parts for file in part.files) == sorted(
        file.name for file in plan.files
    )
    owned = Counter(step.out.name for part in parts for step in part.steps if step.owned)
    assert owned == Counter(step.out.name for step in plan.steps)


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda one: f"{one.layout}{one.gpus}")
def test_every_file_grows_from_front_to_back(source: Checkpoint, request_: Request) -> None:
    plan = make_plan(source, request_)
    for part in (part_of(plan, number, 2) for number in range(2)):
        ends = {index: len(file.header) for index, file in enumerate(part.files)}
        for step in part.steps:
            for target in step.targets:
                assert target.offset == ends[target.file]
                ends[target.file] += target.rows * target.row_bytes
        assert ends == {index: file.size for index, file in enumerate(part.files)}


def test_who_owns_a_weight_reads_all_of_it_and_others_what_they_write(source: Checkpoint) -> None:
    plan = make_plan(source, Request("mp", 4, "fp8"))
    name = "layers.0.attn.wq_b.weight"  # its rows are split
    rows = source.specs[name].matrix[0]
    quarter, owners = rows // 4, []
    for number in range(4):
        step = next(step for step in part_of(plan, number, 4).steps if step.out.name == name)
        read = [row for row in range(0, rows, 128) if step.needs(row, row + 128)]
        own = range(number * quarter, (number + 1) * quarter, 128)
        assert read == list(range(0, rows, 128) if step.owned else own)
        owners += [number] if step.owned else []
    assert len(owners) == 1


def test_each_part_owns_its_share(source: Checkpoint) -> None:
    plan = make_plan(source, Request("mp", 4, "fp8"))
    parts = [part_of(plan, number, 4) for number in range(4)]
    owned = [sum(step.out.nbytes for step in part.steps if step.owned) for part in parts]
    largest = max(step.out.nbytes for step in plan.steps)
    assert max(owned) - min(owned) <= largest


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda one: f"{one.layout}{one.gpus}")
def test_a_journal_of_all_tells_of_each_part(source: Checkpoint, request_: Request) -> None:
    plan = make_plan(source, request_)
    weights = [step.spec.name for step in plan.steps]
    made, done = [], 0
    for steps, marks in cuts(plan, 1 << 16):
        files = {plan.files[index].name: (mark, "") for index, mark in marks.items()}
        made.append(Cut(steps, files, dict.fromkeys(weights[done:steps])))
        done = steps
    count = min(2, len(plan.files))
    for number in range(count):
        part = part_of(plan, number, count)
        found = journal_of(Journal({}, {}, tuple(made)), plan, number, count)
        for cut in found.cuts:
            marks = {}
            for step in part.steps[: cut.steps]:
                for target in step.targets:
                    end = target.offset + target.rows * target.row_bytes
                    marks[part.files[target.file].name] = (end, "")
            assert cut.files == marks
        assert found.cuts[-1].steps == len(part.steps)
        results = {name for cut in found.cuts for name in cut.results}
        assert results == {step.spec.name for step in part.steps if step.owned}
