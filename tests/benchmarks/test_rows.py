"""The tables of the benchmarks: what they show, and what they leave out."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

import pytest

from benchmarks.__main__ import SECTIONS, command, parser
from benchmarks.rows import Row, Section, markdown, median, table
from benchmarks.timing import Run

MIB = 1 << 20


def test_a_row_is_the_median_of_its_runs_and_the_highest_peak() -> None:
    runs = [Run(3.0, 1.0, 5), Run(1.0, 2.0, 9), Run(2.0, 9.0, 7)]
    assert median("job", "cold", runs, nbytes=7, ratios=[0.5, 0.75, 4.0], bound=10) == Row(
        "job", "cold", 2.0, 2.0, 9, 7, 0.75, 10
    )
    assert median("job", "", runs[:1]) == Row("job", "", 3.0, 1.0, 5, None, None, None)


def test_a_table_leaves_out_what_no_row_says() -> None:
    section = Section("planning", "Planning", "", (Row("inspect", "", 1.234, 1.5, 150 * MIB),))
    assert table(section, {}).splitlines() == [
        "| job | time | CPU | peak memory |",
        "| --- | ---: | ---: | ---: |",
        "| inspect | 1.23 s | 1.50 s | 150 MiB |",
    ]


def test_a_table_of_everything() -> None:
    rows = (
        Row("reshard", "cold", 2.0, 1.0, 255 * MIB, 3_000_000_000, 0.85, 256 * MIB),
        Row("reshard", "warm", 1.0, 1.0, 256 * MIB, 3_000_000_000, 1.1, 256 * MIB),
    )
    section = Section("memory", "Memory", "source", rows)
    earlier = {("memory", "reshard", "cold"): asdict(rows[1])}
    assert table(section, earlier).splitlines() == [
        "| job | source | GB | time | GB/s | x `cp`+sync | before | CPU | peak memory | bound |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| reshard | cold | 3.0 | 2.00 s | 1.50 | 0.85 | 1.10 x | 1.00 s | 255 MiB | 256 MiB |",
        "| reshard | warm | 3.0 | 1.00 s | 3.00 | 1.10 |  | 1.00 s | 256 MiB"
        " | 256 MiB **exceeded** |",
    ]


def test_a_page_compares_with_an_earlier_result() -> None:
    section = Section("planning", "Planning", "", (Row("inspect", "", 1.0, 1.0, MIB),))
    slower = Section("planning", "Planning", "", (Row("inspect", "", 2.0, 1.0, MIB),))
    before = {"machine": {"cpu": "old"}, "sections": [asdict(slower)]}
    page = markdown(
        [section], json.loads(json.dumps(before)), {"cpu": "new"}, "python -m benchmarks"
    )
    assert "| inspect | 1.00 s | 2.00 s | 1.00 s | 1 MiB |" in page
    assert page.index("cpu new") < page.index("## Planning") < page.index("cpu old")
    alone = markdown([section], {}, {"cpu": "new"}, "python -m benchmarks")
    assert "before" not in alone and "old" not in alone


def test_the_command_on_the_page_repeats_the_measurement_and_names_no_folder() -> None:
    given = ["planning", "--size", "1.5", "--sizes", "1", "3", "--folder", "/x", "--json", "/y"]
    told = command(given)
    assert told.startswith("python -m benchmarks planning ") and "/" not in told

    def measured(arguments: list[str]) -> argparse.Namespace:
        found = parser().parse_args(arguments)
        found.folder = found.json = None
        return found

    assert measured(told.split()[3:]) == measured(given)
    assert measured(command([]).split()[3:]) == measured([])


def test_an_unknown_section_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks.__main__ import main

    monkeypatch.setattr("sys.argv", ["benchmarks", "plans"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert f"no section plans; there are {', '.join(SECTIONS)}" in capsys.readouterr().err
