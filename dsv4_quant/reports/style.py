"""The page's style: light, dark and printed."""

from __future__ import annotations

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #57606a; --back: #fff; --line: #d5dae0;
  --panel: #f5f7f9; --bar: #4a7fb5; --good: #0a7a52; --bad: #b3261e; --open: #8a6100; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7eb; --soft: #9aa4af; --back: #14171b;
  --line: #343a42; --panel: #1d2127; --bar: #6fa3d4; --good: #3fc795; --bad: #ff8a80;
  --open: #e3b341; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink);
  font: 15px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1140px; margin: 0 auto; padding: 24px 20px 40px; }
h1 { font-size: 1.6rem; margin: 0 0 12px; }
h2 { font-size: 1.15rem; margin: 36px 0 10px; }
h3 { font-size: 0.95rem; margin: 16px 0 4px; font-weight: 600; }
.soft, footer { color: var(--soft); fill: var(--soft); font-size: 0.85rem; }
footer { margin-top: 36px; border-top: 1px solid var(--line); padding-top: 10px; }
.facts { margin: 0; font-size: 0.88rem; }
.facts div { display: flex; gap: 12px; padding: 1px 0; }
.facts dt { flex: 0 0 150px; color: var(--soft); }
.facts dd { margin: 0; min-width: 0; overflow-wrap: anywhere; }
.findings { list-style: none; margin: 18px 0; padding: 0; }
.findings li { padding: 8px 12px 8px 38px; margin: 6px 0; background: var(--panel);
  border-left: 4px solid var(--open); position: relative; overflow-wrap: anywhere; }
.findings li::before { position: absolute; left: 14px; font-weight: 700; content: "?";
  color: var(--open); }
.findings .good { border-color: var(--good); }
.findings .good::before { content: "\\2713"; color: var(--good); }
.findings .bad { border-color: var(--bad); }
.findings .bad::before { content: "!"; color: var(--bad); }
code { font: 0.9em ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
.numbers { display: grid; grid-template-columns: repeat(4, 1fr); gap: 10px; }
.numbers div { border: 1px solid var(--line); padding: 8px 12px; min-width: 0; }
.numbers span, .numbers small { display: block; color: var(--soft); font-size: 0.8rem;
  overflow-wrap: anywhere; }
.numbers b { font-size: 1.5rem; font-weight: 600; font-variant-numeric: tabular-nums;
  overflow-wrap: anywhere; line-height: 1.25; }
.wide { overflow-x: auto; }
.wide > svg { display: block; width: 100%; min-width: 880px; height: auto; }
svg { font: 11px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; fill: var(--ink);
  font-variant-numeric: tabular-nums; }
svg image { image-rendering: pixelated; }
svg .end { text-anchor: end; }
svg .row { font-size: 10px; }
svg .centre { text-anchor: middle; }
svg .mid { dominant-baseline: central; }
svg .soft { fill: var(--soft); font-size: 11px; }
svg .grid { stroke: var(--line); stroke-width: 1; }
svg .span { stroke: var(--soft); stroke-width: 2; }
svg .mark { stroke: var(--ink); stroke-width: 2; }
svg .dot { stroke: var(--ink); stroke-width: 1; }
svg .bar { fill: var(--bar); }
svg .field { fill: transparent; stroke: var(--line); outline-offset: 2px; }
svg .cursor { fill: none; stroke: var(--ink); stroke-width: 2; pointer-events: none; }
.legend { display: block; width: 100%; max-width: 680px; height: auto; margin: 6px 0 0 44px; }
.histogram { display: block; max-width: 100%; height: auto; }
svg.inline { display: block; width: 100%; height: 12px; }
.views > input { margin: 0 4px 8px 0; vertical-align: -1px; }
.views > label { margin-right: 16px; font-size: 0.9rem; }
.map { display: none; }
#view-0:checked ~ .map-0, #view-1:checked ~ .map-1, #view-2:checked ~ .map-2,
#view-3:checked ~ .map-3 { display: block; }
table { border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; }
th, td { padding: 3px 8px; text-align: left; border-bottom: 1px solid var(--line);
  white-space: nowrap; font-weight: 400; }
thead th { color: var(--soft); vertical-align: bottom; white-space: normal; }
.names { width: 100%; }
.names thead th:not(:first-child), .number { text-align: right; }
.number small { color: var(--soft); }
.barred { width: 16%; min-width: 90px; }
.cells td { text-align: center; border: 1px solid var(--back); padding: 2px 6px; }
.cells thead th { text-align: center; min-width: 62px; font-size: 0.8rem; }
details { margin: 4px 0 12px; font-size: 0.85rem; }
#readout { position: fixed; z-index: 1; background: var(--back); border: 1px solid var(--soft);
  padding: 6px 10px; pointer-events: none; font-size: 0.85rem; max-width: 96vw;
  box-shadow: 0 2px 10px #0005; }
#readout td { text-align: right; }
@media (max-width: 760px) { .numbers { grid-template-columns: repeat(2, 1fr); }
  .facts div { display: block; } .legend { margin-left: 0; } }
@media print { * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  main { max-width: none; padding: 0; } tr, .numbers, .findings li, h2 { break-inside: avoid; }
  h2 { break-after: avoid; } .wide { overflow: visible; } .wide > svg { min-width: 0; }
  .views > input, .views > label { display: none; } }
"""
