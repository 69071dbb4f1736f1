#!/bin/sh
# circuit-tracer 0.5.0: in the graph files that it writes, the error of layer L has the id 0_L_position, and so has latent
# L of layer 0 at the same token. Links name nodes by id, so that links out of the two cannot be told apart: its page
# (attribution_graph/util-cg.js, `py_node_id_to_node[d.node_id] = d`) gives all of them to the node that comes last in
# the file, the error. With 26 layers the first 26 latents of layer 0 are concerned. Nothing is said.
#
# Seen: "latent 3 of layer 0: 0_3_5, error of layer 3: 0_3_5; 2 nodes, 1 id". Exits 1 if that changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q pydantic==2.12.5 > /dev/null 2>&1
"$folder/env/bin/pip" install -q --no-deps circuit-tracer==0.5.0 > /dev/null 2>&1
cd "$folder"
env/bin/python - <<'PYTHON'
import sys

from circuit_tracer.frontend.graph_models import Metadata, Model, Node, QParams

nodes = [Node.feature_node(layer=0, pos=5, feat_idx=3, activation=1.5), Node.error_node(layer=3, pos=5)]
links = [{"source": node.node_id, "target": "9_7_5", "weight": weight} for node, weight in zip(nodes, (0.25, -4.0))]
model = Model(
    metadata=Metadata(slug="a", scan="b", transcoder_list=[], prompt_tokens=list("abcdef"), prompt="abcdef"),
    qParams=QParams(pinnedIds=[], supernodes=[], linkType="both", clickedId="", sg_pos=""),
    nodes=nodes,
    links=links,
)
ids = [node["node_id"] for node in model.model_dump()["nodes"]]
same = model.model_dump()["links"][0]["source"] == model.model_dump()["links"][1]["source"]
print(f"latent 3 of layer 0: {ids[0]}, error of layer 3: {ids[1]}; {len(ids)} nodes, {len(set(ids))} id")
sys.exit(not (ids[0] == ids[1] == "0_3_5" and same))
PYTHON
