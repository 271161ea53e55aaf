"""Names, dtypes and shapes in the headers, and in the index, against the catalogue."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from math import prod

from dsv4_quant.checkpoint.folder import INDEX
from dsv4_quant.checkpoint.header import Entry
from dsv4_quant.validators.report import Finding, error
from dsv4_quant.validators.subject import Subject

Want = tuple[str, tuple[int, ...]]


def judge_tensors(subject: Subject) -> Iterator[Finding]:
    """Every tensor that is missing, unknown, held twice, or of another dtype or shape."""
    if subject.catalogue is None:
        return
    if subject.folder.layout == "mp":
        for file, wanted in subject.expected.items():
            if file in subject.folder.headers:
                yield from _judge_file(subject, file, wanted)
        return
    wanted = {name: want for file in subject.expected.values() for name, want in file.items()}
    for file in subject.folder.headers:
        yield from _judge_file(subject, file, wanted, is_part=True)
    lost = set(unreadable(subject))
    for name in wanted.keys() - subject.where.keys():
        said = subject.folder.index.get(name)
        if said not in lost:
            yield _missing(name, said)


def unreadable(subject: Subject) -> Counter[str]:
    """Files that are missing or have no sound header, and how many stored tensors are lost so."""
    headers = subject.folder.headers
    return Counter(
        {file: len(held) for file, held in subject.expected.items() if file not in headers}
    )


def _judge_file(
    subject: Subject, file: str, wanted: dict[str, Want], *, is_part: bool = False
) -> Iterator[Finding]:
    """One file's header; with ``is_part`` the other shards may hold what is missing here."""
    entries = subject.folder.headers[file].entries
    for name, entry in entries.items():
        want = wanted.get(name)
        if want is None:
            yield error("tensors", _shown(entry.dtype, entry.shape), _unknown(subject, name),
                        file=file, tensor=name, expected="no such tensor")  # fmt: skip
        elif (entry.dtype, entry.shape) != want:
            yield error("tensors", _shown(entry.dtype, entry.shape), _other(want, entry),
                        file=file, tensor=name, expected=_shown(*want))  # fmt: skip
        if is_part and subject.where[name] != file:
            yield error("tensors", f"also in {subject.where[name]}",
                        "Two shards hold it, and a loader takes the one that it reads last.",
                        file=file, tensor=name, expected="one shard")  # fmt: skip
    if not is_part:
        for name in wanted.keys() - entries.keys():
            yield _missing(name, file)


def _missing(name: str, file: str | None) -> Finding:
    meaning = "The file is not complete, or it is another model's."
    if name.endswith(".scale"):
        meaning = "Without its scales the weight cannot be decoded."
    return error("tensors", "missing", meaning, file=file, tensor=name, expected="a tensor")


def _unknown(subject: Subject, name: str) -> str:
    parts = name.split(".")
    assert subject.config is not None
    experts = subject.config.n_routed_experts
    if "experts" in parts[:-2] and parts[parts.index("experts") + 1] == str(experts):
        return f"Experts are numbered 0 to {experts - 1}: are these numbered from 1?"
    return "The model that the config describes has no such tensor: another model's config?"


def _other(want: Want, entry: Entry) -> str:
    dtype, shape = want
    if dtype == entry.dtype and prod(shape) == prod(entry.shape):
        return "The same bytes in other rows: every value would stand at a wrong place."
    if dtype == entry.dtype:
        return "Another model's tensor, or the config says a wrong size."
    if shape == entry.shape:
        return f"Read as {entry.dtype}, the bytes would mean other numbers."
    return "Stored in another format than the other weights of its kind, or damaged."


def _shown(dtype: str, shape: tuple[int, ...]) -> str:
    return f"{dtype} {list(shape)}"


def judge_index(subject: Subject) -> Iterator[Finding]:
    """The index against the headers of the shards that it names."""
    folder = subject.folder
    if not folder.index:
        return
    named = set(folder.index.values())
    for name, said in folder.index.items():
        if said in folder.headers and name not in folder.headers[said].entries:
            holder = subject.where.get(name, "no entry: no shard holds it")
            yield error("index", said, "A loader would look for the tensor in the wrong shard.",
                        file=INDEX, tensor=name, expected=holder)  # fmt: skip
    for name, holder in subject.where.items():
        if name not in folder.index and holder in named:
            yield error("index", "no entry", "A loader would never load the tensor.",
                        file=INDEX, tensor=name, expected=holder)  # fmt: skip
    if named <= folder.headers.keys():
        yield from _judge_total(subject)


def _judge_total(subject: Subject) -> Iterator[Finding]:
    total, held = subject.folder.total_size, subject.folder.data_bytes
    if total != held:
        found = "none" if total is None else f"{total:,}"
        yield error("index", f"total_size {found}",
                    "Loaders plan their memory by it; the index is another revision's, or edited.",
                    file=INDEX, expected=f"total_size {held:,}")  # fmt: skip
