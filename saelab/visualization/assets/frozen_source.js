// The source of a report: rows and prompts that stand in the page, and cards that stand there or in files beside it.

// Cards that files bring: each calls `addCards`.
const cards = {}, asked = {};

export function addCards(more) {
  Object.assign(cards, more);
}

export function frozenSource(data) {
  const places = new Map(data.features.map((row, i) => [row.feature, i]));
  const numbers = [...places.keys()].sort((a, b) => a - b);
  const byNumber = new Map(numbers.map((feature, i) => [feature, i]));
  const signed = data.features.some(row => row.n_negative);
  let last = { key: null, rows: [] };  // the list asks for page after page of one query

  function sorted({ q = "", sort, order }) {
    sort ||= "density";
    const key = JSON.stringify([q, sort, order]);
    if (last.key !== key) {
      const words = q.toLowerCase().split(/\s+/).filter(Boolean);
      const rows = data.features.filter(row => words.every(word => textOf(row).includes(word)));
      last = { key, rows: rows.sort(comparing(sort, order === "desc")) };
    }
    return last.rows;
  }

  async function load(feature) {
    if (!places.has(feature)) throw new Error(`There is no feature ${feature} in this report.`);
    if (!(feature in cards)) await loadFile(data.files[Math.floor(places.get(feature) / data.per_file)]);
    return { feature, card: cards[feature] };
  }

  return {
    columns: ["feature", "label", "density", ...(signed ? ["balance"] : []), "peak", "kind", ...(data.compared ? ["match"] : [])],
    filters: [],
    n_features: data.features.length,
    place: feature => byNumber.get(feature) ?? 0,
    features: async (query, offset, limit) => {
      const rows = sorted(query);
      return { total: rows.length, offset, rows: rows.slice(offset, offset + limit) };
    },
    feature: load,
    has: feature => places.has(feature),
    describe: feature => {
      const row = data.features[places.get(feature)];
      return row ? row.label || row.snippet.join("") : "";
    },
    prompts: data.prompts,
  };
}

function textOf(row) {
  return row.haystack ??= `${row.feature} ${row.label} ${row.kind} ${row.search} ${row.partner ?? ""}`.toLowerCase();
}

function comparing(column, down) {
  const keyOf = {
    label: row => row.text,
    match: row => (row.match === null ? null : Math.abs(row.match)),  // flipped partners match as well
  }[column] ?? (row => row[column]);
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
