// Load KVAE: "latents" offers what the chosen KVAE can serve. The schema tells it for each file.

import { app } from "../../scripts/app.js";

let served = {}; // the choices, by the file's name

function isLinked(node, name) {
  return node.inputs?.some((slot) => slot.widget?.name === name && slot.link != null);
}

function offered(node, all) {
  // another node, or the node of a subgraph, may set them to anything
  if (isLinked(node, "kvae_name") || isLinked(node, "latents")) return all;
  const choices = served[node.widgets?.find((widget) => widget.name === "kvae_name")?.value];
  return Array.isArray(choices) && Array.isArray(all) ? all.filter((each) => choices.includes(each)) : all;
}

app.registerExtension({
  name: "KVAE.LoadKVAE",
  beforeRegisterNodeDef(_, definition) {
    if (definition.name === "KVAELoad") served = definition.input?.required?.latents?.[1]?.served ?? {};
  },
  nodeCreated(node) {
    const options = node.comfyClass === "KVAELoad" && node.widgets?.find((widget) => widget.name === "latents")?.options;
    if (!options) return;
    let all = options.values;
    Object.defineProperty(options, "values", {
      configurable: true,
      enumerable: true,
      get: () => offered(node, all),
      set: (values) => (all = values), // the page does so when the user presses R
    });
  },
});
