// What a reader has chosen on a graph's page: in its address, and as JSON with the names that circuit-tracer's pages use.

const LINK_TYPES = ["both", "input", "output", "either"];

export function emptyState() {
  return { clicked: null, pinned: [], supernodes: [], labels: new Map(), linkType: "both", node: 0.8, edge: 0.98, positions: "", q: "" };
}

// `params` has texts, as an address does, or lists, as JSON does. Nodes that are not there are left out.
export function readParams(model, params, base = emptyState()) {
  const state = { ...base, labels: new Map(base.labels) }, place = id => model.places.get(id);
  const given = name => params[name] !== undefined && params[name] !== null;
  if (given("clickedId")) state.clicked = place(params.clickedId) ?? null;
  if (given("pinnedIds")) state.pinned = [...new Set(known(listOf(params.pinnedIds, text => text.split(",")), place))];
  if (given("supernodes")) {
    const groups = listOf(params.supernodes, JSON.parse).filter(group => Array.isArray(group) && typeof group[0] === "string");
    state.supernodes = groups.map(([name, ...ids]) => [name, known(ids, place)]).filter(([, nodes]) => nodes.length);
  }
  if (given("clerps")) {
    const pairs = listOf(params.clerps, JSON.parse).filter(pair => Array.isArray(pair) && pair.length === 2);
    state.labels = new Map(pairs.filter(([id]) => model.places.has(id)).map(([id, text]) => [place(id), String(text)]));
  }
  if (LINK_TYPES.includes(params.linkType)) state.linkType = params.linkType;
  if (given("pruningThreshold")) state.node = share(params.pruningThreshold, state.node);
  if (given("edgeThreshold")) state.edge = share(params.edgeThreshold, state.edge);
  if (given("sg_pos")) state.positions = String(params.sg_pos);
  if (given("q")) state.q = String(params.q);
  return state;
}

function known(ids, place) {
  return ids.map(place).filter(i => i !== undefined);
}

function listOf(value, parse) {
  try {
    const found = typeof value === "string" ? parse(value) : value;
    return Array.isArray(found) ? found : [];
  } catch {
    return [];
  }
}

function share(value, otherwise) {
  const x = Number(value);
  return x >= 0 && x <= 1 ? Math.round(100 * x) / 100 : otherwise;
}

export function writeParams(model, state) {
  const id = i => model.nodes.id[i];
  return {
    pinnedIds: state.pinned.map(id),
    supernodes: state.supernodes.map(([name, nodes]) => [name, ...nodes.map(id)]),
    linkType: state.linkType,
    clickedId: state.clicked === null ? "" : id(state.clicked),
    sg_pos: state.positions,
    pruningThreshold: state.node,
    edgeThreshold: state.edge,
    clerps: [...state.labels].map(([i, text]) => [id(i), text]),
  };
}

// The address of a state: what differs from the page's own beginning.
export function writeHash(model, state, base) {
  const params = { ...writeParams(model, state), q: state.q }, first = { ...writeParams(model, base), q: base.q };
  const search = new URLSearchParams();
  for (const [name, value] of Object.entries(params)) {
    if (JSON.stringify(value) === JSON.stringify(first[name])) continue;
    search.set(name, name === "pinnedIds" ? value.join(",") : typeof value === "object" ? JSON.stringify(value) : value);
  }
  return `#${search}`;
}

export function readHash(model, hash, base) {
  return readParams(model, Object.fromEntries(new URLSearchParams(hash.replace(/^#/, ""))), base);
}

export function toggled(list, i) {
  return list.includes(i) ? list.filter(j => j !== i) : [...list, i];
}

// A group of nodes, which leave the groups that they were in.
export function grouped(state, name, nodes) {
  const rest = state.supernodes.map(([other, held]) => [other, held.filter(i => !nodes.includes(i))]).filter(([, held]) => held.length);
  return { supernodes: [...rest, [name, nodes]], pinned: [...new Set([...state.pinned, ...nodes])], positions: "" };
}
