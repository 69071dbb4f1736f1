// Pinned steering set-ups: kept by the server, opened again by their address.
import { html, useRef } from "./vendor/htm-preact-standalone.js";
import { useAction, useEdits } from "./edits.js";
import { Failure, useLoaded } from "./loading.js";
import { writeRoute } from "./routes.js";
import { writeSetup } from "./setup.js";

export function PinnedSetups({ source, setup, edit }) {
  const { value, error } = useLoaded(source.setups, [useEdits()]), field = useRef(null);
  const [run, failed, busy] = useAction();
  const pin = event => {
    event.preventDefault();
    run(() => source.pinSetup(field.current.value.trim(), setup).then(() => { field.current.value = ""; }));
  };
  const remove = name => run(() => source.deleteSetup(name));
  return html`<section><h3>Pinned set-ups</h3>
    ${setup && edit && html`<form class="inline" onSubmit=${pin}><input ref=${field} required aria-label="Name of this set-up" placeholder="name of this set-up" />
      <button disabled=${busy}>Pin</button></form>`}
    <${Failure} error=${failed || error} />
    ${value?.setups.length === 0 && html`<p class="soft">None yet.</p>`}
    <ul class="plain">${value?.setups.map(({ name, setup, time }) => html`<li key=${name}>
      <a href=${writeRoute("steer", "", writeSetup(setup))}>${name}</a>
      <span class="soft small"> ${setup.features.map(({ feature, strength }) => `${feature} by ${strength}`).join(", ")} ${time?.slice(0, 10)}</span>
      ${edit && html` <button type="button" aria-label=${`Delete the set-up ${name}`} onClick=${() => remove(name)}>\u00d7</button>`}</li>`)}</ul></section>`;
}
