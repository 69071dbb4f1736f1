// Columns of the feature list and the cells of one row.
import { html } from "./vendor/htm-preact-standalone.js";
import { known, percent, short, signed, visible } from "./format.js";

// `first` is the order that a first press on the column's heading gives.
export const COLUMNS = {
  feature: { title: "feature", width: "4rem", first: "asc", cell: row => row.feature },
  label: { title: "label and text", width: "minmax(0, 1fr)", first: "asc", cell: row => html`<${Text} row=${row} />` },
  score: { title: "score", width: "3.4rem", first: "desc", cell: row => short(row.score) },
  density: { title: "density", width: "5rem", first: "desc", cell: row => percent(row.density) },
  balance: { title: "negative", width: "5rem", first: "desc", cell: row => html`<${Signs} row=${row} />` },
  peak: { title: "peak", width: "3.6rem", first: "desc", cell: row => short(row.peak) },
  kind: { title: "kind", width: "4.6rem", first: "asc", cell: row => row.kind },
  concept: { title: "concept", width: "8rem", first: "desc", cell: row => row.concept },
  match: { title: "match", width: "4.2rem", first: "desc", cell: row => html`<${Match} row=${row} />` },
};

function Text({ row }) {
  const label = row.label && html`<span class=${row.by_person ? "named person" : "named"}>${row.label}</span>`;
  const mark = row.noted && html`<span class="noted" title="has a note"> \u270e</span>`;
  if (row.snippet) {
    const [before, center, after] = row.snippet;
    return html`${label}<span class="soft">${before}<b>${center}</b>${after}</span>`;
  }
  return html`${label}${mark}<span class="soft">${(row.tokens ?? []).map(token => html`<code>${visible(token)}</code> `)}</span>`;
}

// Share of the two signs among the firings: orange for positive, blue for negative.
function Signs({ row }) {
  const fires = row.n_positive + row.n_negative;
  if (!fires) return null;
  const share = row.n_negative / fires, said = `${(100 * share).toFixed(1)} % negative`;
  return html`<span class="signs" role="img" aria-label=${said} title=${said}><span style=${{ width: `${100 * share}%` }} /></span>`;
}

function Match({ row }) {
  if (!known(row.match)) return html`<span class="soft">none</span>`;
  const title = known(row.universal) ? `partner ${row.partner}, ${row.universal ? "" : "not "}universal` : `partner ${row.partner}`;
  return html`<span class=${row.universal ? "universal" : ""} title=${title}>${signed(row.match)}</span>`;
}

export function describeRow(row) {
  return row.label || (row.snippet ?? row.tokens ?? []).join(row.snippet ? "" : " ").trim();
}
