/** Two images under a slider. */

import { addPanel, after, element } from "./panel.js";
import { say } from "./words.js";

export function setUpCompare(node, api) {
  const show = addPanel(node, "slider");
  after(node, "onExecuted", (output) => {
    if (!output?.svdquant_reference) return;
    const pairs = output.svdquant_image.map((image, index) => [
      output.svdquant_reference[index] ?? output.svdquant_reference[0], // one reference serves many images
      image,
    ]);
    show(...pairs.map(([reference, image]) => slider(url(api, reference), url(api, image))), numbers(output.text[0]));
  });
}

function url(api, file) {
  const query = new URLSearchParams({ filename: file.filename, subfolder: file.subfolder, type: file.type });
  return api.apiURL(`/view?${query}`);
}

function slider(reference, image) {
  const [below, above] = [reference, image].map((source) => {
    const picture = element("img", "");
    picture.src = source;
    picture.draggable = false;
    return picture;
  });
  below.alt = say("reference");
  above.alt = say("image");
  above.className = "svdquant-above";
  const position = element("input", "svdquant-position");
  position.type = "range";
  position.min = 0;
  position.max = 100;
  position.step = 0.5;
  position.value = 50;
  position.title = say("Left: reference. Right: image.");
  const line = element("div", "svdquant-line");
  const move = () => {
    above.style.clipPath = `inset(0 0 0 ${position.value}%)`;
    line.style.left = `${position.value}%`;
  };
  position.oninput = move;
  move();
  const labels = [below.alt, above.alt].map((text) => element("span", "svdquant-label", text));
  return element("div", "svdquant-slider", below, above, line, ...labels, position);
}

function numbers(text) {
  const [values, ...notes] = text.split("\n");
  return element("div", "", element("div", "svdquant-title", values), ...notes.map((note) => element("div", "", note)));
}
