// An attribution graph as the page holds it: links of each node, names, what is in view, and the subgraph of pinned nodes.
import { MINUS, short, visible } from "./format.js";

export function graphModel(data) {
  const { nodes, edges } = data, n = nodes.id.length;
  const places = new Map(nodes.id.map((id, i) => [id, i]));
  const inputs = Array.from({ length: n }, () => []), outputs = Array.from({ length: n }, () => []);
  const sums = new Float64Array(n);
  edges.source.forEach((source, e) => {  // the strongest first, as the edges are sorted by their shares
    inputs[edges.target[e]].push(e);
    outputs[source].push(e);
    sums[edges.target[e]] += Math.abs(edges.weight[e]);
  });
  // The share of a link in all that leads into its target.
  const part = e => (sums[edges.target[e]] ? Math.abs(edges.weight[e]) / sums[edges.target[e]] : 0);
  return { ...data, n, places, inputs, outputs, part, twins: i => twinsOf(nodes, i) };
}

// Nodes of the same feature with codes of the same sign, which have one name.
function twinsOf(nodes, i) {
  if (nodes.kind[i] !== "feature") return [i];
  const key = j => `${nodes.kind[j]} ${nodes.source[j]} ${nodes.feature[j]} ${nodes.activation[j] < 0}`;
  return nodes.id.map((_, j) => j).filter(j => key(j) === key(i));
}

export function placeOf(model, i) {
  const { kind, layer, source } = model.nodes;
  if (kind[i] === "embedding") return "embedding";
  if (kind[i] === "logit") return "logit";
  if (layer[i] < 0) return "outside of the layers";
  return `layer ${layer[i]}${source[i] < 0 ? "" : `, ${model.parts[source[i]]}`}`;
}

export function nameOf(model, labels, i) {
  const { kind, text, feature, position, source } = model.nodes;
  if (labels.has(i)) return labels.get(i);
  if (kind[i] === "embedding") return visible(text[i]);
  if (kind[i] === "logit") return visible(text[i]);
  if (kind[i] === "bias" && source[i] < 0) return "biases of the model";
  if (kind[i] === "error") return `error at ${visible(model.tokens[position[i]])}`;
  if (kind[i] === "bias") return `bias at ${visible(model.tokens[position[i]])}`;
  return text[i] || `feature ${feature[i]}`;
}

export function describeNode(model, labels, i) {
  const { kind, activation, position } = model.nodes, name = nameOf(model, labels, i);
  const token = `token ${position[i]} ${visible(model.tokens[position[i]])}`;
  if (kind[i] === "embedding") return `embedding ${name}, ${token}`;
  if (kind[i] === "logit") return `logit ${name}, probability ${short(activation[i])}`;
  const code = kind[i] === "feature" && activation[i] !== null ? `, code ${short(activation[i])}` : "";
  return `${name}, ${placeOf(model, i)}, ${token}${code}`;
}

// Nodes up to a share of influence; embeddings, logits, and what a reader has chosen, always.
export function nodesInView(model, state) {
  const kept = new Uint8Array(model.n), { kind, share } = model.nodes;
  for (let i = 0; i < model.n; i++) kept[i] = kind[i] === "embedding" || kind[i] === "logit" || share[i] === null || share[i] <= state.node;
  for (const i of chosen(state)) kept[i] = 1;
  return kept;
}

function chosen(state) {
  return [...state.pinned, ...state.supernodes.flatMap(([, nodes]) => nodes), ...(state.clicked === null ? [] : [state.clicked])];
}

// Edges in view, the strongest first.
export function edgesInView(model, state, kept) {
  const { source, target } = model.edges, found = [];
  const n = model.counts[Math.round(100 * state.edge)];
  for (let e = 0; e < n; e++) if (kept[source[e]] && kept[target[e]]) found.push(e);
  return found;
}

// Nodes whose name, token, feature or id has every word of the text.
export function searchNodes(model, labels, text) {
  const words = text.toLowerCase().split(/\s+/).filter(Boolean), { id, feature, kind } = model.nodes;
  if (!words.length) return [];
  return id.map((_, i) => i).filter(i => {
    const said = `${describeNode(model, labels, i)} ${id[i]} ${kind[i]} ${feature[i]}`.toLowerCase();
    return words.every(word => said.includes(word));
  });
}

// Boxes of the subgraph: each supernode, and each pinned node that is in none; with the sums of the edges between them.
export function subgraphOf(model, state) {
  const grouped = new Set(state.supernodes.flatMap(([, nodes]) => nodes));
  const boxes = [
    ...state.supernodes.map(([name, nodes], group) => ({ name, nodes, group })),
    ...state.pinned.filter(i => !grouped.has(i)).map(i => ({ name: nameOf(model, state.labels, i), nodes: [i], group: null })),
  ];
  const boxOf = new Map(boxes.flatMap((box, b) => box.nodes.map(i => [i, b])));
  const sums = new Map();
  for (const [i, b] of boxOf) for (const e of model.outputs[i]) {
    const to = boxOf.get(model.edges.target[e]);
    if (to === undefined || to === b) continue;
    const key = b * boxes.length + to;
    sums.set(key, (sums.get(key) ?? 0) + model.edges.weight[e]);
  }
  const links = [...sums].map(([key, weight]) => ({ from: Math.floor(key / boxes.length), to: key % boxes.length, weight }));
  return { boxes, links: links.sort((a, b) => Math.abs(b.weight) - Math.abs(a.weight)) };
}

export function weightText(weight) {
  return (weight < 0 ? MINUS : "+") + short(Math.abs(weight));
}
