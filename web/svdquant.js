/** What the SVDQuant nodes show in the browser. The graph works without: everything here is for the eye. */

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { setUpCompare } from "./compare.js";
import { setUpInspect } from "./inspect.js";
import { setUpLoader } from "./loader.js";
import { setUpLora } from "./lora.js";
import { addStyles } from "./panel.js";
import { followQuantizations, setUpQuantize } from "./quantize.js";
import { loadWords } from "./words.js";

const SET_UP = {
  SVDQuantModelLoader: setUpLoader,
  SVDQuantQuantizeCheckpoint: setUpQuantize,
  SVDQuantCalibrate: setUpQuantize,
  SVDQuantCalibrate: setUpQuantize, // the same progress, up to the calibration's end
  SVDQuantLoraApply: setUpLora,
  SVDQuantInspect: setUpInspect,
  SVDQuantCompare: setUpCompare,
};

app.registerExtension({
  name: "SVDQuant",
  async init() {
    await loadWords(app, api); // before any node is made
  },
  setup() {
    addStyles();
    followQuantizations(app, api);
  },
  nodeCreated(node) {
    SET_UP[node.comfyClass]?.(node, api);
  },
});
