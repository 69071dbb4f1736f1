// Addresses of views, such as `#/features?sort=peak` and `#/feature/12`. A view keeps all of its state in its address, so
// that a copied address shows the same again and the browser's back and forward work without help.
import { html, useEffect, useLayoutEffect, useState } from "./vendor/htm-preact-standalone.js";

const OLD_NAMES = { "": "features", list: "features" };  // addresses of reports once were `#list` and `#feature=12`

export function readRoute(hash) {
  const [path, query = ""] = hash.replace(/^#\/?/, "").split("?");
  const [view, id = ""] = path.replace("=", "/").split("/");
  return { view: OLD_NAMES[view] ?? view, id, query: Object.fromEntries(new URLSearchParams(query)) };
}

export function writeRoute(view, id = "", query = {}) {
  const given = Object.entries(query).filter(([, value]) => value !== "" && value !== null && value !== undefined);
  const search = new URLSearchParams(given).toString();
  return `#/${view}${id === "" ? "" : `/${id}`}${search ? `?${search}` : ""}`;
}

// The feature that an address names: a number, or what stands in its place, which no source has.
export function featureOf(id) {
  return /^\d+$/.test(id) ? Number(id) : id;
}

export function go(address) {
  location.hash = address;
}

// Changes the address without a new entry in the history, as for every letter that is typed.
export function replace(address) {
  if (address === location.hash) return;
  history.replaceState(null, "", address);
  dispatchEvent(new Event("hashchange"));
}

export function useRoute() {
  const [hash, setHash] = useState(location.hash);
  useLayoutEffect(() => {
    const read = () => setHash(location.hash);
    addEventListener("hashchange", read);
    return () => removeEventListener("hashchange", read);
  }, []);
  return readRoute(hash);
}

const TITLE = document.title;

// The window's title: what is shown, before the page's own. A view inside of another that has set none sets it.
export function useTitle(shown) {
  useEffect(() => { if (shown) document.title = `${shown} \u00b7 ${TITLE}`; }, [shown]);
}

// A feature's number, as a link to its page where the source has one.
export function FeatureLink({ source, feature }) {
  return source.has(feature) ? html`<a href=${writeRoute("feature", feature)}>${feature}</a>` : html`<span>${feature}</span>`;
}
