/** The quantizer's progress while it runs, and the layers' errors when it is done. */

import { addPanel, after, duration, element } from "./panel.js";

const STAGES = {
  calibrating: "Calibrating",
  copying: "Copying 16-bit tensors",
  quantizing: "Quantizing",
  finishing: "Finishing the file",
};
const panels = new WeakMap(); // node -> function that fills its panel

export function setUpQuantize(node, api) {
  const show = addPanel(node, "progress");
  panels.set(node, (event) => show(...progress(event, api)));
  after(node, "onExecuted", (output) => {
    if (output?.svdquant_layers) show(...result(output));
  });
}

/** Pass the server's events on to the node that each speaks of. */
export function followQuantizations(app, api) {
  api.addEventListener("svdquant.progress", ({ detail }) => {
    panels.get(nodeById(app, detail.node))?.(detail);
  });
  for (const [type, message] of [
    ["execution_interrupted", "Cancelled. Nothing was written."],
    ["execution_error", "Failed: the error says why."],
  ]) {
    api.addEventListener(type, ({ detail }) => {
      panels.get(nodeById(app, detail.node_id))?.({ message });
    });
  }
}

/** The node of an execution id; one inside subgraphs is a path: "5:12". */
function nodeById(app, id) {
  let node;
  for (const part of String(id).split(":")) {
    const graph = node ? node.subgraph : app.graph.rootGraph ?? app.graph;
    node = graph?.getNodeById(Number(part)) ?? undefined;
    if (!node) return undefined;
  }
  return node;
}

function progress(event, api) {
  if (event.message) return [element("div", "svdquant-warning", event.message)];
  const fill = element("div", "svdquant-fill");
  fill.style.width = `${(100 * event.done) / event.total}%`;
  const facts = [`${event.done} / ${event.total}`];
  if (event.seconds_left !== null) facts.push(`about ${duration(event.seconds_left)} left in this stage`);
  if (event.error !== null) facts.push(`mean error ${event.error.toFixed(4)}`);
  const cancel = element("button", "svdquant-button", "Cancel");
  cancel.onclick = () => api.fetchApi("/interrupt", { method: "POST" });
  return [
    element("div", "svdquant-title", STAGES[event.stage]),
    element("div", "svdquant-name", event.step || "\u00a0"),
    element("div", "svdquant-bar", fill),
    element("div", "svdquant-row", element("span", "svdquant-grow", facts.join(" · ")), cancel),
  ];
}

function result(output) {
  const layers = output.svdquant_layers;
  const largest = Math.max(...layers.map((layer) => layer.error), Number.MIN_VALUE);
  const rows = layers.map(({ name, error }) => {
    const fill = element("div", "svdquant-fill");
    fill.style.width = `${(100 * error) / largest}%`;
    const label = element("span", "svdquant-name", name);
    label.title = name;
    return element("div", "svdquant-layer", label, element("div", "svdquant-bar", fill), error.toFixed(4));
  });
  return [
    element("div", "svdquant-title", output.text[0]),
    element("div", "", "relative error per layer"),
    element("div", "svdquant-chart", ...rows),
  ];
}
