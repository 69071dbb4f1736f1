// The texts of a steering run as they are written: without steering, steered, and along a random direction.
import { html } from "./vendor/htm-preact-standalone.js";
import { short } from "./format.js";

const RUNS = { unsteered: "Unsteered", steered: "Steered", random: "Random direction" };
const SAID = { unsteered: "the model as it is", steered: "with the features moved", random: "moved as far, at random" };

export function Streams({ prompt, texts, costs, busy, random }) {
  if (!busy && !Object.keys(texts).length) return null;
  const names = Object.keys(RUNS).filter(name => name !== "random" || random);
  return html`<div class="streams">${names.map(name => html`<section key=${name} class=${name} aria-label=${RUNS[name]}>
    <h3>${RUNS[name]}</h3><p class="soft small">${SAID[name]}</p>
    <p class="stream" role="log" aria-busy=${busy}><span class="soft">${prompt}</span>${texts[name]?.map(({ token, log_prob }, i) =>
      html`<span key=${i} title=${`log-probability ${short(log_prob)}`}>${token}</span>`)}</p>
    ${costs && html`<${Costs} name=${name} costs=${costs} />`}</section>`)}</div>`;
}

function Costs({ name, costs }) {
  const rows = {
    Perplexity: costs.perplexity?.[name],
    "Perplexity to itself": name === "unsteered" ? null : costs.own_perplexity?.[name],
    "KL from unsteered, nats": costs.kl?.[name],
  };
  return html`<dl class="costs">${Object.entries(rows).map(([title, x]) => (x ?? null) !== null && html`<dt>${title}</dt><dd>${short(x)}</dd>`)}</dl>`;
}
