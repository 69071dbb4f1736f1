// A prompt token by token: the features of the token that is pressed, and the tokens that one feature colors.
import { html } from "./vendor/htm-preact-standalone.js";
import { short, visible } from "./format.js";
import { FeatureLink } from "./routes.js";

const STRONGEST = 0.75;  // opacity of the largest code: the text stays readable on it

// The token with the largest code, and the feature of that code.
export function strongest(tokens) {
  const sizes = tokens.map(({ codes }) => Math.max(0, ...codes.map(([, z]) => Math.abs(z))));
  const token = sizes.indexOf(Math.max(...sizes)), codes = tokens[token]?.codes ?? [];
  return { token, feature: codes.find(([, z]) => Math.abs(z) === sizes[token])?.[0] ?? null };
}

export function valuesOf(tokens, feature) {
  return tokens.map(({ codes }) => codes.find(([j]) => j === feature)?.[1] ?? 0);
}

// `values` are the codes of the feature that colors the words, `token` is the place of the word that is pressed.
export function PromptTokens({ words, values, token, feature, onToken }) {
  const scale = Math.max(...values.map(Math.abs)) || 1;
  const paint = z => ({ "--hue": `var(${z < 0 ? "--minus" : "--plus"})`, "--a": (STRONGEST * Math.abs(z) / scale).toFixed(2) });
  return html`<p class="prompt">${words.map((word, i) => html`<button type="button" key=${i} aria-pressed=${i === token}
    style=${paint(values[i])} title=${values[i] ? `${feature}: ${short(values[i])}` : ""} onClick=${() => onToken(i)}>${visible(word)}</button>`)}</p>`;
}

// `codes` are a feature, its code and, where they are ranked by something else, the score; `describe(feature)` is its label or text.
export function TokenFeatures({ source, codes, feature, describe, onFeature }) {
  if (!codes.length) return html`<p class="soft">No feature fires on this token.</p>`;
  return html`<ul class="fires">${codes.map(([j, z, score = z]) => html`<li key=${j}><${FeatureLink} source=${source} feature=${j} />
    <span class="said">${describe(j)}</span><span class="value" title=${score === z ? "" : `code ${short(z)}`}>${short(score)}</span>
    <button type="button" aria-pressed=${j === feature} onClick=${() => onFeature(j)} aria-label=${`Color the tokens of feature ${j}`}>color</button></li>`)}</ul>`;
}
