// A widget of a notebook: a feature card, the prompt view or the steering panel, in a style of its own.
import { html, render as draw, useState } from "./vendor/htm-preact-standalone.js";
import { addExpanders } from "./expanding.js";
import { Escaped } from "./feature_view.js";
import { Failure, useLoaded } from "./loading.js";
import { PromptPage } from "./prompt_page.js";
import { SteeringPage } from "./steering_page.js";
import { widgetSource } from "./widget_source.js";

const ABOUT = { can: { edit: false, steer: false } };

// The card of one feature; its links to others show them in its place.
function FeatureCard({ source, query, setQuery }) {
  const feature = Number(query.feature), [failed, setFailed] = useState("");
  const { value, error } = useLoaded(signal => source.feature(feature, signal), [feature]);
  const extend = root => addExpanders(root, {
    window: (row, before, after) => source.expand(feature, row, before, after),
    examples: (group, side, offset, limit) => source.examples(feature, group, side, offset, limit),
    fail: setFailed,
  });
  const follow = event => {
    const [, number] = event.target.closest("a")?.getAttribute("href")?.match(/^#feature=(\d+)$/) ?? [];
    if (number === undefined) return;
    event.preventDefault();
    setQuery({ feature: number });
  };
  return html`<div onClick=${follow}><${Failure} error=${error || failed} />
    ${value && html`<${Escaped} content=${value.card} onDraw=${extend} />`}</div>`;
}

const VIEWS = { feature: FeatureCard, prompt: PromptPage, steering: SteeringPage };

// What the reader does is kept in the widget's state, so that Python can read it and another view shows the same.
function Widget({ model, source }) {
  const [query, setQuery] = useState(model.get("query")), View = VIEWS[model.get("view")];
  const keep = asked => {
    setQuery(asked);
    model.set("query", asked);
    model.save_changes();
  };
  return html`<main class="widget"><${View} source=${source} about=${ABOUT} state="ready" query=${query} setQuery=${keep} /></main>`;
}

// Jupyter's and VS Code's own choice, which need not be the system's.
function theme() {
  const { dataset, classList } = document.body;
  if (dataset.jpThemeLight === "false" || classList.contains("vscode-dark")) return "dark";
  return dataset.jpThemeLight === "true" || classList.contains("vscode-light") ? "light" : "";
}

export function render({ model, el }) {
  const host = document.createElement("div"), root = host.attachShadow({ mode: "open" });
  const style = new CSSStyleSheet(), source = widgetSource(model);
  style.replaceSync(model.get("style"));
  root.adoptedStyleSheets = [style];
  const follow = () => { host.dataset.theme = theme(); }, watch = new MutationObserver(follow);
  follow();
  watch.observe(document.body, { attributes: true });
  el.append(host);
  draw(html`<${Widget} model=${model} source=${source} />`, root);
  return () => {
    draw(null, root);
    watch.disconnect();
    source.close();
  };
}
