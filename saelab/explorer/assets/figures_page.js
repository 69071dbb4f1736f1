// Pages of tables and figures that Python makes: dead latents, evaluation, comparison, attribution.
import { html } from "./vendor/htm-preact-standalone.js";
import { Chart } from "./chart.js";
import { Failure, useLoaded } from "./loading.js";

// HTML that Python has escaped; nothing else is ever put in as HTML.
function Escaped({ content }) {
  return html`<div dangerouslySetInnerHTML=${{ __html: content }} />`;
}

export function FiguresPage({ source, name, title, version }) {
  const { value, error, loading } = useLoaded(signal => source.page(name, signal), [name, version]);
  return html`<section class="figures" aria-busy=${loading}><h2>${value?.title ?? title}</h2>
    <${Failure} error=${error} />
    <p class="soft" role="status">${loading && "drawing \u2026"}</p>
    ${value && html`<${Escaped} content=${value.html} />
      ${value.figures.map((figure, i) => html`<${Chart} key=${i} figure=${figure} />`)}`}</section>`;
}
