// Places of nodes: a row for the embeddings, one for each dictionary, one for the logits on top; a column for each token.

const STEP = 13, LINE = 14, GAP = 12, MARGIN = 8, ROW_GAP = 16, LABELS = 64, MOST_WIDE = 14, LEAST_HIGH = 380;
const MOST_LOGITS = 1000, LOGIT_STEP = 24;  // so that their slanted names do not meet
export const TOP = 86;
export const BOTTOM = 76;

export function layoutGraph(model, kept, width) {
  const rows = rowsOf(model), rowOf = i => rows.index.get(rows.key(i));
  const last = rows.logits ? rows.names.length - 1 : -1, answers = new Array(model.tokens.length).fill(0);
  const cells = new Map(), largest = new Array(model.tokens.length).fill(0);
  const order = [...Array(model.n).keys()].filter(i => kept[i]).sort((a, b) => (model.nodes.share[a] ?? 0) - (model.nodes.share[b] ?? 0));
  for (const i of order) {
    const column = model.nodes.position[i], key = rowOf(i) * model.tokens.length + column;
    if (!cells.has(key)) cells.set(key, []);
    const size = cells.get(key).push(i);
    if (model.nodes.kind[i] === "logit") answers[column] = size;
    else largest[column] = Math.max(largest[column], size);
  }
  const spansOf = wide => largest.map((size, t) => Math.max(STEP * Math.max(1, Math.min(size, wide)), LOGIT_STEP * answers[t]) + GAP);
  const free = width - LABELS - MARGIN, widest = fit(spansOf, free), spans = spansOf(widest);
  const rest = Math.max(0, free - spans.reduce((sum, span) => sum + span, 0)) / spans.length;
  const columns = [], x = new Float32Array(model.n), y = new Float32Array(model.n);
  let left = LABELS;
  for (const span of spans) {
    columns.push({ x: left, width: span + rest });
    left += span + rest;
  }
  let top = TOP;
  const lines = [], cellsOf = row => columns.map((_, column) => cells.get(row * columns.length + column) ?? []);
  const wideOf = row => (row === last ? MOST_LOGITS : widest);
  const heights = rows.names.map((_, row) => LINE * Math.max(1, ...cellsOf(row).map(nodes => Math.ceil(nodes.length / wideOf(row)))) + ROW_GAP);
  const spare = Math.max(0, LEAST_HIGH - heights.reduce((sum, height) => sum + height, 0)) / heights.length;
  for (let row = rows.names.length - 1; row >= 0; row--) {
    const height = heights[row] + spare, most = wideOf(row), step = row === last ? LOGIT_STEP : STEP;
    cellsOf(row).forEach((nodes, column) => nodes.forEach((i, place) => {
      const line = Math.floor(place / most), wide = Math.min(most, nodes.length - line * most);
      x[i] = columns[column].x + columns[column].width / 2 + step * ((place % most) - (wide - 1) / 2);
      y[i] = top + (ROW_GAP + spare) / 2 + LINE * (line + 0.5);
    }));
    lines.push({ y: top, height, name: rows.names[row] });
    top += height;
  }
  return { x, y, rowOf, rows: lines, columns, width: Math.max(width, left + MARGIN), height: top + BOTTOM };
}

// How many nodes stand side by side in a cell: as many as the width allows, and two at least.
function fit(spansOf, free) {
  for (let wide = MOST_WIDE; wide > 2; wide--) {
    if (spansOf(wide).reduce((sum, span) => sum + span, 0) <= free) return wide;
  }
  return 2;
}

function rowsOf(model) {
  const { kind, layer, source } = model.nodes;
  const key = i => (kind[i] === "logit" ? 1e9 : kind[i] === "embedding" || layer[i] < 0 ? -1 : layer[i] * 1000 + source[i] + 1);
  const keys = [...new Set(model.nodes.id.map((_, i) => key(i)))].sort((a, b) => a - b);
  const names = keys.map(k => {
    const i = model.nodes.id.findIndex((_, j) => key(j) === k);
    if (kind[i] === "logit") return "logits";
    if (k === -1) return "tokens";
    return source[i] < 0 ? `L${layer[i]}` : `L${layer[i]} ${model.parts[source[i]]}`;
  });
  return { key, index: new Map(keys.map((k, row) => [k, row])), names, logits: kind.includes("logit") };
}

// The node nearest to a point, at most `reach` pixels away; null where there is none.
export function nearestNode(layout, kept, x, y, reach = 11) {
  let best = null, least = reach * reach;
  for (let i = 0; i < kept.length; i++) {
    if (!kept[i]) continue;
    const distance = (layout.x[i] - x) ** 2 + (layout.y[i] - y) ** 2;
    if (distance < least) [best, least] = [i, distance];
  }
  return best;
}

// The node that an arrow key leads to: beside this one in its row, or nearest to it in the next row that has any.
export function neighborNode(model, layout, kept, i, key) {
  const inView = [...Array(model.n).keys()].filter(j => kept[j]), row = layout.rowOf(i);
  if (key === "ArrowLeft" || key === "ArrowRight") {
    const own = inView.filter(j => layout.rowOf(j) === row).sort((a, b) => layout.x[a] - layout.x[b] || layout.y[a] - layout.y[b]);
    return own[own.indexOf(i) + (key === "ArrowLeft" ? -1 : 1)] ?? i;
  }
  const step = key === "ArrowUp" ? 1 : -1, beyond = inView.filter(j => (layout.rowOf(j) - row) * step > 0);
  if (!beyond.length) return i;
  const next = Math.min(...beyond.map(j => (layout.rowOf(j) - row) * step));
  const own = beyond.filter(j => (layout.rowOf(j) - row) * step === next);
  return own.reduce((best, j) => (Math.abs(layout.x[j] - layout.x[i]) < Math.abs(layout.x[best] - layout.x[i]) ? j : best));
}
