"""A plan divided into parts, so that several processes can work on it at once.

A part is a plan of its own: some of the output files, whole, and the steps that touch them. Each
weight has one owner, the part that holds its first rows in the output: it reads all of the weight,
and gives its digest, its proof and its cost. Other parts read the rows that go into their files.
"""

from __future__ import annotations

from dsv4_quant.conversion.notes import Cut, Journal
from dsv4_quant.conversion.plan import Plan, Step
from dsv4_quant.team.shares import shares


def part_of(plan: Plan, number: int, count: int) -> Plan:
    """One of so many parts, of about equal bytes; at most as many as there are files."""
    if count == 1:
        return plan
    chosen = _files_of(plan, number, count)
    places = {index: place for place, index in enumerate(chosen)}
    steps = (_in_part(step, places) for step in plan.steps)
    return Plan(
        plan.source,
        plan.request,
        plan.catalogue,
        tuple(plan.files[index] for index in chosen),
        tuple(step for step in steps if step.targets),
    )


def _files_of(plan: Plan, number: int, count: int) -> list[int]:
    return shares({index: file.size for index, file in enumerate(plan.files)}, count)[number]


def journal_of(journal: Journal, plan: Plan, number: int, count: int) -> Journal:
    """What the journal of a whole plan says of one of so many parts.

    All files were at their marks when the steps before a cut were done, and no further: so each
    part of the plan can go on by itself from there.
    """
    part, chosen = part_of(plan, number, count), set(_files_of(plan, number, count))
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


def _in_part(step: Step, places: dict[int, int]) -> Step:
    """What a step does in the files that have a place."""
    targets = tuple(
        target._replace(file=places[target.file])
        for target in step.targets
        if target.file in places
    )
    return step._replace(targets=targets, owned=step.targets[0].file in places)
