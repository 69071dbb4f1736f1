// The page of one feature: its card, with what a reader may do above it and what else is known below.
import { html, useRef } from "./vendor/htm-preact-standalone.js";
import { useAction, useEdits } from "./edits.js";
import { FeatureView } from "./feature_view.js";
import { known, percent, short } from "./format.js";
import { LabelForm, LabelTable } from "./labels.js";
import { Failure, useLoaded } from "./loading.js";
import { FeatureLink, writeRoute } from "./routes.js";
import { addToSetup } from "./setup.js";

export function ExplorerFeature({ source, about, feature, query }) {
  const edits = useEdits();
  const edit = about.can.edit, shared = { source, about, feature };
  return html`<${FeatureView} source=${source} feature=${feature} query=${query} version=${edits}
    above=${value => html`<div class="acts">
        ${edit && html`<${LabelForm} ...${shared} labels=${value.labels} />`}
        ${about.can.steer && html`<a class="button" href=${writeRoute("steer", "", addToSetup(feature))}>Add to steering</a>`}
        <${Lists} ...${shared} names=${value.lists ?? []} />
      </div>`}
    below=${value => html`<div class="panels">
        <${LabelTable} ...${shared} labels=${value.labels} />
        <${Note} ...${shared} text=${value.note ?? ""} />
        <${Related} source=${source} title="Fires with" rows=${value.cofiring} columns=${{ share: percent, lift: short }} />
      </div>`} />`;
}

function Note({ source, about, feature, text }) {
  const field = useRef(null), [run, error, busy] = useAction();
  if (!about.can.edit) return text && html`<section><h2>Note</h2><p class="written">${text}</p></section>`;
  const save = event => {
    event.preventDefault();
    run(() => source.setNote(feature, field.current.value));
  };
  return html`<form onSubmit=${save}><h2><label for="note">Note</label></h2>
    <textarea id="note" ref=${field} rows="4" defaultValue=${text} />
    <button disabled=${busy}>Save note</button><${Failure} error=${error} /></form>`;
}

function Lists({ source, about, feature, names }) {
  const { value } = useLoaded(source.lists, [useEdits()]), [run, error] = useAction(), field = useRef(null);
  const add = event => {
    event.preventDefault();
    const name = field.current.value.trim();
    if (name) run(() => source.addToList(name, feature).then(() => { field.current.value = ""; }));
  };
  return html`<div class="in-lists">
    ${names.map(name => html`<span class="chip" key=${name}><a href=${writeRoute("features", "", { list: name })}>${name}</a>
      ${about.can.edit && html`<button type="button" aria-label=${`Remove from the list ${name}`}
        onClick=${() => run(() => source.removeFromList(name, feature))}>\u00d7</button>`}</span>`)}
    ${about.can.edit && html`<form class="inline" onSubmit=${add}><input ref=${field} list="list-names" aria-label="Name of a list" placeholder="list" />
      <datalist id="list-names">${value?.lists.map(({ name }) => html`<option value=${name} />`)}</datalist>
      <button>Add to list</button></form>`}<${Failure} error=${error} /></div>`;
}

// Features that have to do with this one; `columns` are numbers of each, with how they are written.
function Related({ source, title, rows, columns }) {
  if (!rows?.length) return null;
  const names = Object.keys(columns);
  return html`<section><h2>${title}</h2><table class="related"><thead><tr><th>feature</th><th>label</th>
    ${names.map(name => html`<th>${name}</th>`)}</tr></thead>
    <tbody>${rows.map(row => html`<tr key=${row.feature}><td><${FeatureLink} source=${source} feature=${row.feature} /></td>
      <td>${row.label}</td>${names.map(name => html`<td>${known(row[name]) && columns[name](row[name])}</td>`)}</tr>`)}</tbody></table></section>`;
}
