// One feature: its card, and the way to the features before and after it in the list it came from.
import { html, useEffect } from "./vendor/htm-preact-standalone.js";
import { FeatureCard } from "./feature_card.js";
import { count } from "./format.js";
import { Failure, useKeys, useLoaded } from "./loading.js";
import { go, useTitle, writeRoute } from "./routes.js";

const BY_NUMBER = { sort: "feature", order: "asc" };

// `query` has the list's search and order, and `at`, the feature's place in it; without them features go by number.
export function FeatureSteps({ source, feature, query }) {
  const { at, ...rest } = query;
  const asked = at === undefined ? BY_NUMBER : rest, place = at === undefined ? source.place(feature) : Number(at) || 0;
  const { value: near } = useLoaded(signal => source.features(asked, Math.max(place - 1, 0), 3, signal), [feature, JSON.stringify(query)]);
  const address = i => {
    const row = near && i >= 0 && near.rows[i - near.offset];
    return row && writeRoute("feature", row.feature, at === undefined ? {} : { ...rest, at: i });
  };
  const before = address(place - 1), after = address(place + 1);
  const list = writeRoute("features", "", at === undefined ? {} : { ...rest, at: place || "" });
  const keys = { Escape: () => go(list) };
  for (const key of ["j", "ArrowRight"]) keys[key] = () => after && go(after);
  for (const key of ["k", "ArrowLeft"]) keys[key] = () => before && go(before);
  useKeys(keys);
  return html`<nav class="steps" aria-label="Features in order">
    <${Step} href=${before}>Previous<//><${Step} href=${after}>Next<//>
    <a href=${list}>All features</a>
    ${near && html`<span class="soft small">${count(place + 1)} of ${count(near.total)}</span>`}</nav>`;
}

function Step({ href, children }) {
  return href ? html`<a class="button" href=${href}>${children}</a>` : html`<span class="button" aria-disabled="true">${children}</span>`;
}

// `version` changes when the feature is to be loaded again; `above` and `below` draw what the source answered around the card.
export function FeatureView({ source, feature, query, version, above, below }) {
  const { value, error } = useLoaded(signal => source.feature(feature, signal), [source, feature, version]);
  useEffect(() => scrollTo(0, 0), [feature]);
  const label = value?.feature === feature ? value.card.label : "";
  useTitle(`Feature ${feature}${label && `: ${label}`}`);
  return html`<section class="feature-page" aria-label=${`Feature ${feature}`}>
    <${FeatureSteps} source=${source} feature=${feature} query=${query} />
    <${Failure} error=${error} />
    ${value && above?.(value)}
    ${value && html`<${FeatureCard} key=${feature} card=${value.card} source=${source} />`}
    ${value && below?.(value)}
  </section>`;
}
