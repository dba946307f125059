/** A box of HTML at the end of a node, and the few hooks into a node that all panels share. */

const MARGIN = 4; // around a panel, in the canvas's pixels

/** An element with a class and children (elements or text). */
export function element(tag, className, ...children) {
  const made = document.createElement(tag);
  made.className = className;
  made.append(...children);
  return made;
}

/** Load the panels' style sheet once. */
export function addStyles() {
  const link = document.createElement("link");
  link.rel = "stylesheet";
  link.href = new URL("./svdquant.css", import.meta.url).href;
  document.head.append(link);
}

/**
 * Add a panel to a node. It is no input: neither the saved graph nor the prompt has it.
 * Returns a function that replaces the panel's content.
 */
export function addPanel(node, name, { minHeight = 0 } = {}) {
  const content = element("div", "svdquant-content");
  const box = element("div", "svdquant-panel", content);
  let height = minHeight;
  const widget = node.addDOMWidget(name, "svdquant", box, {
    serialize: false,
    hideOnZoom: false,
    margin: MARGIN,
    getMinHeight: () => height + 2 * MARGIN,
  });
  widget.serialize = false;

  // The content's own height is the widget's; it changes with the text, the node's width and what is unfolded.
  new ResizeObserver(() => {
    const needed = Math.max(minHeight, content.offsetHeight);
    if (!content.isConnected || needed === height || content.offsetWidth === 0) return;
    height = needed;
    fit(node);
  }).observe(content);
  return (...children) => content.replaceChildren(...children);
}

/** Give a node the height that its widgets need. */
export function fit(node) {
  node.setSize([node.size[0], node.computeSize()[1]]);
  node.setDirtyCanvas(true, true);
}

/** Call `react` after one of an object's methods ran, with the method's arguments. */
export function after(object, method, react) {
  const original = object[method];
  object[method] = function (...args) {
    const result = original?.apply(this, args);
    react(...args);
    return result;
  };
}

/** Bytes as a person reads them. */
export function size(bytes) {
  return bytes >= 1e9 ? `${(bytes / 1e9).toFixed(1)} GB` : `${(bytes / 1e6).toFixed(1)} MB`;
}

/** Seconds as a person reads them. */
export function duration(seconds) {
  if (seconds < 90) return `${Math.ceil(seconds)} s`;
  return seconds < 5400 ? `${Math.round(seconds / 60)} min` : `${(seconds / 3600).toFixed(1)} h`;
}
