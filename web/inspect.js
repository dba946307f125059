/** The table of Inspect, in the node. */

import { addPanel, after, element } from "./panel.js";

export function setUpInspect(node) {
  const show = addPanel(node, "table");
  after(node, "onExecuted", (output) => {
    if (output?.text) show(element("pre", "svdquant-table", output.text[0]));
  });
}
