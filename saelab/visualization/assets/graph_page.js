// The page of an attribution graph. Its whole state is in its address; nothing is fetched or sent.
import { html, render, useEffect, useMemo, useRef, useState } from "./vendor/htm-preact-standalone.js";
import { count, percent } from "./format.js";
import { useKeys } from "./loading.js";
import { edgesInView, graphModel, nodesInView, searchNodes } from "./graph_model.js";
import { NodePanel, Search, Selection } from "./graph_panels.js";
import { emptyState, grouped, readHash, readParams, toggled, writeHash, writeParams } from "./graph_state.js";
import { Subgraph } from "./graph_subgraph.js";
import { LinkGraph, MOST_DRAWN, Shape } from "./graph_view.js";

const model = graphModel(JSON.parse(document.getElementById("data").textContent));
const base = readParams(model, model.params, { ...emptyState(), clicked: null });
const LEGEND = [
  ["embedding", "M-4.6,-4.6H4.6V4.6H-4.6Z", "token, logit"], ["feature", "M5,0A5,5 0 1 1 -5,0A5,5 0 1 1 5,0Z", "feature"],
  ["feature", "M5,0A5,5 0 1 1 -5,0A5,5 0 1 1 5,0ZM-2.6,0H2.6", "negative code"], ["feature", "M0,-6L5.8,4.6H-5.8Z", "feature of attention"],
  ["error", "M0,-5.6L5.6,0L0,5.6L-5.6,0Z", "error"], ["bias", "M-4.5,0H4.5M0,-4.5V4.5", "bias"],
];

function Page() {
  const [state, setState] = useState(() => readHash(model, location.hash, base));
  const [selected, setSelected] = useState([]), [selecting, setSelecting] = useState(false), [hovered, hover] = useState(null), [fault, setFault] = useState("");
  const field = useRef(null);
  useEffect(() => {
    const read = () => setState(readHash(model, location.hash, base));
    addEventListener("popstate", read);
    addEventListener("hashchange", read);
    return () => { removeEventListener("popstate", read); removeEventListener("hashchange", read); };
  }, []);
  const change = (changes, entry = false) => setState(old => {
    const next = { ...old, ...changes }, address = writeHash(model, next, base);
    if (address !== (location.hash || "#")) history[entry ? "pushState" : "replaceState"](null, "", address);
    return next;
  });
  const select = i => setSelected(old => (i === null ? [] : toggled(old, i)));
  const act = {
    hover, select,
    click: i => (selecting && i !== null ? select(i) : i !== state.clicked && change({ clicked: i }, true)),
    pin: i => change({ pinned: toggled(state.pinned, i), supernodes: without(state, i), positions: "" }),
    pinAll: nodes => { change({ pinned: [...new Set([...state.pinned, ...nodes])], positions: "" }); select(null); },
    name: (i, text) => {
      const labels = new Map(state.labels);
      for (const j of model.twins(i)) text && text !== model.nodes.text[j] ? labels.set(j, text) : labels.delete(j);
      change({ labels });
    },
    group: (name, nodes) => { change(grouped(state, name, nodes)); select(null); setSelecting(false); },
    ungroup: group => change({ supernodes: state.supernodes.filter((_, i) => i !== group), positions: "" }),
    rename: (group, name) => change({ supernodes: state.supernodes.map(([old, nodes], i) => [i === group ? name.trim() || old : old, nodes]) }),
    place: positions => change({ positions }),
    search: q => change({ q }),
  };
  useKeys({ "/": () => field.current.focus(), Escape: () => (selected.length ? select(null) : act.click(null)) });
  const kept = useMemo(() => nodesInView(model, state), [state.node, state.pinned, state.supernodes, state.clicked]);
  const edges = useMemo(() => edgesInView(model, state, kept), [kept, state.edge]);
  const found = useMemo(() => new Set(searchNodes(model, state.labels, state.q)), [state.labels, state.q]);
  const load = async event => {
    const file = event.target.files[0];
    event.target.value = "";
    try {
      const held = JSON.parse(await file.text());
      if (typeof held?.qParams !== "object" || held.qParams === null) throw new Error("it has no qParams");
      setFault("");
      const { q, ...next } = readParams(model, held.qParams, base);
      change(next, true);
    } catch (error) {
      setFault(`${file.name} must hold a saved view of this graph: ${error.message}.`);
    }
  };
  const shared = { model, state, selected, act };
  const n = kept.reduce((sum, one) => sum + one, 0), drawn = Math.min(edges.length, MOST_DRAWN);
  return html`<div class="tools controls">
      <${Slider} name="Nodes by influence" value=${state.node} onValue=${node => change({ node })} />
      <${Slider} name="Edges by influence" value=${state.edge} onValue=${edge => change({ edge })} />
      <label>Links <select value=${state.linkType} onChange=${event => change({ linkType: event.target.value })}>
        <option value="both">in and out</option><option value="input">in</option><option value="output">out</option>
        ${state.linkType === "either" && html`<option value="either">either</option>`}</select></label>
      <button aria-pressed=${selecting} onClick=${() => setSelecting(!selecting)}>Select several</button>
      <button onClick=${save(state)}>Save view</button>
      <label class="button">Load view<input class="unseen" type="file" accept=".json,application/json" onChange=${load} /></label></div>
    ${fault && html`<p class="failure" role="alert">${fault}</p>`}
    <${Selection} ...${shared} />
    <div class="split"><div class="first"><${LinkGraph} ...${shared} ...${{ kept, edges, found, hovered }} />
      <p class="soft small status" role="status">${count(n)} of ${count(model.n)} nodes, ${count(drawn)} of ${count(model.edges.weight.length)} edges drawn</p>
      <p class="soft small legend">${LEGEND.map(([kind, path, text]) => html`<span key=${text}><${Shape} path=${path} kind=${kind} /> ${text}</span>`)}
        <span><i class="line plus" /> raises</span><span><i class="line minus" /> lowers</span></p>
      <p class="soft small keys" id="keys"><kbd>\u2190</kbd> <kbd>\u2192</kbd> <kbd>\u2191</kbd> <kbd>\u2193</kbd> move, <kbd>Enter</kbd> opens,${" "}
        <kbd>p</kbd> pins, <kbd>s</kbd> selects, <kbd>/</kbd> searches, <kbd>Esc</kbd> closes</p></div>
      <aside><${Search} ...${shared} found=${found} field=${field} /><${NodePanel} ...${shared} /></aside>
      <${Subgraph} ...${shared} /></div>`;
}

function Slider({ name, value, onValue }) {
  return html`<label class="slider">${name} <input type="range" min="0" max="1" step="0.01" value=${value} aria-valuetext=${percent(value)}
    onInput=${event => onValue(Number(event.target.value))} /><output>${percent(value)}</output></label>`;
}

function without(state, i) {
  if (!state.pinned.includes(i)) return state.supernodes;
  return state.supernodes.map(([name, nodes]) => [name, nodes.filter(j => j !== i)]).filter(([, nodes]) => nodes.length);
}

const save = state => () => {
  const text = JSON.stringify({ slug: model.slug, qParams: writeParams(model, state) }, null, 2);
  const address = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  const link = Object.assign(document.createElement("a"), { href: address, download: `${model.slug}-view.json` });
  link.click();
  setTimeout(() => URL.revokeObjectURL(address), 1000);
};

const root = document.getElementById("graph");
root.replaceChildren();
render(html`<${Page} />`, root);
