// KVAE Decode to Video shows pictures while it decodes. ComfyUI's page goes on to show the last of them in place of the
// video that is there in the end, until the node runs again: no node of its own has both.

import { app } from "../../scripts/app.js";

function forgetPictures(node) {
  const graph = node.graph;
  const key = graph === app.graph || graph.isRootGraph ? `${node.id}` : `${graph.id}:${node.id}`;
  const page = document.getElementById("vue-app")?.__vue_app__;
  const stores = page?.config.globalProperties.$pinia?._s;
  stores?.get("nodeOutput")?.revokePreviewsByLocatorId?.(key);
  delete app.nodePreviewImages?.[key]; // where older pages keep them
  const picture = node.widgets?.find((widget) => widget.name === "$$canvas-image-preview");
  if (picture) node.removeWidget(picture);
  node.imgs = undefined;
}

app.registerExtension({
  name: "KVAE.DecodeToVideo",
  nodeCreated(node) {
    if (node.comfyClass !== "KVAEDecodeToVideo") return;
    const shown = node.onExecuted;
    node.onExecuted = function (output) {
      shown?.call(this, output);
      forgetPictures(this);
      this.previewMediaType = "video"; // ComfyUI 0.8.0 knows it only from a video input
    };
  },
});
