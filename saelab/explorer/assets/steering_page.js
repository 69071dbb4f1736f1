// Steering: several features moved at once, and what the model then writes beside what it would have written.
import { html, useEffect, useRef, useState } from "./vendor/htm-preact-standalone.js";
import { useEdits } from "./edits.js";
import { Failure, useLoaded } from "./loading.js";
import { readSetup, withFeature, writeSetup } from "./setup.js";
import { PinnedSetups } from "./setups.js";
import { MovedFeature, Sampling } from "./steering_fields.js";
import { Streams } from "./streams.js";
import { Waiting } from "./waiting.js";

export function SteeringPage({ source, about, state, query, setQuery }) {
  const setup = readSetup(query), change = part => setQuery(writeSetup({ ...setup, ...part }));
  const labels = useLabels(source, setup.features);
  const move = (i, one) => change({ features: setup.features.map((old, place) => (place === i ? one : old)) });
  const drop = i => change({ features: setup.features.filter((_, place) => place !== i) });
  const runs = useRuns(source, setup), ready = state === "ready" && setup.features.length > 0 && setup.prompt.trim();
  return html`<section><h2>Steering</h2>
    <${Waiting} state=${state} what="Steered texts" />
    <form onSubmit=${event => { event.preventDefault(); runs.start(); }}>
      <label for="prompt">Text to go on from</label>
      <textarea id="prompt" rows="2" required key=${setup.prompt} defaultValue=${setup.prompt} placeholder="Once upon a time"
        onChange=${event => change({ prompt: event.target.value })} />
      <h3>Features to move</h3>
      ${setup.features.length === 0 && html`<p class="soft">None yet. Find one below, or press \u201cAdd to steering\u201d on its page.</p>`}
      ${setup.features.map((one, i) => html`<${MovedFeature} key=${one.feature} source=${source} one=${one} label=${labels[one.feature] ?? ""}
        onChange=${moved => move(i, moved)} onDrop=${() => drop(i)} />`)}
      <${FeatureFinder} source=${source} onFeature=${j => change({ features: withFeature(setup, j).features })} />
      <${Sampling} setup=${setup} onChange=${change} />
      <div class="inline">
        ${runs.busy ? html`<button type="button" class="main" onClick=${runs.stop}>Stop</button>`
          : html`<button class="main" disabled=${!ready}>Write</button>`}
        <button type="button" disabled=${runs.busy || !ready} onClick=${() => { change({ seed: setup.seed + 1 }); }}>Next seed</button></div>
    </form>
    <${Failure} error=${runs.error} />
    <${Streams} prompt=${runs.prompt} texts=${runs.texts} costs=${runs.costs} busy=${runs.busy} random=${setup.random} />
    ${source.setups && html`<${PinnedSetups} source=${source} setup=${setup} edit=${about.can.edit} />`}</section>`;
}

// The streams of one press on Write; a new press, Stop, and leaving the view end what still runs.
function useRuns(source, setup) {
  const none = { texts: {}, costs: null, busy: false, error: "", prompt: "" };
  const [state, setState] = useState(none), controller = useRef(null);
  useEffect(() => {
    if (source.isWritten?.(setup)) start();  // as in a saved notebook
    return () => controller.current?.abort();
  }, []);
  const start = async () => {
    controller.current?.abort();
    const { signal } = controller.current = new AbortController();
    const keep = change => signal.aborted || setState(change), texts = {};
    setState({ ...none, busy: true, prompt: setup.prompt });
    const hear = said => {
      if (said.done) return keep(old => ({ ...old, costs: said }));
      texts[said.run] = [...(texts[said.run] ?? []), said];
      return keep(old => ({ ...old, texts: { ...texts } }));
    };
    const error = await source.steer(setup, signal, hear).then(() => "", failed => failed.message);
    keep(old => ({ ...old, busy: false, error }));
  };
  const stop = () => {
    controller.current.abort();
    setState(old => ({ ...old, busy: false }));
  };
  return { ...state, start, stop };
}

function useLabels(source, features) {
  const numbers = features.map(one => one.feature);
  const load = signal => Promise.all(numbers.map(j => source.features({ sort: "feature", order: "asc" }, j, 1, signal)));
  const { value } = useLoaded(load, [numbers.join(), useEdits()]);
  const rows = (value ?? []).flatMap(({ rows }) => rows);
  return Object.fromEntries(rows.map(row => [row.feature, row.label || (row.tokens ?? []).join(" ")]));
}

// A field that finds features by number, label or token.
function FeatureFinder({ source, onFeature }) {
  const [q, setQ] = useState("");
  const load = signal => (q.trim() ? source.features({ q }, 0, 6, signal) : Promise.resolve(null));
  const { value, error } = useLoaded(load, [q]);
  const take = j => { setQ(""); onFeature(j); };
  const press = event => {
    if (event.key !== "Enter") return;
    event.preventDefault();  // or the form would be sent
    if (value?.rows.length) take(value.rows[0].feature);
  };
  return html`<div class="finder"><input type="search" value=${q} placeholder="Find a feature by label, token or number" aria-label="Find a feature to move"
      autocomplete="off" onInput=${event => setQ(event.target.value)} onKeyDown=${press} />
    <${Failure} error=${error} />
    ${q.trim() && value && html`<ul role="status">${value.rows.map(row => html`<li key=${row.feature}>
      <button type="button" onClick=${() => take(row.feature)}>${row.feature} ${row.label || (row.tokens ?? []).join(" ")}</button></li>`)}
      ${value.rows.length === 0 && html`<li class="soft">no such feature</li>`}</ul>`}</div>`;
}
