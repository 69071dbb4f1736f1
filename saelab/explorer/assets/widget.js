// A widget of a notebook: a feature card, the prompt view or the steering panel, in a style of its own.
import { html, render as draw, useState } from "./vendor/htm-preact-standalone.js";
import { FeatureCard } from "./feature_card.js";
import { Failure, useLoaded } from "./loading.js";
import { PromptPage } from "./prompt_page.js";
import { SteeringPage } from "./steering_page.js";
import { widgetSource } from "./widget_source.js";

const ABOUT = { can: { edit: false, steer: false } };

// The card of one feature; its links to others show them in its place.
function FeatureWidget({ source, query, setQuery }) {
  const feature = Number(query.feature), { value, error } = useLoaded(signal => source.feature(feature, signal), [feature]);
  return html`<${Failure} error=${error} />
    ${value && html`<${FeatureCard} key=${value.feature} card=${value.card} source=${source} onFeature=${j => setQuery({ feature: j })} />`}`;
}

const VIEWS = { feature: FeatureWidget, prompt: PromptPage, steering: SteeringPage };

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
