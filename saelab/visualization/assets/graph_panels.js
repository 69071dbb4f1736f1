// Beside the graph: the links of the clicked node, its name, the search, and groups to be made.
import { html, useEffect, useState } from "./vendor/htm-preact-standalone.js";
import { count, percent, short, visible } from "./format.js";
import { describeNode, nameOf, placeOf, searchNodes, weightText } from "./graph_model.js";
import { Shape, shapeOf } from "./graph_view.js";

const SHOWN = matchMedia("(max-width: 60rem)").matches ? 12 : 60;

export function NodePanel({ model, state, selected, act }) {
  const i = state.clicked;
  if (i === null) return html`<section class="panel"><h2>Node</h2>
    <p class="soft">Press a node to list its inputs and outputs.</p></section>`;
  const { kind, position, feature, activation, value, share, source } = model.nodes;
  const facts = {
    place: placeOf(model, i),
    token: `${position[i]}: ${visible(model.tokens[position[i]])}`,
    ...(kind[i] === "feature" && { feature: `${feature[i]} of ${model.dictionaries[source[i]]}`, code: short(activation[i]), "pre-activation": short(value[i]) }),
    ...(kind[i] === "logit" && { probability: short(activation[i]), "logit less mean": short(value[i]) }),
    ...(share[i] !== null && kind[i] !== "logit" && { "influence up to": percent(share[i]) }),
  };
  const windows = model.windows[`${source[i]}:${feature[i]}:${activation[i] < 0 ? -1 : 1}`] ?? [];
  return html`<section class="panel" aria-label="Node"><h2><${Shape} path=${shapeOf(model, i)} kind=${kind[i]} /> ${nameOf(model, state.labels, i)}</h2>
    <dl>${Object.entries(facts).map(([name, text]) => html`<dt>${name}</dt><dd>${text}</dd>`)}</dl>
    ${windows.length > 0 && html`<ol class="windows">${windows.map(([before, center, after]) =>
      html`<li>${visible(before)}<b>${visible(center)}</b>${visible(after)}</li>`)}</ol>`}
    <div class="tools"><button aria-pressed=${state.pinned.includes(i)} onClick=${() => act.pin(i)}>${state.pinned.includes(i) ? "Unpin" : "Pin"}</button>
      <button aria-pressed=${selected.includes(i)} onClick=${() => act.select(i)}>${selected.includes(i) ? "Unselect" : "Select"}</button>
      <${NameField} key=${i} text=${state.labels.get(i) ?? model.nodes.text[i]} onName=${text => act.name(i, text)} /></div>
    <${LinkList} title="Inputs" links=${model.inputs[i]} end="source" ...${{ model, state, act }} />
    <${LinkList} title="Outputs" links=${model.outputs[i]} end="target" ...${{ model, state, act }} /></section>`;
}

function NameField({ text, onName }) {
  return html`<label class="name">Name <input value=${text} maxlength="200" onChange=${event => onName(event.target.value.trim())} /></label>`;
}

function LinkList({ title, links, end, model, state, act }) {
  const [limit, setLimit] = useState(SHOWN);
  useEffect(() => setLimit(SHOWN), [links]);
  const { weight } = model.edges, ends = model.edges[end];
  const sorted = [...links].sort((a, b) => Math.abs(weight[b]) - Math.abs(weight[a])), top = sorted.length ? Math.abs(weight[sorted[0]]) : 1;
  return html`<h3>${title} <span class="soft small">${count(links.length)}</span></h3>
    <ol class="ends">${sorted.slice(0, limit).map(e => html`<li key=${e}><button data-end=${ends[e]} title=${describeNode(model, state.labels, ends[e])}
      onClick=${() => act.click(ends[e])} onPointerEnter=${() => act.hover(ends[e])} onPointerLeave=${() => act.hover(null)}
      onFocus=${() => act.hover(ends[e])} onBlur=${() => act.hover(null)}>
      <${Shape} path=${shapeOf(model, ends[e])} kind=${model.nodes.kind[ends[e]]} />
      <span class="said">${nameOf(model, state.labels, ends[e])}</span>
      <span class="soft small where">${whereOf(model, ends[e])}</span>
      <span class="value">${weightText(weight[e])}</span>
      <span class="bar"><i class=${weight[e] < 0 ? "minus" : "plus"} style=${{ width: `${100 * Math.abs(weight[e]) / top}%` }} /></span></button></li>`)}</ol>
    ${limit < sorted.length && html`<button class="more" onClick=${() => setLimit(Infinity)}>Show all ${count(sorted.length)}</button>`}`;
}

function whereOf(model, i) {
  const { kind, layer, position } = model.nodes;
  return `${kind[i] === "embedding" ? "E" : kind[i] === "logit" ? "out" : `L${layer[i]}`}\u00b7${position[i]}`;
}

export function Search({ model, state, found, act, field }) {
  const shown = searchNodes(model, state.labels, state.q).slice(0, SHOWN);
  return html`<div class="search"><input type="search" ref=${field} placeholder="Search names, tokens, features" aria-label="Search" value=${state.q}
      onInput=${event => act.search(event.target.value)} />
    ${state.q.trim() && html`<p class="soft small">${count(found.size)} of ${count(model.n)} nodes</p>
      <ol class="ends">${shown.map(i => html`<li key=${i}><button data-end=${i} onClick=${() => act.click(i)} onPointerEnter=${() => act.hover(i)}
        onPointerLeave=${() => act.hover(null)} onFocus=${() => act.hover(i)} onBlur=${() => act.hover(null)}>
        <${Shape} path=${shapeOf(model, i)} kind=${model.nodes.kind[i]} /><span class="said">${nameOf(model, state.labels, i)}</span>
        <span class="soft small where">${whereOf(model, i)}</span></button></li>`)}</ol>`}</div>`;
}

// Nodes that are selected, to be pinned or made a group.
export function Selection({ model, state, selected, act }) {
  const [name, setName] = useState("");
  if (!selected.length) return null;
  const make = event => {
    event.preventDefault();
    act.group(name.trim() || nameOf(model, state.labels, selected[0]), selected);
    setName("");
  };
  return html`<form class="tools selection" onSubmit=${make}><span>${count(selected.length)} selected</span>
    <input value=${name} maxlength="100" placeholder="Name of the group" aria-label="Name of the group" onInput=${event => setName(event.target.value)} />
    <button>Group</button><button type="button" onClick=${() => act.pinAll(selected)}>Pin</button>
    <button type="button" onClick=${() => act.select(null)}>Clear</button></form>`;
}
