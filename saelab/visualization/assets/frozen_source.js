// The source of a report: rows and prompts that stand in the page, and cards that stand there or in files beside it.
import { WordSearch } from "./word_search.js";

const cards = {}, asked = {}, unpacked = [];

// What the page and each file call with their cards: JSON by feature, gzip, base64.
export function addCards(packed) {
  unpacked.push(unpack(packed).then(more => Object.assign(cards, more)));
}

async function unpack(packed) {
  const bytes = Uint8Array.from(atob(packed), character => character.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).json();
}

const LOWEST = { density_min: "density", peak_min: "peak", score_min: "score", match_min: "match" };
const LABELED = { yes: row => row.label, no: row => !row.label, person: row => row.by_person };
const SIGNS = {
  "+": row => row.n_positive && !row.n_negative,
  "-": row => row.n_negative && !row.n_positive,
  both: row => row.n_positive && row.n_negative,
};

export function frozenSource(data) {
  const { features: rows } = data, places = new Map(rows.map((row, i) => [row.feature, i]));
  const numbers = [...places.keys()].sort((a, b) => a - b);
  const byNumber = new Map(numbers.map((feature, i) => [feature, i]));
  const signed = rows.some(row => row.n_negative), scored = rows.some(row => "score" in row);
  const kinds = [...new Set(rows.map(row => row.kind))].sort(), authors = [...new Set(rows.flatMap(row => row.authors ?? []))].sort();
  const filters = [signed && "sign", kinds.length > 1 && "kind", authors.length && "labeled", authors.length > 1 && "author",
    "density_min", "density_max", "peak_min", scored && "score_min", data.compared && "match_min"].filter(Boolean);
  let last = { key: null, rows: [] };  // the list asks for page after page of one query
  const rest = window.requestIdleCallback ?? setTimeout;
  let search = null;  // made once the page stands, or when the first word is typed
  const makeSearch = () => search ??= new WordSearch(rows, row => [row.label, `${row.search} ${row.kind} ${row.partner ?? ""}`]);
  rest(makeSearch);

  function find(query) {
    const key = JSON.stringify(query);
    if (last.key !== key) last = { key, rows: order(query, rows.filter(row => isKept(row, query))) };
    return last.rows;
  }

  function order({ q = "", sort, order }, kept) {
    const down = order === "desc";
    if (!q.trim()) return kept.sort(comparing(sort || "density", down));
    const found = makeSearch().search(q), exact = places.get(Number(q));
    if (exact !== undefined) found.set(exact, [Infinity]);
    const rankOf = row => found.get(places.get(row.feature)), byDensity = comparing("density", true);
    const byRank = (a, b) => compareRanks(rankOf(b), rankOf(a)) || byDensity(a, b);
    return kept.filter(row => rankOf(row)).sort(sort ? comparing(sort, down) : byRank);
  }

  async function load(feature) {
    if (!places.has(feature)) throw new Error(`There is no feature ${feature} in this report.`);
    if (data.files.length) await loadFile(data.files[Math.floor(places.get(feature) / data.per_file)]);
    await Promise.all(unpacked);
    return { feature, card: cards[feature] };
  }

  const own = names => ({ type: "", options: Object.fromEntries(names.map(name => [name, name])) });
  return {
    columns: ["feature", "label", scored && "score", "density", signed && "balance", "peak", "kind", data.compared && "match"].filter(Boolean),
    filters,
    options: async () => ({ kind: own(kinds), author: own(authors) }),
    n_features: rows.length,
    place: feature => byNumber.get(feature) ?? 0,
    features: async (query, offset, limit) => {
      const found = find(query);
      return { total: found.length, offset, rows: found.slice(offset, offset + limit) };
    },
    feature: load,
    has: feature => places.has(feature),
    describe: feature => {
      const row = rows[places.get(feature)];
      return row ? row.label || row.snippet.join("") : "";
    },
    prompts: data.prompts,
  };
}

// Whether a row passes the filters of a query, which are those of the explorer (saelab/explorer/catalog.py).
function isKept(row, query) {
  const { sign, kind, labeled, author, density_max } = query;
  if (sign && !SIGNS[sign]?.(row)) return false;
  if (kind && row.kind !== kind) return false;
  if (labeled && !LABELED[labeled]?.(row)) return false;
  if (author && !row.authors?.includes(author)) return false;
  if (density_max && !(row.density <= Number(density_max))) return false;
  return Object.entries(LOWEST).every(([name, field]) => !query[name] || sizeOf(row, field) >= Number(query[name]));
}

function sizeOf(row, field) {
  return field === "match" ? Math.abs(row.match ?? NaN) : row[field];  // flipped partners match as well
}

function compareRanks(a, b) {
  for (let i = 0; i < Math.max(a.length, b.length); i++) if ((a[i] ?? 0) !== (b[i] ?? 0)) return (a[i] ?? 0) - (b[i] ?? 0);
  return 0;
}

function comparing(column, down) {
  const keyOf = {
    label: row => (row.label || row.snippet.join("")).trim(),
    match: row => (row.match === null ? null : Math.abs(row.match)),
  }[column] ?? (row => row[column] ?? null);
  return (a, b) => {
    const [x, y] = [keyOf(a), keyOf(b)];
    if (x === null || y === null) return (x === null) - (y === null) || a.feature - b.feature;  // the unknown comes last
    const order = typeof x === "string" ? x.localeCompare(y) : x - y;
    return (down ? -order : order) || a.feature - b.feature;
  };
}

function loadFile(file) {
  return asked[file] ??= new Promise((resolve, reject) => {
    const script = document.createElement("script");
    const fail = () => {
      delete asked[file];
      reject(new Error(`The file ${file} is missing: it must lie beside this page.`));
    };
    Object.assign(script, { src: file, onload: resolve, onerror: fail });
    document.head.append(script);
  });
}
