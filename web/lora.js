/** The rows of LoRA Apply: one more than is filled, each with its switch, its place and what matched. */

import { addPanel, after, element, fit } from "./panel.js";
import { say } from "./words.js";

const NONE = "None"; // what an empty row's file name is

export function setUpLora(node) {
  const rows = rowsOf(node);
  const show = addPanel(node, "rows");
  let matches = new Map(); // file name -> what the last run said of it

  const update = () => {
    const last = rows.findLastIndex(isFilled) + 1; // an empty row between filled ones stays where the user left it
    rows.forEach((row, index) => hide(row, index > last));
    const lines = rows.slice(0, last).map((row, index) => line(row, index));
    show(...lines);
    fit(node);
  };

  function line(row, index) {
    const on = element("input", "");
    on.type = "checkbox";
    on.title = say("Whether this LoRA acts");
    on.checked = row.on?.value ?? true;
    on.disabled = !row.on;
    on.onchange = () => set(row.on, on.checked);
    const name = element("span", "svdquant-name svdquant-grow", isFilled(row) ? row.name.value : say("(empty)"));
    name.title = row.name.value;
    const match = matches.get(row.name.value);
    const found = element("span", match?.message ? "svdquant-warning" : "", match ? matched(match) : "");
    found.title = match?.message ?? "";
    return element("div", "svdquant-row svdquant-lora", on, name, found, ...moves(index));
  }

  function moves(index) {
    return [
      ["▲", -1],
      ["▼", 1],
    ].map(([sign, step]) => {
      const button = element("button", "svdquant-button", sign);
      button.title = step < 0 ? say("Move up") : say("Move down");
      const other = rows[index + step];
      button.disabled = !other || !isFilled(other) || !isFilled(rows[index]); // an empty row is filled, not moved
      button.onclick = () => swap(rows[index], other);
      return button;
    });
  }

  function swap(one, other) {
    for (const key of ["name", "strength", "on"]) {
      if (!one[key] || !other[key]) continue;
      const value = one[key].value;
      set(one[key], other[key].value);
      set(other[key], value);
    }
  }

  for (const row of rows) {
    for (const widget of Object.values(row)) if (widget) after(widget, "callback", update);
  }
  after(node, "onConfigure", update); // a graph was loaded
  after(node, "onExecuted", (output) => {
    if (!output?.svdquant_lora) return;
    matches = new Map(output.svdquant_lora.map((match) => [match.name, match]));
    update();
  });
  update();
}

/** The node's rows: {name, strength, on}, the widgets lora_name, lora_name_2, ... */
function rowsOf(node) {
  const find = (name) => node.widgets.find((widget) => widget.name === name);
  return node.widgets
    .map((widget) => /^lora_name(_\d+)?$/.exec(widget.name))
    .filter(Boolean)
    .map(([, suffix = ""]) => ({
      name: find(`lora_name${suffix}`),
      strength: find(`strength${suffix}`),
      on: find(`on${suffix}`),
    }));
}

function isFilled(row) {
  return Boolean(row.name.value) && row.name.value !== NONE;
}

function hide(row, hidden) {
  for (const widget of [row.name, row.strength]) setHidden(widget, hidden);
  if (row.on) setHidden(row.on, true); // the panel has its switch
}

function setHidden(widget, hidden) {
  if (!widget) return;
  widget.hidden = hidden; // the canvas looks here
  widget.options.hidden = hidden; // Vue nodes look there
  if (hidden) widget.computeSize = () => [0, -4]; // older canvases keep its room, a row's height and a gap of 4
  else delete widget.computeSize;
}

function set(widget, value) {
  widget.value = value;
  widget.callback?.(value);
}

function matched(match) {
  if (match.message) return match.message;
  return say("{matched} of {total} keys · rank {rank}", match);
}
