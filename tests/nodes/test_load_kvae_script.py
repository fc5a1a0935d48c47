"""web/load_kvae.js: the list of "latents" follows the KVAE that the node shows. It runs in Node.js, on a small page."""

import json
import shutil
import subprocess

import pytest

from conftest import ROOT

ALL = ["one", "two", "own"]
SERVED = {"a.safetensors": ["one", "own"], "b.safetensors": ALL}
PAGE = """
import { extension } from "./scripts/app.js";
import "./extensions/kvae/load_kvae.js";

const definition = JSON.parse(process.argv[2]);
const steps = JSON.parse(process.argv[3]);
if (definition) extension.beforeRegisterNodeDef(class {}, definition);
const names = ["kvae_name", "latents"];
const node = {
  comfyClass: "KVAELoad",
  widgets: names.map((name) => ({ name, options: { values: JSON.parse(process.argv[4]) } })),
  inputs: names.map((name) => ({ name, widget: { name }, link: null })),
};
extension.nodeCreated(node);
extension.nodeCreated({ comfyClass: "Other" }); // nothing happens to other nodes, or to one without widgets
extension.nodeCreated({ comfyClass: "KVAELoad" });
const [kvae, latents] = node.widgets;
const shown = steps.map((step) => {
  if ("kvae" in step) kvae.value = step.kvae;
  if ("link" in step) node.inputs[step.link].link = 1;
  if ("values" in step) latents.options.values = step.values;
  return latents.options.values;
});
console.log(JSON.stringify(shown));
"""


@pytest.fixture
def offered(tmp_path):
    """What "latents" offers after each step, in a page whose schema of Load KVAE has these settings."""
    node = shutil.which("node")
    if not node:
        pytest.skip("needs Node.js")
    for folder in ("scripts", "extensions/kvae"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "package.json").write_text('{"type": "module"}')
    (tmp_path / "scripts" / "app.js").write_text(
        "export let extension;\nexport const app = { registerExtension: (it) => (extension = it) };"
    )
    shutil.copy(ROOT / "web" / "load_kvae.js", tmp_path / "extensions" / "kvae")
    (tmp_path / "page.js").write_text(PAGE)

    def offered(settings, *steps, values=ALL):
        definition = settings and {"name": "KVAELoad", "input": {"required": {"latents": ["COMBO", settings]}}}
        arguments = [json.dumps(each) for each in (definition, steps, values)]
        out = subprocess.run([node, tmp_path / "page.js", *arguments], capture_output=True, text=True)
        assert out.returncode == 0, out.stderr
        return json.loads(out.stdout)

    return offered


def test_the_list_follows_the_file(offered):
    steps = [{"kvae": "a.safetensors"}, {"kvae": "b.safetensors"}, {"kvae": "a.safetensors"}, {"kvae": "other"}]
    assert offered({"served": SERVED}, *steps) == [SERVED["a.safetensors"], ALL, SERVED["a.safetensors"], ALL]


@pytest.mark.parametrize("slot", [0, 1])
def test_a_linked_setting_may_be_anything(offered, slot):
    assert offered({"served": SERVED}, {"kvae": "a.safetensors"}, {"link": slot})[1] == ALL


def test_r_gives_a_new_list(offered):
    steps = [{"kvae": "a.safetensors"}, {"values": ["own", "new"]}, {"kvae": "b.safetensors"}]
    assert offered({"served": SERVED}, *steps)[1:] == [["own"], ["own"]]


@pytest.mark.parametrize("settings", [None, {}, {"served": None}, {"served": {"a.safetensors": None}}])
def test_without_the_schema_the_whole_list_is_offered(offered, settings):
    assert offered(settings, {}, {"kvae": "a.safetensors"}) == [ALL, ALL]
