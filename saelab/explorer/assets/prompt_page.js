// A prompt that the reader types: features of every token, tokens of every feature, and two prompts compared.
import { html, useRef, useState } from "./vendor/htm-preact-standalone.js";
import { MINUS, percent, short, signed, visible } from "./format.js";
import { Failure, useLoaded } from "./loading.js";
import { PromptTokens, strongest, TokenFeatures, valuesOf } from "./prompt_reading.js";
import { FeatureLink, writeRoute } from "./routes.js";
import { addToSetup } from "./setup.js";
import { Waiting } from "./waiting.js";

const RANKS = { activation: "largest code", rarity: "rarity: code over density", attribution: "attribution to a next token" };
const FEW = 20;  // rows of a table before it is opened
const K = 24;  // features listed for a token

// The query holds text, other, rank and target, and what is chosen: token (its place) and feature.
export function PromptPage({ source, about, state, query, setQuery }) {
  const { text = "", other = "", rank = "activation", target = "" } = query, ready = state === "ready";
  const body = { text, rank, k: K, ...(other && { other }), ...(target && rank === "attribution" && { target }) };
  const load = signal => (text && ready ? source.prompt(body, signal) : Promise.resolve(null));
  const { value, error, loading } = useLoaded(load, [text, other, rank, target, ready]);
  const ask = change => setQuery({ ...query, token: "", feature: "", ...change }, true);
  return html`<section><h2>Prompt</h2>
    <${Waiting} state=${state} what="Prompts" />
    <${Form} query=${query} ready=${ready} ask=${ask} />
    <${Failure} error=${error} />
    <p class="soft" role="status">${text && ready && loading && "reading \u2026"}</p>
    ${value && html`<div aria-busy=${loading}><${Reading} source=${source} about=${about} value=${value} query=${query} setQuery=${setQuery} ask=${ask} /></div>`}
  </section>`;
}

function Form({ query, ready, ask }) {
  const text = useRef(null), other = useRef(null);
  const submit = event => {
    event.preventDefault();
    ask({ text: text.current.value, other: other.current.value.trim() ? other.current.value : "" });
  };
  const press = event => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) submit(event); };
  return html`<form onSubmit=${submit} onKeyDown=${press}>
    <label for="prompt">Text</label>
    <textarea id="prompt" key=${query.text} ref=${text} rows="3" required defaultValue=${query.text ?? ""} placeholder="Once upon a time" />
    <details open=${Boolean(query.other)}><summary>Compare with another text</summary>
      <textarea key=${query.other} ref=${other} rows="3" aria-label="The other text" defaultValue=${query.other ?? ""} /></details>
    <div class="inline"><button class="main" disabled=${!ready}>Show features</button>
      <label>ranked by <select value=${query.rank ?? "activation"} onChange=${event => ask({ rank: event.target.value })}>
        ${Object.entries(RANKS).map(([name, title]) => html`<option value=${name}>${title}</option>`)}</select></label></div>
  </form>`;
}

function Reading({ source, about, value, query, setQuery, ask }) {
  const first = strongest(value.tokens);
  const token = query.token === undefined || query.token === "" ? first.token : Number(query.token);
  const feature = query.feature === undefined || query.feature === "" ? first.feature : Number(query.feature);
  const named = new Map([...(value.difference ?? []), ...value.features].map(row => [row.feature, row]));
  const choose = change => setQuery({ ...query, ...change });
  const paint = j => choose({ feature: j });
  const word = visible(value.words[token] ?? "");
  return html`<div>
    <h3>The text${value.other && ", colored by one feature"}</h3>
    <${PromptTokens} words=${value.words} values=${placed(value, feature)} token=${token} feature=${feature}
      onToken=${i => choose({ token: i })} />
    ${value.other && html`<h3>The other text</h3><${PromptTokens} words=${value.other.words} feature=${feature} token=${-1}
      values=${valuesOf(value.other.tokens, feature)} onToken=${i => paint(strongest([value.other.tokens[i]]).feature ?? feature)} />`}
    <div class="panels">
      <section><h3>Features of <code>${word}</code></h3>
        ${value.tokens[token] && html`<${TokenFeatures} source=${source} codes=${value.tokens[token].codes} feature=${feature}
          describe=${j => named.get(j)?.label ?? ""} onFeature=${paint} />`}</section>
      <${Predictions} value=${value} query=${query} ask=${ask} />
    </div>
    ${value.difference && html`<${Table} title="Features that differ" source=${source} about=${about} rows=${value.difference} feature=${feature} paint=${paint}
      columns=${{ "this text": row => short(row.peak), "other text": row => short(row.other), difference: row => signed(row.difference, 2) }} />`}
    <${Table} title="Features of the text" source=${source} about=${about} rows=${value.features} feature=${feature} paint=${paint}
      columns=${{ "largest code": row => short(row.peak), tokens: row => row.where.length, ...scored(query.rank) }} /></div>`;
}

function scored(rank) {
  return rank === "rarity" || rank === "attribution" ? { [rank]: row => short(row.score) } : {};
}

// Codes of a feature at each word: all of them for a feature that is listed, else those among the largest of a word.
function placed(value, feature) {
  const row = value.features.find(row => row.feature === feature);
  if (!row) return valuesOf(value.tokens, feature);
  const where = new Map(row.where);
  return value.words.map((_, i) => where.get(i) ?? 0);
}

function Predictions({ value, query, ask }) {
  const chosen = query.rank === "attribution" ? value.target : null;
  return html`<section><h3>Next token</h3>
    <p class="soft small">Press one to rank the features by their attribution to it.</p>
    <ul class="predictions">${value.predictions.map(({ token, p }) => html`<li key=${token}>
      <button type="button" aria-pressed=${token === chosen} onClick=${() => ask({ rank: "attribution", target: token })}><code>${visible(token)}</code></button>
      <span class="bar" style=${{ "--share": p }} aria-hidden="true" /><span>${percent(p).replace("-", MINUS)}</span></li>`)}</ul></section>`;
}

function Table({ source, title, about, rows, columns, feature, paint }) {
  const names = Object.keys(columns), [all, showAll] = useState(false);
  return html`<section><h3>${title}</h3><div class="scroll"><table class="related"><thead><tr><th>feature</th><th>label</th>
      ${names.map(name => html`<th>${name}</th>`)}<th /></tr></thead>
    <tbody>${rows.slice(0, all ? rows.length : FEW).map(row => html`<tr key=${row.feature}><td><${FeatureLink} source=${source} feature=${row.feature} /></td>
      <td>${row.label}</td>${names.map(name => html`<td>${columns[name](row)}</td>`)}
      <td class="acts"><button type="button" aria-pressed=${row.feature === feature} aria-label=${`Color the tokens of feature ${row.feature}`}
        onClick=${() => paint(row.feature)}>color</button>
        ${about.can.steer && html` <a href=${writeRoute("steer", "", addToSetup(row.feature))} aria-label=${`Steer feature ${row.feature}`}>steer</a>`}</td>
      </tr>`)}</tbody></table></div>
    ${!all && rows.length > FEW && html`<button type="button" onClick=${() => showAll(true)}>Show all ${rows.length}</button>`}</section>`;
}
