// The explorer: views by address, with the state of the model and the choice of theme above them.
import { html, render, useEffect, useRef, useState } from "./vendor/htm-preact-standalone.js";
import { Undo } from "./edits.js";
import { ExplorerFeature } from "./explorer_feature.js";
import { FeatureList, openSearch } from "./feature_list.js";
import { FiguresPage } from "./figures_page.js";
import { ListsPage } from "./lists_page.js";
import { liveSource, readAbout } from "./live_source.js";
import { Failure, useKeys, useLoaded } from "./loading.js";
import { PromptPage } from "./prompt_page.js";
import { featureOf, go, replace, useRoute, useTitle, writeRoute } from "./routes.js";
import { SteeringPage } from "./steering_page.js";

const TITLES = {
  features: "Features", prompt: "Prompt", steer: "Steering", dead: "Dead latents", evaluation: "Evaluation",
  compare: "Comparison", attribution: "Attribution", lists: "Lists",
};
const PAGES = ["dead", "evaluation", "compare", "attribution"];  // there where the explorer has what they show

function Explorer({ about, again }) {
  const [source] = useState(() => liveSource(about));
  const { view, id, query } = useRoute(), state = about.model_state;
  const counting = about.index_state !== "ready", comparing = about.comparison_state === "comparing";
  useAgain(state === "loading" || counting || comparing, again);
  const there = Object.keys(TITLES).filter(name => !PAGES.includes(name) || about.views.includes(name));
  const open = there.includes(view) || view === "feature" ? view : "features";
  const setQuery = (asked, entry = false) => (entry ? go : replace)(writeRoute(open, id, asked));
  const shared = { source, about, state, query, setQuery };
  const main = useRef(null);
  useEffect(() => {  // where the link that was followed is gone, a reader of the page goes on at its content
    if (document.activeElement === document.body) main.current.focus({ preventScroll: true });
  }, [open, id]);
  useTitle(open === "features" && query.q ? `Features: ${query.q}` : TITLES[open]);
  useKeys(open === "features" ? {} : { "/": openSearch, ...(open !== "feature" && { Escape: () => go(writeRoute("features")) }) });
  return html`
    <header><div class="top"><h1>${about.title}</h1><${Model} state=${state} /><${Theme} /></div>
      <nav class="views" aria-label="Views">${there.map(name => html`<a href=${writeRoute(name)}
        aria-current=${name === open || (open === "feature" && name === "features") ? "page" : null}>${TITLES[name]}</a>`)}</nav></header>
    <main ref=${main} tabindex="-1">
      ${open === "features" && html`<${FeatureList} source=${source} query=${query} onQuery=${setQuery} version=${`${counting} ${comparing}`}
        note=${counting && "Tokens are still being counted: a search may miss some."} />`}
      ${open === "feature" && html`<${ExplorerFeature} key=${id} feature=${featureOf(id)} ...${shared} />`}
      ${open === "prompt" && html`<${PromptPage} ...${shared} />`}
      ${open === "steer" && html`<${SteeringPage} ...${shared} />`}
      ${PAGES.includes(open) && html`<${FiguresPage} key=${open} name=${open} title=${TITLES[open]} version=${comparing} ...${shared} />`}
      ${open === "lists" && html`<${ListsPage} ...${shared} />`}
    </main>
    ${about.can.edit && open !== "lists" && html`<footer><${Undo} source=${source} /></footer>`}`;
}

// Reads again what there is while the model loads, tokens are counted, or stores compared: then there is more to show.
function useAgain(growing, again) {
  useEffect(() => {
    if (!growing) return undefined;
    const wait = setInterval(again, 1000);
    return () => clearInterval(wait);
  }, [growing]);
}

function Model({ state }) {
  const said = { none: "no model", loading: "the model is loading \u2026", ready: "model ready" }[state] ?? state;
  return html`<span class="soft small" role="status">${said}</span>`;
}

function Theme() {
  const root = document.documentElement, system = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  const [theme, setTheme] = useState(root.dataset.theme ?? system), other = theme === "dark" ? "light" : "dark";
  const turn = () => {
    root.dataset.theme = other;
    try { localStorage.setItem("saelab-theme", other); } catch { /* then it lasts as long as the page */ }
    setTheme(other);
    dispatchEvent(new Event("theme"));
  };
  return html`<button type="button" class="theme" onClick=${turn}>${other === "dark" ? "Dark" : "Light"} theme</button>`;
}

function Start() {
  const { value, error, again } = useLoaded(readAbout, []);
  if (error && !value) return html`<main><${Failure} error=${error} /></main>`;
  return value && html`<${Explorer} about=${value} again=${again} />`;
}

document.body.replaceChildren();
render(html`<${Start} />`, document.body);
