"""A plan divided into parts, so that several processes can work on it at once.

A part is a plan of its own: some of the output files, whole, and the steps that touch them. Each
weight has one owner among the parts that hold some of it: that one reads all of the weight, and
gives its digest, its proof and its cost. The others read the rows that go into their files.

For V4-Flash and a file for each of 8 GPUs, 8 processes read 1.19 times what one would: weights that
every GPU has whole, or by columns, are read by each. hf shards share nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

from dsv4_quant.conversion.notes import Cut, Journal
from dsv4_quant.conversion.plan import Plan, Step
from dsv4_quant.team.shares import shares


def part_of(plan: Plan, number: int, count: int) -> Plan:
    """One of so many parts, of about equal bytes; at most as many as there are files."""
    if count == 1:
        return plan
    chosen = _files_of(plan, count)
    places = {index: place for place, index in enumerate(chosen[number])}
    steps = (
        _in_part(step, places, owned=owner == number)
        for step, owner in zip(plan.steps, _owners(plan, chosen), strict=True)
    )
    return Plan(
        plan.source,
        plan.request,
        plan.catalogue,
        tuple(plan.files[index] for index in chosen[number]),
        tuple(step for step in steps if step.targets),
    )


def _files_of(plan: Plan, count: int) -> list[list[int]]:
    return shares({index: file.size for index, file in enumerate(plan.files)}, count)


def _owners(plan: Plan, chosen: list[list[int]]) -> Iterator[int]:
    """For each step one of the parts that have a target of it: the one that owns least so far."""
    part_of_file = {index: part for part, files in enumerate(chosen) for index in files}
    owns = [0] * len(chosen)
    for step in plan.steps:
        parts = {part_of_file[target.file] for target in step.targets}
        owner = min(parts, key=lambda part: (owns[part], part))
        owns[owner] += step.out.nbytes
        yield owner


def journal_of(journal: Journal, plan: Plan, number: int, count: int) -> Journal:
    """What the journal of a whole plan says of one of so many parts.

    All files were at their marks when the steps before a cut were done, and no further: so each
    part of the plan can go on by itself from there.
    """
    part, chosen = part_of(plan, number, count), set(_files_of(plan, count)[number])
    names = {file.name for file in part.files}
    owned = {step.spec.name for step in part.steps if step.owned}
    before = [0]
    for step in plan.steps:
        before.append(before[-1] + any(target.file in chosen for target in step.targets))
    cuts = tuple(
        Cut(
            before[cut.steps],
            {name: mark for name, mark in cut.files.items() if name in names},
            {name: result for name, result in cut.results.items() if name in owned},
        )
        for cut in journal.cuts
    )
    return Journal(journal.plan, journal.stamps, cuts)


def _in_part(step: Step, places: dict[int, int], *, owned: bool) -> Step:
    """What a step does in the files that have a place."""
    targets = tuple(
        target._replace(file=places[target.file])
        for target in step.targets
        if target.file in places
    )
    return step._replace(targets=targets, owned=owned)
