// What the reader keeps: lists of features, pinned set-ups, and all of it as files.
import { html, useRef } from "./vendor/htm-preact-standalone.js";
import { Undo, useAction, useEdits } from "./edits.js";
import { count } from "./format.js";
import { Failure, useLoaded } from "./loading.js";
import { writeRoute } from "./routes.js";
import { PinnedSetups } from "./setups.js";

const FORMATS = { json: "JSON: labels, notes, lists, set-ups", csv: "CSV: labels", neuronpedia: "Neuronpedia: labels" };

export function ListsPage({ source, about }) {
  const edits = useEdits(), { value, error } = useLoaded(source.lists, [edits]), [run, failed] = useAction();
  const unnamed = useLoaded(source.exports, [edits]).value?.n_unnamed;
  const edit = about.can.edit;
  return html`<section><h2>Lists and set-ups</h2>
    <h3>Lists of features</h3>
    <${Failure} error=${failed || error} />
    ${edit && html`<${NewList} run=${run} source=${source} />`}
    ${value?.lists.length === 0 && html`<p class="soft">None yet.</p>`}
    ${value?.lists.map(list => html`<${List} key=${list.name} list=${list} names=${value.names} run=${run} source=${source} edit=${edit} />`)}
    <${PinnedSetups} source=${source} edit=${edit} />
    ${edit && html`<h3>Last change</h3><${Undo} source=${source} always />`}
    <h3>Export</h3>
    <ul class="plain">${Object.entries(FORMATS).map(([format, title]) => html`<li><a href=${`api/export?format=${format}`} download>${title}</a>
      ${format === "neuronpedia" && unnamed > 0 && html`<span class="soft small"> without ${count(unnamed)} that say that there is no good name</span>`}</li>`)}</ul>
  </section>`;
}

function NewList({ run, source }) {
  const name = useRef(null), features = useRef(null);
  const make = event => {
    event.preventDefault();
    const numbers = features.current.value.split(/[\s,]+/).filter(Boolean).map(Number);
    run(() => source.setList(name.current.value.trim(), numbers).then(() => event.target.reset()));
  };
  return html`<form class="inline" onSubmit=${make}><input ref=${name} required aria-label="Name of the list" placeholder="name" />
    <input ref=${features} class="wide" pattern="[0-9,\s]*" aria-label="Numbers of features, joined by commas" placeholder="features, such as 3, 17" />
    <button>Make list</button></form>`;
}

function List({ list: { name, features }, names, run, source, edit }) {
  return html`<section class="kept"><h4><a href=${writeRoute("features", "", { list: name })}>${name}</a>
      <span class="soft small"> ${count(features.length)} features</span>
      ${edit && html` <button type="button" aria-label=${`Delete the list ${name}`} onClick=${() => run(() => source.deleteList(name))}>\u00d7</button>`}</h4>
    <p>${features.map(j => html`<span class="chip" key=${j}><a href=${writeRoute("feature", j)}>${j} <span>${names[j]}</span></a>
      ${edit && html`<button type="button" aria-label=${`Take feature ${j} out of ${name}`} onClick=${() => run(() => source.removeFromList(name, j))}>\u00d7</button>`}
    </span>`)}</p></section>`;
}
