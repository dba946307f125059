/** The loader's badge: what the chosen file is, and how it will do on this machine, before it is loaded. */

import { addPanel, after, element, size } from "./panel.js";
import { say } from "./words.js";

export function setUpLoader(node, api) {
  const file = node.widgets.find((widget) => widget.name === "model_name");
  const show = addPanel(node, "badge");
  let latest = 0;

  async function update() {
    const request = ++latest;
    const badge = await ask(api, file);
    if (request === latest) show(...lines(badge)); // an older answer may come later
  }

  after(file, "callback", update);
  after(node, "onConfigure", update); // a graph was loaded
  update();
}

async function ask(api, file) {
  if (!file.value) return { error: say("There is no model in models/diffusion_models.") };
  if (!file.options.values.includes(file.value)) {
    return { error: say("{file} is not in models/diffusion_models.", { file: file.value }) };
  }
  try {
    const response = await api.fetchApi(`/svdquant/model?name=${encodeURIComponent(file.value)}`);
    return await response.json();
  } catch (error) {
    return { error: say("The server does not answer: {why}", { why: error.message }) };
  }
}

function lines(badge) {
  if (badge.error) return [element("div", "svdquant-error", badge.error)];
  const formats = Object.entries(badge.formats).map(([format, layers]) =>
    say("{format} ({layers} layers)", { format, layers }),
  );
  const ranks = badge.ranks.at(0) === badge.ranks.at(-1) ? badge.ranks[0] : `${badge.ranks[0]}-${badge.ranks.at(-1)}`;
  const facts = [badge.family, ...formats];
  if (badge.quantized) facts.push(say("rank {rank}", { rank: ranks }));
  if (badge.recipe) facts.push(badge.recipe);
  const memory = say("file {file}; needs about {needed}, free {free} of {total} ({device})", {
    file: size(badge.file_bytes),
    needed: size(badge.needed_bytes),
    free: size(badge.free_bytes),
    total: size(badge.total_bytes),
    device: badge.device,
  });
  const rows = [element("div", "svdquant-title", facts.join(" · ")), element("div", "", memory)];
  if (badge.quantized) rows.push(element("div", "", say("kernels: {kernels}", badge)));
  return [...rows, ...badge.warnings.map((warning) => element("div", "svdquant-warning", say(warning)))];
}
