/** Progress of a quantization or calibration while it runs; what came of it when it is done. */

import { addPanel, after, duration, element } from "./panel.js";
import { say } from "./words.js";

const STAGES = {
  calibrating: () => say("Calibrating"),
  copying: () => say("Copying 16-bit tensors"),
  quantizing: () => say("Quantizing"),
  finishing: () => say("Finishing the file"),
};
const panels = new WeakMap(); // node -> what its panel does with a step, and with an early end

export function setUpQuantize(node, api) {
  const show = addPanel(node, "progress");
  let stage;
  panels.set(node, {
    step(event) {
      stage = event.stage;
      show(...progress(event, api));
    },
    cancelled() {
      const lost = stage === "calibrating"; // all else is kept on the disk
      show(warning(lost ? say("Cancelled.") : say("Cancelled. The same again goes on where this stopped.")));
    },
    failed: () => show(warning(say("Failed: the error says why."))),
  });
  after(node, "onExecuted", (output) => {
    if (output?.text) show(element("div", "svdquant-title", output.text[0]), ...errors(output.svdquant_layers ?? []));
  });
}

/** Pass the server's events on to the node that each speaks of. */
export function followQuantizations(app, api) {
  const panel = (id) => panels.get(nodeById(app, id));
  api.addEventListener("svdquant.progress", ({ detail }) => panel(detail.node)?.step(detail));
  api.addEventListener("execution_interrupted", ({ detail }) => panel(detail.node_id)?.cancelled());
  api.addEventListener("execution_error", ({ detail }) => panel(detail.node_id)?.failed());
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

function warning(text) {
  return element("div", "svdquant-warning", text);
}

function progress(event, api) {
  const fill = element("div", "svdquant-fill");
  fill.style.width = `${(100 * event.done) / event.total}%`;
  const facts = [`${event.done} / ${event.total}`];
  if (event.seconds_left !== null) {
    facts.push(say("about {time} left in this stage", { time: duration(event.seconds_left) }));
  }
  if (event.error !== null) facts.push(say("mean error {error}", { error: event.error.toFixed(4) }));
  const cancel = element("button", "svdquant-button", say("Cancel"));
  cancel.onclick = () => api.fetchApi("/interrupt", { method: "POST" });
  return [
    element("div", "svdquant-title", STAGES[event.stage]()),
    element("div", "svdquant-name", event.step || "\u00a0"),
    element("div", "svdquant-bar", fill),
    element("div", "svdquant-row", element("span", "svdquant-grow", facts.join(" · ")), cancel),
  ];
}

function errors(layers) {
  if (!layers.length) return [];
  const largest = Math.max(...layers.map((layer) => layer.error), Number.MIN_VALUE);
  const rows = layers.map(({ name, error }) => {
    const fill = element("div", "svdquant-fill");
    fill.style.width = `${(100 * error) / largest}%`;
    const label = element("span", "svdquant-name", name);
    label.title = name;
    return element("div", "svdquant-layer", label, element("div", "svdquant-bar", fill), error.toFixed(4));
  });
  return [
    element("div", "", say("relative error per layer")),
    element("div", "svdquant-chart", ...rows),
  ];
}
