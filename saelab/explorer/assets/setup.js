// A steering set-up: prompt, features with strengths, and how tokens are sampled; as text for an address.

export const EMPTY = { prompt: "", features: [], n_tokens: 40, temperature: 0.8, top_k: null, top_p: null, seed: 0, random: true };
export const MODES = {
  add: "add to the code", clamp: "set the code", floor: "at least", scale: "times the code", ablate: "switch off",
};
export const UNITS = { max: "\u00d7 largest code", raw: "in codes", norm: "\u00d7 activation's norm" };
const STRENGTH = { mode: "add", unit: "max", strength: 1 };

let latest = EMPTY;  // of this visit: where "Add to steering" adds to

export function readSetup(query) {
  if (!query.setup) return latest;
  try {
    latest = { ...EMPTY, ...JSON.parse(query.setup) };
  } catch {
    latest = EMPTY;  // a cut address is an empty set-up
  }
  return latest;
}

export function writeSetup(setup) {
  return { setup: JSON.stringify(setup) };
}

export function withFeature(setup, feature) {
  const there = setup.features.some(one => one.feature === feature);
  return there ? setup : { ...setup, features: [...setup.features, { feature, ...STRENGTH }] };
}

export function addToSetup(feature) {
  return writeSetup(withFeature(latest, feature));
}

// Ends of the slider; a number typed beside it may lie beyond.
export function rangeOf({ mode, unit }) {
  if (mode === "scale") return [-2, 5];
  return { max: [-5, 5], raw: [-50, 50], norm: [-1, 1] }[unit];
}
