// The list of features: search, filters, sorted columns and as many rows as fit the window, of a list of any length.
import { html, useEffect, useLayoutEffect, useRef, useState } from "./vendor/htm-preact-standalone.js";
import { COLUMNS, describeRow } from "./feature_rows.js";
import { Filters } from "./feature_filters.js";
import { count } from "./format.js";
import { Failure, useKeys } from "./loading.js";
import { go, writeRoute } from "./routes.js";

const PAGE = 100;
const SPARE = 8;  // rows drawn above and below what can be seen
const PAUSE = 150;  // ms without a key before what was typed is searched

let searching = false;

// The list with the cursor in its search field, from any other view.
export function openSearch() {
  searching = true;
  go(writeRoute("features"));
}

// `query` is the address' and has `q`, `sort`, `order`, `at` (the first row in view) and one entry a filter; `source` has
// `columns`, `filters` and `features(query, offset, limit, signal)`. Without `sort` what was searched comes best match first.
// Rows are asked for again when `version` changes; `note` stands beside their number.
export function FeatureList({ source, query, onQuery, version, note }) {
  const { at, ...asked } = { sort: "", order: "desc", ...query };
  const sort = asked.sort || (asked.q ? "" : "density");
  const start = Number(at) || 0, key = JSON.stringify([asked, version]);
  const view = useView(start);
  const found = usePages(source, asked, key, view.first, view.last);
  useLayoutEffect(() => view.scrollTo(start), [key, found.key]);
  useEffect(() => {
    if (found.stale || view.top === start) return undefined;
    const wait = setTimeout(() => onQuery({ ...query, at: view.top || "" }), PAUSE);
    return () => clearTimeout(wait);
  }, [view.top, found.stale]);
  const ask = change => onQuery({ ...query, ...change, at: "" });
  const href = i => writeRoute("feature", found.row(i).feature, { ...asked, at: i });
  const { step, choose } = useChosenRow(view, found);
  const toSearch = () => document.getElementById("search").focus();
  useEffect(() => { if (searching) toSearch(); searching = false; }, []);
  const keys = { "/": toSearch };
  for (const key of ["j", "ArrowDown"]) keys[key] = () => step(1);
  for (const key of ["k", "ArrowUp"]) keys[key] = () => step(-1);
  useKeys(keys);
  return html`<section class="list" aria-labelledby="list-title">
    <h2 id="list-title" class="unseen">Features</h2>
    <div class="tools" role="search">
      <${Search} value=${query.q ?? ""} onInput=${q => ask({ q })} onEnter=${() => found.row(0) && go(href(0))} />
      <${Order} columns=${source.columns} sort=${sort} order=${asked.order} ask=${ask} />
      ${source.filters.length > 0 && html`<${Filters} source=${source} query=${asked} ask=${ask} />`}
    </div>
    <p class="soft small" role="status">${found.key && `${count(found.total)} of ${count(source.n_features)} features`}${note && ` ${note}`}</p>
    <${Failure} error=${found.error} />
    <div class="table" role="table" aria-label="Features" aria-rowcount=${found.total + 1} aria-busy=${found.stale}
      style=${{ "--columns": source.columns.map(name => COLUMNS[name].width).join(" ") }}>
      <${Head} columns=${source.columns} sort=${sort} order=${asked.order} ask=${ask} />
      <div class="rows" role="rowgroup" ref=${view.ref} onScroll=${view.onScroll} tabindex="-1">
        <div style=${{ height: `${found.total * view.height}px` }}>
          ${view.places(found.total).map(i => html`<${Row} key=${i} i=${i} row=${found.row(i)} top=${i * view.height}
            columns=${source.columns} href=${found.row(i) && href(i)} onFocus=${() => choose(i)} />`)}
        </div>
      </div>
    </div>
    <p class="soft small keys"><kbd>/</kbd> searches, <kbd>Enter</kbd> opens, <kbd>j</kbd> <kbd>k</kbd> or arrows go from row to row
      and from feature to feature, <kbd>Esc</kbd> leads back.</p>
  </section>`;
}

function Search({ value, onInput, onEnter }) {
  const [text, setText] = useState(value), wait = useRef(0), sent = useRef(value);
  if (value !== sent.current) { sent.current = value; setText(value); }  // back, forward, or another address
  const send = now => { clearTimeout(wait.current); if (now !== sent.current) { sent.current = now; onInput(now); } };
  const type = event => {
    const now = event.target.value;
    setText(now);
    clearTimeout(wait.current);
    wait.current = setTimeout(() => send(now), PAUSE);
  };
  useEffect(() => () => clearTimeout(wait.current), []);
  const press = event => {
    if (event.key === "Enter") { if (text === sent.current) onEnter(); else send(text); }
    if (event.key === "Escape") event.target.blur();
  };
  return html`<input id="search" type="search" value=${text} placeholder="Search labels and tokens" aria-label="Search labels and tokens"
    autocomplete="off" spellcheck=${false} onInput=${type} onKeyDown=${press} />`;
}

// On a narrow window, where rows have no headings.
function Order({ columns, sort, order, ask }) {
  return html`<span class="order"><select aria-label="Sort by" value=${sort} onChange=${event => ask(firstOrder(event.target.value))}>
      ${sort === "" && html`<option value="" selected>best match</option>`}
      ${columns.map(name => html`<option value=${name} selected=${name === sort}>${COLUMNS[name].title}</option>`)}
    </select>
    <button id="order" type="button" onClick=${() => ask(turned(sort, order))}>${order === "desc" ? "largest first" : "smallest first"}</button></span>`;
}

function firstOrder(name) {
  return { sort: name, order: COLUMNS[name].first };
}

function turned(sort, order) {
  return { sort, order: order === "desc" ? "asc" : "desc" };
}

function Head({ columns, sort, order, ask }) {
  const press = name => ask(name === sort ? turned(sort, order) : firstOrder(name));
  const said = { asc: "ascending", desc: "descending" };
  return html`<div class="headings" role="rowgroup"><div class="row" role="row" aria-rowindex="1">${columns.map(name => html`
    <span role="columnheader" class=${name} data-column=${name} aria-sort=${name === sort ? said[order] : "none"}>
      <button type="button" onClick=${() => press(name)}>${COLUMNS[name].title}</button></span>`)}</div></div>`;
}

function Row({ i, row, top, columns, href, onFocus }) {
  const style = { transform: `translateY(${top}px)` };
  if (!row) return html`<div class="row waiting" role="row" aria-rowindex=${i + 2} style=${style}><span role="cell">\u2026</span></div>`;
  return html`<div class="row" role="row" aria-rowindex=${i + 2} data-index=${i} data-feature=${row.feature} style=${style}>
    ${columns.map(name => html`<span role="cell" class=${name} data-name=${COLUMNS[name].title}>${name === "feature"
      ? html`<a href=${href} onFocus=${onFocus} aria-label=${`Feature ${row.feature} ${describeRow(row)}`}>${row.feature}</a>`
      : COLUMNS[name].cell(row)}</span>`)}</div>`;
}

// Which rows can be seen: rows have one height, which the style sheet sets for the width of the window.
function useView(at) {
  const ref = useRef(null);
  const [top, setTop] = useState(at), [size, setSize] = useState({ height: 36, room: 30 });
  useLayoutEffect(() => {
    const measure = () => {
      const height = parseFloat(getComputedStyle(ref.current).getPropertyValue("--row"));
      setSize({ height, room: Math.ceil(ref.current.clientHeight / height) });
    };
    const watch = new ResizeObserver(measure);
    measure();
    watch.observe(ref.current);
    return () => watch.disconnect();
  }, []);
  const { height, room } = size, first = Math.max(0, top - SPARE), last = top + room + SPARE;
  const scrollTo = row => { ref.current.scrollTop = row * height; };
  const show = row => {
    if (row <= ref.current.scrollTop / height) scrollTo(row);
    else if ((row + 1) * height > ref.current.scrollTop + ref.current.clientHeight) scrollTo(row + 2 - room);
  };
  const places = total => Array.from({ length: Math.max(0, Math.min(last, total - 1) - first + 1) }, (_, i) => first + i);
  const onScroll = () => setTop(Math.floor(ref.current.scrollTop / height));
  return { ref, top, height, first, last, places, scrollTo, show, onScroll };
}

// Rows by page, asked for when they come into view. Rows of the query before stay until the first of this one are there.
function usePages(source, asked, key, first, last) {
  const [shown, setShown] = useState({ key: "", total: 0, pages: {}, error: "" });
  const requests = useRef(null);
  useEffect(() => {
    requests.current = { controller: new AbortController(), pages: new Set() };
    return () => requests.current.controller.abort();
  }, [source, key]);
  const [from, to] = [Math.floor(first / PAGE), Math.floor(last / PAGE)];
  useEffect(() => {
    const { controller: { signal }, pages } = requests.current;
    for (let page = from; page <= to; page++) {
      if (pages.has(page) || (shown.key === key && page > from && page * PAGE >= shown.total)) continue;
      pages.add(page);
      source.features(asked, page * PAGE, PAGE, signal).then(
        ({ total, rows }) => signal.aborted || setShown(old => {
          const before = old.key === key && old.source === source ? old.pages : {};
          return { source, key, total, pages: { ...before, [page]: rows }, error: "" };
        }),
        error => { pages.delete(page); if (!signal.aborted) setShown(old => ({ ...old, error: error.message })); },
      );
    }
  }, [source, key, from, to, shown.key]);
  return { ...shown, stale: shown.key !== key, row: i => shown.pages[Math.floor(i / PAGE)]?.[i % PAGE] };
}

// The row that j and k have reached; its link gets the focus once it is drawn, so that Enter opens it.
function useChosenRow(view, found) {
  const [chosen, choose] = useState(-1), moved = useRef(false);
  useEffect(() => choose(-1), [found.key]);
  useLayoutEffect(() => {
    const link = moved.current && view.ref.current.querySelector(`[data-index="${chosen}"] a`);
    if (!link) return;
    moved.current = false;
    link.focus({ preventScroll: true });
  });
  const step = by => {
    const next = Math.min(Math.max(chosen < 0 ? view.top : chosen + by, 0), found.total - 1);
    moved.current = true;
    view.show(next);
    choose(next);
  };
  return { step, choose };
}
