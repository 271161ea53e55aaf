"""The page's script: tells the figures of the cell under the pointer. All else works without it."""

from __future__ import annotations

HOVER = """
"use strict";
(() => {
  const source = document.getElementById("cells");
  if (!source) return;
  const { layers, matrices, cells } = JSON.parse(source.textContent);
  const readout = document.getElementById("readout");
  const experts = cells[matrices[0]].sqnr[0].length;
  const element = (name, text) => {
    const made = document.createElement(name);
    made.textContent = text;
    return made;
  };
  const line = (layer, expert, name) => {
    const row = document.createElement("tr");
    const at = (key) => cells[name][key][layer][expert];
    const sqnr = at("sqnr");
    row.append(element("th", name));
    if (sqnr === null) {
      row.append(element("td", "not requantised"));
      return row;
    }
    const shown = typeof sqnr === "number" ? (sqnr / 100).toFixed(2) + " dB" : sqnr;
    for (const text of [shown, at("largest"), at("saturated").toLocaleString("en"),
                        at("flushed").toLocaleString("en"), at("exact") + "%"])
      row.append(element("td", text));
    return row;
  };
  const show = (field, layer, expert, x, y) => {
    const box = field.getBBox(), cursor = field.nextElementSibling;
    const wide = box.width / experts, tall = box.height / layers.length;
    cursor.setAttribute("x", box.x + expert * wide);
    cursor.setAttribute("y", box.y + layer * tall);
    cursor.setAttribute("visibility", "visible");
    const table = document.createElement("table"), head = document.createElement("tr");
    for (const name of ["", "SQNR", "largest error", "saturated", "flushed", "exact blocks"])
      head.append(element("th", name));
    table.append(head, ...matrices.map((name) => line(layer, expert, name)));
    readout.replaceChildren(element("b", layers[layer] + " expert " + expert), table);
    readout.hidden = false;
    const room = document.documentElement.clientWidth - readout.offsetWidth - 8;
    const below = y + 18 + readout.offsetHeight < innerHeight;
    readout.style.left = Math.max(4, Math.min(x + 14, room)) + "px";
    readout.style.top = (below ? y + 18 : Math.max(4, y - 18 - readout.offsetHeight)) + "px";
  };
  const clamp = (value, count) => Math.max(0, Math.min(count - 1, value));
  for (const field of document.querySelectorAll("rect.field")) {
    let layer = 0, expert = 0;
    const hide = () => {
      readout.hidden = true;
      field.nextElementSibling.setAttribute("visibility", "hidden");
    };
    const focused = () => {
      const box = field.getBoundingClientRect();
      show(field, layer, expert, box.left + (expert + 0.5) * box.width / experts,
           box.top + (layer + 1) * box.height / layers.length);
    };
    field.addEventListener("pointermove", (event) => {
      const box = field.getBoundingClientRect();
      layer = clamp(Math.floor((event.clientY - box.top) / box.height * layers.length),
                    layers.length);
      expert = clamp(Math.floor((event.clientX - box.left) / box.width * experts), experts);
      show(field, layer, expert, event.clientX, event.clientY);
    });
    field.addEventListener("pointerleave", hide);
    field.addEventListener("blur", hide);
    field.addEventListener("focus", () => { if (field.matches(":focus-visible")) focused(); });
    field.addEventListener("keydown", (event) => {
      const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
      if (event.key === "Escape") return hide();
      if (!(event.key in step)) return;
      event.preventDefault();
      layer = clamp(layer + step[event.key][0], layers.length);
      expert = clamp(expert + step[event.key][1], experts);
      focused();
    });
  }
})();
"""
