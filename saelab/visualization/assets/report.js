// The page of `saelab report`: the explorer's list, feature and prompt components on data that stand in the page.
import { html, render, useLayoutEffect, useRef, useState } from "./vendor/htm-preact-standalone.js";
import { FeatureList, openSearch } from "./feature_list.js";
import { FeatureView } from "./feature_view.js";
import { addCards, frozenSource } from "./frozen_source.js";
import { useKeys } from "./loading.js";
import { PromptTokens, strongest, TokenFeatures, valuesOf } from "./prompt_reading.js";
import { featureOf, go, replace, useRoute, useTitle, writeRoute } from "./routes.js";

const read = id => JSON.parse(document.getElementById(id).textContent);
const source = frozenSource(read("data")), summary = document.getElementById("summary").content;
window.addCards = addCards;  // what the files of cards call
addCards(read("cards"));

function Prompt({ words, codes }) {
  const tokens = codes.map(pairs => ({ codes: pairs }));
  const [chosen, choose] = useState(strongest(tokens));
  return html`<section>
    <${PromptTokens} words=${words} values=${valuesOf(tokens, chosen.feature)} ...${chosen} onToken=${token => choose({ ...chosen, token })} />
    ${tokens[chosen.token] && html`<${TokenFeatures} source=${source} codes=${tokens[chosen.token].codes} feature=${chosen.feature}
      describe=${source.describe} onFeature=${feature => choose({ ...chosen, feature })} />`}</section>`;
}

function Prompts() {
  return html`<section><h2 class="unseen">Prompts</h2>
    <p class="soft">Press a token for the features that fire there.</p>
    ${source.prompts.map((prompt, i) => html`<${Prompt} key=${i} ...${prompt} />`)}</section>`;
}

function Report() {
  const { view, id, query } = useRoute();
  const open = ["feature", "prompts", "summary"].includes(view) ? view : "features";
  useKeys(open === "features" ? {} : { "/": openSearch });
  useTitle({ features: query.q ? `Features: ${query.q}` : "Features", prompts: "Prompts", summary: "Summary" }[open]);
  if (open === "prompts" || open === "summary") return html`<${Tabs} open=${open} /><${open === "prompts" ? Prompts : Summary} />`;
  return html`<${Tabs} open="features" />${open === "feature"
    ? html`<${FeatureView} source=${source} feature=${featureOf(id)} query=${query} />`
    : html`<${FeatureList} source=${source} query=${query} onQuery=${asked => replace(writeRoute("features", "", asked))} />`}`;
}

function Summary() {
  const ref = useRef(null);
  useLayoutEffect(() => ref.current.replaceChildren(summary.cloneNode(true)), []);
  return html`<div ref=${ref} />`;
}

function Tabs({ open }) {
  const names = { features: "Features", ...(source.prompts.length && { prompts: "Prompts" }), summary: "Summary" };
  useKeys(open === "features" ? {} : { Escape: () => go(writeRoute("features")) });
  return html`<nav class="views" aria-label="Views">${Object.entries(names).map(([name, title]) =>
    html`<a href=${writeRoute(name)} aria-current=${name === open ? "page" : null}>${title}</a>`)}</nav>`;
}

const root = document.getElementById("report");
root.replaceChildren();
render(html`<${Report} />`, root);
