"""A plan divided into parts, so that several processes can work on it at once.

A part is a plan of its own: some of the output files, whole, and the steps that touch them. Each
weight has one owner, the part that holds its first rows in the output: it reads all of the weight,
and gives its digest, its proof and its cost. Other parts read the rows that go into their files.
"""

from __future__ import annotations

from dsv4_quant.conversion.plan import Plan, Step
from dsv4_quant.team.shares import shares


def part_of(plan: Plan, number: int, count: int) -> Plan:
    """One of so many parts, of about equal bytes; at most as many as there are files."""
    if count == 1:
        return plan
    sizes = {index: file.size for index, file in enumerate(plan.files)}
    chosen = shares(sizes, count)[number]
    places = {index: place for place, index in enumerate(chosen)}
    steps = (_in_part(step, places) for step in plan.steps)
    return Plan(
        plan.source,
        plan.request,
        plan.catalogue,
        tuple(plan.files[index] for index in chosen),
        tuple(step for step in steps if step.targets),
    )


def _in_part(step: Step, places: dict[int, int]) -> Step:
    """What a step does in the files that have a place."""
    targets = tuple(
        target._replace(file=places[target.file])
        for target in step.targets
        if target.file in places
    )
    return step._replace(targets=targets, owned=step.targets[0].file in places)
