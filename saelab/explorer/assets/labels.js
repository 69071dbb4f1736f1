// Labels of a feature: a form for the reader's own, the table of all with where they came from, and making new ones.
import { html, useEffect, useRef, useState } from "./vendor/htm-preact-standalone.js";
import { useAction } from "./edits.js";
import { MINUS, short } from "./format.js";
import { Failure } from "./loading.js";

const SIDES = { 0: "whole feature", 1: "positive side", "-1": "negative side" };
const MARKS = { 1: "+", "-1": MINUS, 0: "" };

export function LabelForm({ source, about, feature, labels }) {
  const [sign, setSign] = useState(0), [run, error, busy] = useAction(), field = useRef(null);
  const text = labels.find(label => label.chosen && label.sign === sign)?.text ?? "";
  const save = event => {
    event.preventDefault();
    run(() => source.setLabel(feature, field.current.value.trim(), sign));
  };
  return html`<form class="inline" onSubmit=${save}>
    <input key=${`${sign} ${text}`} ref=${field} class="wide" defaultValue=${text} required placeholder="Name this feature"
      aria-label="Label" autocomplete="off" />
    ${about.store.signed && html`<select aria-label="What the label names" value=${sign} onChange=${event => setSign(Number(event.target.value))}>
      ${[0, 1, -1].map(side => html`<option value=${side}>${SIDES[side]}</option>`)}</select>`}
    <button disabled=${busy}>Save label</button><${Failure} error=${error} /></form>`;
}

export function LabelTable({ source, about, feature, labels }) {
  const [run, error, busy] = useAction(), edit = about.can.edit;
  const choose = label => run(() => source.chooseLabel(feature, label.author, label.sign));
  const remove = label => run(() => source.deleteLabel(feature, label.author, label.sign));
  return html`<section class="labels"><h2>Labels</h2>
    ${labels.length === 0 && html`<p class="soft">No label yet.</p>`}
    <ul>${labels.map(label => html`<li key=${`${label.sign} ${label.author}`} class=${label.chosen ? "chosen" : ""}>
      <p><strong>${MARKS[label.sign]} ${label.text || "no name"}</strong>${label.chosen && html` <span class="badge">shown</span>`}</p>
      <p class="soft small">${label.origin}${label.time && `, ${label.time.slice(0, 10)}`}${label.kind !== "free" && `, ${label.kind}`}</p>
      ${edit && html`<p class="inline">
        ${!label.chosen && html`<button type="button" disabled=${busy} onClick=${() => choose(label)}>Show this one</button>`}
        <button type="button" disabled=${busy} onClick=${() => remove(label)}>Delete</button></p>`}</li>`)}</ul>
    <${Failure} error=${error} />
    ${edit && html`<${Relabeling} source=${source} about=${about} feature=${feature} />`}</section>`;
}

// Labels by rules or a language model, made by the server while the page stays in use.
function Relabeling({ source, about, feature }) {
  const [state, setState] = useState(null), [error, setError] = useState(""), controller = useRef(null);
  useEffect(() => () => controller.current?.abort(), []);
  const start = async method => {
    controller.current = new AbortController();
    setError("");
    setState({ progress: 0, text: "starting" });
    await source.relabel(feature, method, 0, controller.current.signal, said => setState(said)).catch(failed => {
      if (failed.name !== "AbortError") setError(failed.message);
    });
    setState(null);
  };
  return html`<div class="inline">
    ${about.can.label_rules && html`<button type="button" disabled=${state} onClick=${() => start("rules")}>Label by rules</button>`}
    ${about.can.label_llm && html`<button type="button" disabled=${state} onClick=${() => start("llm")}>Label by a language model</button>`}
    <span role="status">${state && html`<progress max="1" value=${state.progress ?? 1} aria-label="Progress of the label" />
      <span class="soft small"> ${state.text ?? ""} ${short(state.progress)}</span>
      <button type="button" onClick=${() => controller.current.abort()}>Stop</button>`}</span>
    <${Failure} error=${error} /></div>`;
}
