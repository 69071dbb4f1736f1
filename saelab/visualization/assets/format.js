// Numbers as text, the same in every view.

export const MINUS = "\u2212";

export function known(x) {
  return x !== null && x !== undefined;
}

export function short(x) {
  return known(x) ? String(Number(x.toPrecision(3))).replace("-", MINUS) : "";
}

export function signed(x, digits = 3) {
  return known(x) ? (x < 0 ? MINUS : "+") + Math.abs(x).toFixed(digits) : "";
}

export function percent(x) {
  if (!known(x)) return "";
  return x ? `${Number((100 * x).toPrecision(3))} %` : "0";
}

export function count(n) {
  return n.toLocaleString("en");
}

// Tokens with their line breaks and tabs made visible, as Python's cards show them.
export function visible(token) {
  return token.replaceAll("\n", "\u21b5").replaceAll("\t", "\u21e5").replaceAll("\r", "\u240d");
}
