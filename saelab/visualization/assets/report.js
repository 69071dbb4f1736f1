"use strict";
// The page's data and the cards of a single page stand in <script type="application/json">, which runs nothing: this is
// the only script that the page's policy lets run. Cards are HTML that Python has escaped; those of a large report lie in
// files next to it that are loaded when they are needed. Everything else is put in as text, never as HTML.
const byId = id => document.getElementById(id);
const data = JSON.parse(byId("data").textContent);
const COLUMNS = ["feature", "text", "density", "balance", "peak", "kind"];
const NAMES = { feature: "feature", text: "label and text", density: "density", balance: "negative", peak: "peak", kind: "kind" };
NAMES.similarity = data.compared;
if (data.compared) COLUMNS.push("similarity");
const PAGE = 200;
const cards = JSON.parse(byId("cards").textContent), asked = {};
const rowOf = new Map(data.features.map((row, i) => [row.feature, i]));
let sort = { column: "density", down: true }, found = data.features, shown = 0;

function addCards(more) { Object.assign(cards, more); }

function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  Object.assign(element, properties);
  element.append(...children);
  return element;
}

// ---- the list
function keyOf(row) {
  const value = row[sort.column];
  return sort.column === "similarity" && value !== null ? Math.abs(value) : value;  // flipped partners are as similar
}

function compare(a, b) {
  const [x, y] = [keyOf(a), keyOf(b)];
  if (x === null || y === null) return (x === null) - (y === null);  // what is not known comes last
  const order = typeof x === "string" ? x.localeCompare(y) : x - y;
  return (sort.down ? -order : order) || a.feature - b.feature;
}

function textOf(row) { return row.haystack ??= `${row.feature} ${row.label} ${row.kind} ${row.search} ${row.partner ?? ""}`.toLowerCase(); }

function search() {
  const words = byId("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  found = data.features.filter(row => words.every(word => textOf(row).includes(word))).sort(compare);
  byId("count").textContent = `${found.length.toLocaleString("en")} of ${data.features.length.toLocaleString("en")} features`;
  byId("body").replaceChildren();
  shown = 0;
  more();
  for (const th of document.querySelectorAll("#rows th")) {
    if (th.dataset.column === sort.column) th.setAttribute("aria-sort", sort.down ? "descending" : "ascending");
    else th.removeAttribute("aria-sort");
  }
  byId("sort").value = sort.column;
  byId("order").textContent = sort.down ? "largest first" : "smallest first";
}

function more() {
  byId("body").append(...found.slice(shown, shown + PAGE).map(line));
  shown = Math.min(shown + PAGE, found.length);
  byId("more").hidden = shown === found.length;
}

function similarity(row) {
  if (row.similarity === null) return make("td", { className: "soft", textContent: "none" });
  const sign = row.similarity < 0 ? "\u2212" : "+", text = sign + Math.abs(row.similarity).toFixed(3);
  const title = `partner ${row.partner}, ${row.universal ? "" : "not "}universal`;
  return make("td", { title, textContent: text, className: row.universal ? "universal" : "soft" });
}

function line(row) {
  const [before, center, after] = row.snippet;
  const text = make("td", {}, make("span", { className: "label", textContent: row.label }),
    make("span", { className: "text" }, before, make("b", { textContent: center }), after));
  const sides = make("td", {});
  if (row.balance !== null) {
    const bar = make("span", { className: "sides", title: `${(100 * row.balance).toFixed(1)} % negative` }, make("span"));
    bar.firstChild.style.width = `${100 * row.balance}%`;
    sides.append(bar);
  }
  const cells = [make("td", {}, make("a", { href: `#feature=${row.feature}`, textContent: row.feature })), text,
    make("td", { textContent: row.density ? `${(100 * row.density).toPrecision(3)} %` : "0" }), sides,
    make("td", { textContent: row.peak.toPrecision(3) }), make("td", { textContent: row.kind })];
  if (data.compared) cells.push(similarity(row));
  cells.forEach((cell, i) => { cell.dataset.name = NAMES[COLUMNS[i]]; });
  const tr = make("tr", { onclick: () => { location.hash = `feature=${row.feature}`; } }, ...cells);
  tr.dataset.feature = row.feature;
  return tr;
}

function sortBy(column) {
  sort = { column, down: sort.column === column ? !sort.down : !["feature", "text", "kind"].includes(column) };
  search();
}

// ---- one feature
function load(feature) {
  if (feature in cards) return Promise.resolve();
  const file = data.files[Math.floor(rowOf.get(feature) / data.per_file)];
  return asked[file] ??= new Promise((resolve, reject) => {
    const script = make("script", { src: file, onload: resolve, onerror: () => { delete asked[file]; reject(file); } });
    document.head.append(script);
  });
}

async function openFeature(feature) {
  if (!rowOf.has(feature)) return byId("card").replaceChildren(`There is no feature ${feature} in this report.`);
  try { await load(feature); } catch (file) {
    return byId("card").replaceChildren(`The file ${file} is missing: it must be in the folder of this page.`);
  }
  if (location.hash === `#feature=${feature}`) byId("card").innerHTML = cards[feature];
}

function step(by) {
  const here = found.findIndex(row => `#feature=${row.feature}` === location.hash);
  const next = found[here < 0 ? 0 : Math.min(Math.max(here + by, 0), found.length - 1)];
  if (next) location.hash = `feature=${next.feature}`;
}

// ---- prompts
function drawPrompt(prompt) {
  const list = make("div", { className: "fires" }), text = make("p", { className: "prompt" });
  const tokens = prompt.words.map((word, i) => {
    const button = make("button", { type: "button", textContent: word, ariaPressed: "false" });
    button.onclick = () => { tokens.forEach(other => { other.ariaPressed = String(other === button); }); fires(i); };
    return button;
  });
  function paint(feature) {
    const values = prompt.codes.map(codes => (codes.find(([j]) => j === feature) ?? [0, 0])[1]);
    const scale = Math.max(...values.map(Math.abs)) || 1;
    tokens.forEach((token, i) => {
      token.style.setProperty("--hue", `var(${values[i] < 0 ? "--minus" : "--plus"})`);
      token.style.setProperty("--a", (0.75 * Math.abs(values[i]) / scale).toFixed(2));
      token.title = values[i] ? `${feature}: ${values[i].toPrecision(3)}` : "";
    });
  }
  function fires(i) {
    list.replaceChildren(...prompt.codes[i].flatMap(([feature, value]) => {
      const known = rowOf.has(feature), row = known ? data.features[rowOf.get(feature)] : null;
      const name = known ? make("a", { href: `#feature=${feature}`, textContent: feature }) : make("span", { textContent: feature });
      const color = make("button", { type: "button", textContent: "color", onclick: () => paint(feature) });
      return [name, make("span", { textContent: row ? row.label || row.snippet.join("") : "" }),
        make("span", { textContent: value.toPrecision(3) }), color];
    }));
  }
  text.append(...tokens);
  const strongest = prompt.codes.map(codes => codes.length ? Math.abs(codes[0][1]) : 0);
  const first = strongest.indexOf(Math.max(...strongest));
  if (first >= 0 && prompt.codes[first].length) { tokens[first].click(); paint(prompt.codes[first][0][0]); }
  return make("section", {}, text, list);
}

// ---- which view is open; a view's id is not the hash that opens it, or the browser would scroll to it
function show() {
  const [view, value] = location.hash.slice(1).split("=");
  const open = ["feature", "prompts", "summary"].includes(view) ? view : "list";
  for (const name of ["list", "feature", "prompts", "summary"]) byId(`view-${name}`).hidden = name !== open;
  for (const link of document.querySelectorAll("nav a")) {
    const current = link.hash === `#${open}` || (open === "feature" && link.hash === "#list");
    if (current) link.setAttribute("aria-current", "page"); else link.removeAttribute("aria-current");
  }
  if (open === "feature") { openFeature(Number(value)); window.scrollTo(0, 0); }
}

document.addEventListener("keydown", event => {
  const typing = event.target instanceof Element && event.target.matches("input, select");
  if (event.key === "Escape") { if (typing) event.target.blur(); else location.hash = "list"; }
  if (typing && event.key === "Enter") step(0);
  if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "/") { event.preventDefault(); location.hash = "list"; show(); byId("search").focus(); }
  if (event.key === "ArrowRight" || event.key === "j") step(1);
  if (event.key === "ArrowLeft" || event.key === "k") step(-1);
});

byId("search").oninput = search;
byId("more").onclick = more;
byId("sort").append(...COLUMNS.map(name => make("option", { value: name, textContent: NAMES[name] })));
byId("sort").onchange = event => sortBy(event.target.value);
byId("order").onclick = () => sortBy(sort.column);
byId("head").append(...COLUMNS.map(name => {
  const th = make("th", {}, make("button", { type: "button", textContent: NAMES[name], onclick: () => sortBy(name) }));
  th.dataset.column = name;
  return th;
}));
byId("next").onclick = () => step(1);
byId("previous").onclick = () => step(-1);
byId("given").append(...data.prompts.map(drawPrompt));
window.onhashchange = show;
search();
show();
