// The fields of a steering set-up: one moved feature, and how tokens are sampled.
import { html, useRef, useState } from "./vendor/htm-preact-standalone.js";
import { FeatureLink } from "./routes.js";
import { MODES, rangeOf, UNITS } from "./setup.js";

// A slider for what is usual and a number beside it for anything; the address changes when the slider is let go.
export function MovedFeature({ source, one, label, onChange, onDrop }) {
  const [held, setHeld] = useState(null), { feature, strength, mode, unit } = one, off = mode === "ablate";
  const [low, high] = rangeOf(one), change = part => { setHeld(null); onChange({ ...one, ...part }); };
  const named = `feature ${feature}`;
  return html`<fieldset class="moved"><legend><${FeatureLink} source=${source} feature=${feature} /> ${label}</legend>
    <select aria-label=${`How ${named} is moved`} value=${mode} onChange=${event => change({ mode: event.target.value })}>
      ${Object.entries(MODES).map(([name, title]) => html`<option value=${name}>${title}</option>`)}</select>
    <input type="range" min=${low} max=${high} step=${(high - low) / 200} value=${held ?? strength} disabled=${off} aria-label=${`Strength of ${named}`}
      onInput=${event => setHeld(Number(event.target.value))} onChange=${event => change({ strength: Number(event.target.value) })} />
    <${NumberField} step="any" value=${String(held ?? strength)} disabled=${off} required aria-label=${`Strength of ${named} as a number`}
      onChange=${text => text !== "" && change({ strength: Number(text) })} />
    ${mode !== "scale" && !off && html`<select aria-label=${`Unit of the strength of ${named}`} value=${unit} onChange=${event => change({ unit: event.target.value })}>
      ${Object.entries(UNITS).map(([name, title]) => html`<option value=${name}>${title}</option>`)}</select>`}
    <button type="button" aria-label=${`Do not move ${named}`} onClick=${onDrop}>\u00d7</button></fieldset>`;
}

// A number as it is typed: what is drawn meanwhile, such as a stream, must not put the old one back.
function NumberField({ value, onChange, ...rest }) {
  const [text, setText] = useState(value), given = useRef(value);
  if (value !== given.current) { given.current = value; setText(value); }
  return html`<input type="number" ...${rest} value=${text} onInput=${event => setText(event.target.value)} onChange=${event => onChange(event.target.value)} />`;
}

const FIELDS = {
  n_tokens: { title: "Tokens", min: 1, max: 512, step: 1 },
  temperature: { title: "Temperature", min: 0, step: "any" },
  top_k: { title: "Top k", min: 1, step: 1, empty: "all" },
  top_p: { title: "Top p", min: 0, max: 1, step: "any", empty: "1" },
  seed: { title: "Seed", min: 0, step: 1 },
};

export function Sampling({ setup, onChange }) {
  const change = (name, text) => {
    if (text !== "") onChange({ [name]: Number(text) });
    else if (FIELDS[name].empty) onChange({ [name]: null });  // no limit
  };
  return html`<div class="fields">${Object.entries(FIELDS).map(([name, { title, empty, ...limits }]) => html`<label key=${name}>${title}
      <${NumberField} value=${String(setup[name] ?? "")} placeholder=${empty ?? ""} required=${!empty} ...${limits} onChange=${text => change(name, text)} /></label>`)}
    <label class="check"><span>Random direction too</span>
      <input type="checkbox" checked=${setup.random} onChange=${event => onChange({ random: event.target.checked })} /></label></div>`;
}
