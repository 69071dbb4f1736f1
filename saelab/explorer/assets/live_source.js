// The source of the explorer: the server's API.
import { readEvents } from "./event_stream.js";

const SILENT = "The explorer does not answer. Is `saelab explore` still running?";

async function request(path, { method = "GET", body, signal } = {}) {
  const content = body === undefined ? {} : { headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  const answer = await fetch(`api/${path}`, { method, signal, ...content }).catch(error => {
    throw error.name === "AbortError" ? error : new Error(SILENT);
  });
  if (answer.ok) return answer;
  const said = await answer.json().catch(() => ({}));
  throw new Error(said.error ?? `The server answered with status ${answer.status}.`);
}

async function ask(path, options) {
  return (await request(path, options)).json();
}

function search(values) {
  return new URLSearchParams(Object.entries(values).filter(([, value]) => value !== "" && value !== undefined));
}

// Other views hear of an edit, for they may show what it changed.
async function edit(path, method, body) {
  const said = await ask(path, { method, body });
  dispatchEvent(new Event("edited"));
  return said;
}

async function stream(path, body, signal, onEvent) {
  const answer = await request(path, { method: "POST", body, signal });
  await readEvents(answer.body, onEvent);
}

export function liveSource(about) {
  const { d_sae, signed } = about.store;
  const columns = ["feature", "label", "score", "density", "balance", "peak", "kind", "concept", "match"];
  const absent = { balance: !signed, concept: !about.has.concepts, match: !about.has.compare };
  const filters = ["sign", "kind", "labeled", "list", "author", "density_min", "density_max", "peak_min", "score_min", "concept_min", "match_min"];
  const named = name => `?${search({ name })}`;
  return {
    columns: columns.filter(name => !absent[name]),
    filters: filters.filter(name => !absent[{ sign: "balance", concept_min: "concept", match_min: "match" }[name]]),
    n_features: d_sae,
    has: () => true,
    place: feature => feature,
    options: async () => {
      const { lists } = await ask("lists");
      const own = names => ({ options: Object.fromEntries(names.map(name => [name, name])) });
      return { kind: own(Object.keys(about.kinds)), list: own(lists.map(({ name }) => name)) };
    },
    features: (query, offset, limit, signal) => ask(`features?${search({ ...query, offset, limit })}`, { signal }),
    feature: (j, signal) => ask(`features/${j}`, { signal }),
    expand: (j, row, before, after) => ask(`features/${j}/window?${search({ row, before, after })}`),
    examples: (j, group, side, offset, limit) => ask(`features/${j}/examples?${search({ group, side, offset, limit })}`),
    page: (name, signal) => ask(`pages/${name}`, { signal }),
    setLabel: (j, text, sign) => edit(`features/${j}/label`, "PUT", { text, sign }),
    chooseLabel: (j, author, sign) => edit(`features/${j}/choice`, "PUT", { author, sign }),
    deleteLabel: (j, author, sign) => edit(`features/${j}/label`, "DELETE", { author, sign }),
    setNote: (j, text) => edit(`features/${j}/note`, "PUT", { text }),
    lists: signal => ask("lists", { signal }),
    exports: signal => ask("exports", { signal }),
    setList: (name, features) => edit(`list${named(name)}`, "PUT", { features }),
    deleteList: name => edit(`list${named(name)}`, "DELETE"),
    addToList: (name, j) => edit(`list/${j}${named(name)}`, "POST"),
    removeFromList: (name, j) => edit(`list/${j}${named(name)}`, "DELETE"),
    setups: signal => ask("setups", { signal }),
    pinSetup: (name, setup) => edit(`setup${named(name)}`, "PUT", { setup }),
    deleteSetup: name => edit(`setup${named(name)}`, "DELETE"),
    history: signal => ask("history", { signal }),
    undo: () => edit("undo", "POST"),
    prompt: (body, signal) => ask("prompt", { method: "POST", body, signal }),
    steer: (body, signal, onEvent) => stream("steer", body, signal, onEvent),
    relabel: async (j, method, sign, signal, onEvent) => {
      await stream(`features/${j}/relabel`, { method, sign }, signal, onEvent);
      dispatchEvent(new Event("edited"));
    },
  };
}

export function readAbout(signal) {
  return ask("about", { signal });
}
