// What a view says that needs the model while there is none.
import { html } from "./vendor/htm-preact-standalone.js";

export function Waiting({ state, what }) {
  if (state === "ready") return null;
  const said = {
    none: `${what} need the language model: start the explorer with \`--model\`.`,
    loading: "The model is loading; everything else can be used meanwhile.",
  }[state] ?? state;
  return html`<p class="failure" role="status">${said}</p>`;
}
