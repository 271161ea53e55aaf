"""The colour scale, with what some formats give."""

from __future__ import annotations

from dsv4_quant.reports.colours import EXACT, FIRST, PALETTE, TOP, hexadecimal
from dsv4_quant.reports.markup import Markup, tag
from dsv4_quant.reports.png import address, png
from dsv4_quant.reports.recast import NORMAL
from dsv4_quant.reports.scales import Axis

WIDTH, TALL, TOP_ROOM, SIDE = 520, 14, 16, 14


def legend() -> Markup:
    """From 0 to 50 dB; above it where normally distributed values lie, beside it exact."""
    axis = Axis(0, TOP, WIDTH)
    strip = png([bytes(range(FIRST, len(PALETTE)))], PALETTE)
    parts = [
        tag("image", x=SIDE, y=TOP_ROOM, width=WIDTH, height=TALL, href=address(strip),
            preserveAspectRatio="none"),
    ]  # fmt: skip
    for at in range(0, round(TOP) + 1, 10):
        unit = " dB" if at == 0 else " or more" if at == TOP else ""
        x = SIDE + axis.at(at)
        anchor = "" if at == 0 else "centre"
        parts.append(
            tag("text", f"{at}{unit}", x=0 if at == 0 else x, y=TOP_ROOM + TALL + 13, class_=anchor)
        )
    for kind in ("fp4", "fp8"):
        x = SIDE + axis.at(NORMAL[kind])
        parts += [
            tag("line", x1=x, x2=x, y1=TOP_ROOM - 4, y2=TOP_ROOM + TALL, class_="mark"),
            tag("text", f"normal values in {kind.upper()}", x=x, y=TOP_ROOM - 6, class_="centre"),
        ]
    right = SIDE + WIDTH + 60
    parts += [
        tag("rect", x=right, y=TOP_ROOM, width=TALL, height=TALL, fill=hexadecimal(PALETTE[EXACT])),
        tag("text", "exact", x=right + TALL + 5, y=TOP_ROOM + TALL / 2, class_="mid"),
    ]
    return tag(
        "svg", *parts, viewBox=f"0 0 {right + 60} {TOP_ROOM + TALL + 18}", class_="legend",
        role="img", aria_label="Colours: red 0 to 10 dB, orange 12, yellow 16, light blue 19, blue"
        " 31, dark blue 50 dB; green: exact",
    )  # fmt: skip
