// One feature's card, drawn from JSON: the only place where the report, the explorer and widgets draw one. All text that
// comes from outside becomes text nodes.
import { html, useState } from "./vendor/htm-preact-standalone.js";
import { count, MINUS, percent, short, signed, visible } from "./format.js";
import { Failure } from "./loading.js";
import { FeatureLink } from "./routes.js";

const STRONGEST = 0.75;  // opacity of the largest code: the text stays readable on it
const WIDTH = 300, HEIGHT = 96, FOOT = 14;  // of the histogram, in its own units
const FIRST = 60, TIMES = 4, MOST = 2000;  // tokens on each side of the center at the first press, how they grow, and their limit
const MORE = 10;  // windows at a time
const SIGNS = { "1": " +", "-1": ` ${MINUS}`, "0": "" };

// `source` has, where there is more to show, `expand(feature, row, before, after)` and `examples(feature, group, side, offset, limit)`;
// `onFeature` takes the place of links to other features' pages.
export function FeatureCard({ card, source, onFeature }) {
  const scale = Math.max(0, ...card.sides.map(side => side.peak)), shared = { card, source, scale };
  return html`<article class="fcard" key=${card.feature}>
    <${Head} card=${card} />
    ${card.partners && html`<section class="match">${card.partners.map(partner => html`<${Partner} partner=${partner} scale=${scale} />`)}</section>`}
    <div class="cols">
      <div class="texts">${card.groups.map(group => html`<${Group} key=${group.name + group.side} group=${group} ...${shared} />`)}</div>
      <div class="numbers">
        <${Histogram} histogram=${card.histogram} />
        ${card.sides.filter(({ words }) => words.length).map(({ sign, words }) => html`<h3>Fires on${card.sides.length > 1 && SIGNS[sign]}</h3>
          <${Rank} rows=${words.map(([word, share]) => [html`<${Code} text=${word} />`, `${Math.round(100 * share)}%`])} />`)}
        <${Effects} card=${card} />
        ${card.near && html`<${Near} near=${card.near} source=${source} onFeature=${onFeature} />`}
      </div>
    </div></article>`;
}

function Head({ card }) {
  const n = card.sides.reduce((sum, side) => sum + side.n, 0);
  const rate = card.n_tokens ? (3 / card.n_tokens).toExponential(1) : "";
  const side = ({ sign, n, mean, peak }) => `${count(n)} ${sign > 0 ? "positive" : "negative"}, mean |z| ${short(mean)}, largest ${short(peak)}`;
  const said = n ? `Fires on ${percent(n / card.n_tokens)} of ${count(card.n_tokens)} ${card.counted}: ${card.sides.map(side).join("; ")}.`
    : `Never fired on ${count(card.n_tokens)} ${card.counted}: its rate is below ${rate} (95 %).`;
  return html`<h2><span>${card.feature}</span> ${card.label || html`<span class="dim">no label</span>`}</h2>
    ${card.origins.map(origin => html`<p class="dim">${origin}</p>`)}<p class="dim">${said}</p>`;
}

// Firings by code, counts on a log axis, negative codes on the left in blue.
function Histogram({ histogram }) {
  if (!histogram) return null;
  const { low, high, below, counts } = histogram, most = Math.max(...counts), width = WIDTH / counts.length;
  const bar = (n, i) => n && `M${(i * width + 0.5).toFixed(1)} ${HEIGHT - FOOT}v${-((HEIGHT - FOOT) * Math.log1p(n) / Math.log1p(most)).toFixed(1)}`
    + `h${Math.max(width - 1, 0.5).toFixed(1)}V${HEIGHT - FOOT}z`;
  const bars = counts.map(bar), path = part => part.filter(Boolean).join("");
  const parts = { down: path(bars.slice(0, below)), up: path(bars.slice(below)) };
  return html`<h3>Codes</h3><svg viewBox=${`0 0 ${WIDTH} ${HEIGHT}`} role="img">
      <title>Firings by code, counts on a log axis; the fullest bin has ${count(most)}</title>
      ${Object.entries(parts).map(([kind, d]) => d && html`<path class=${kind} d=${d} />`)}
      <text x="0" y=${HEIGHT - 2}>${short(low)}</text><text x=${WIDTH} y=${HEIGHT - 2} text-anchor="end">${short(high)}</text></svg>
    <p class="dim">firings by code, log counts, up to ${count(most)} in a bin</p>`;
}

function Effects({ card: { effects, sides } }) {
  if (!effects) return null;
  const list = tokens => tokens.map(([token, effect]) => [html`<${Code} text=${token} />`, signed(effect, 2)]);
  return html`<h3>Promotes</h3><${Rank} rows=${list(effects.promoted)} /><h3>Suppresses</h3><${Rank} rows=${list(effects.suppressed)} />
    <p class="dim">logits, for a code of +1 at unit scale${sides.some(side => side.sign < 0) && "; a negative code does the opposite"}</p>`;
}

function Near({ near: { by, rows }, source, onFeature }) {
  const link = j => (onFeature ? html`<a href=${`#${j}`} onClick=${event => { event.preventDefault(); onFeature(j); }}>${j}</a>`
    : html`<${FeatureLink} source=${source} feature=${j} />`);
  const said = (j, label) => label || source?.describe?.(j) || "";  // without a label, some of its text
  const named = rows.map(([j, value, label]) => [html`${link(j)} <span class=${label ? "" : "said"}>${said(j, label)}</span>`, signed(value, 2)]);
  return html`<h3>Nearest by ${by}</h3>${rows.length ? html`<${Rank} rows=${named} />` : html`<p>none</p>`}`;
}

function Rank({ rows }) {
  return html`<dl class="rank">${rows.map(([name, value]) => html`<dt>${name}</dt><dd>${value}</dd>`)}</dl>`;
}

function Code({ text }) {
  return html`<code>${visible(text)}</code>`;
}

function Partner({ partner: { title, name, label, about, columns }, scale }) {
  if (!columns) return html`<h3>${title}</h3>`;
  return html`<h3>${title}: ${name} ${label || html`<span class="dim">no label</span>`}</h3><p class="dim">${about}</p>
    <div class="both">${columns.map(({ place, sign, side, windows, peak }) => html`<div><h4>${place}${SIGNS[sign]}</h4>
      ${side ? html`<p>${side.words.map(([word, share]) => html`<${Code} text=${word} /> <span class="dim">${Math.round(100 * share)}%</span> `)}</p>
        <ol>${windows.map(window => html`<${Item} window=${window} scale=${peak ?? scale} />`)}</ol>` : html`<p class="dim">never</p>`}</div>`)}</div>`;
}

// A group of windows; where the source has more of them, a button brings these.
function Group({ group, card, source, scale }) {
  const [more, setMore] = useState([]), [failed, setFailed] = useState(""), [done, setDone] = useState(!source?.examples);
  const windows = [...group.windows, ...more];
  const load = () => source.examples(card.feature, group.name, group.side, windows.length, MORE).then(
    ({ windows: found }) => { setMore([...more, ...found]); setDone(found.length < MORE); setFailed(""); },
    error => setFailed(error.message),
  );
  const title = group.name[0].toUpperCase() + group.name.slice(1) + SIGNS[group.side];
  return html`<details data-group=${group.name} data-side=${group.side} open=${group.name === "top"}>
    <summary>${title} <span>${group.n && `${count(group.n)} firings, |z| ${short(group.low)} to ${short(group.high)}`}</span></summary>
    <ol>${windows.map(window => html`<${Item} key=${window[0]} window=${window} scale=${scale} feature=${card.feature} source=${source} />`)}</ol>
    <${Failure} error=${failed} />
    ${!done && html`<${Button} text="More examples" title=${`More examples of ${title}`} act=${load} />`}</details>`;
}

function Item({ window, scale, feature, source }) {
  const [wide, setWide] = useState(null), [n, setN] = useState(FIRST), [failed, setFailed] = useState(""), [done, setDone] = useState(!source?.expand);
  const parts = readParts(wide ?? window);
  const widen = () => source.expand(feature, window[0], n, n).then(
    ({ window: found }) => {  // at the limit, or where the document has no more
      setDone(n === MOST || textOf(found) === textOf(wide ?? window));
      setWide(found);
      setN(Math.min(n * TIMES, MOST));
      setFailed("");
    },
    error => setFailed(error.message),
  );
  const at = parts.find(part => part.at)?.z ?? 0;
  return html`<li><span>${at ? signed3(at) : "0"}${!done && html`<${Button} text="\u2194" title="Show more of the text" act=${widen} />`}</span>
    <div class="win">${imageOf(window) && html`<img src=${imageOf(window)} alt="" />`}${parts.map(part => html`<${Token} ...${part} scale=${scale} />`)}<${Failure} error=${failed} /></div></li>`;
}

function Button({ text, title, act }) {
  const [busy, setBusy] = useState(false);
  const press = () => { setBusy(true); act().then(() => setBusy(false)); };
  return html`<button type="button" class="wider" aria-label=${title} disabled=${busy} onClick=${press}>${text}</button>`;
}

// Texts of a window with their codes: a number that follows a text is its code.
function readParts([, center, ...flat]) {
  const parts = [];
  for (const part of flat) {
    if (typeof part === "string") parts.push({ text: part, z: 0, at: parts.length === center });
    else if (typeof part === "number") parts[parts.length - 1].z = part;
  }
  return parts;
}

// The picture of a window's document, as a data URI.
function imageOf(window) {
  return window.find(part => part?.image)?.image;
}

function textOf(window) {
  return readParts(window).map(part => part.text).join("");
}

function Token({ text, z, at, scale }) {
  const kind = [z && (z > 0 ? "p" : "m"), at && "at"].filter(Boolean).join(" ");
  if (!z || scale <= 0) return html`<i class=${kind || null}>${visible(text)}</i>`;
  return html`<b class=${kind} style=${{ "--a": (STRONGEST * Math.min(1, Math.abs(z) / scale)).toFixed(2) }} title=${signed3(z)}>${visible(text)}</b>`;
}

function signed3(x) {
  return (x > 0 ? "+" : "") + short(x);
}
