// The subgraph: a box for each supernode and pinned node, which may be moved, and the sums of the edges between them.
import { html, useLayoutEffect, useRef, useState } from "./vendor/htm-preact-standalone.js";
import { count } from "./format.js";
import { subgraphOf, weightText } from "./graph_model.js";

const WIDE = 132, HIGH = 46, SPACE = 12, DROP = 96, LABELED = 0.08;

export function Subgraph({ model, state, act }) {
  const frame = useRef(null), drag = useRef(null);
  const [width, setWidth] = useState(0), [moved, setMoved] = useState(null);
  useLayoutEffect(() => {
    const measure = () => setWidth(Math.floor(frame.current?.clientWidth ?? 0)), observer = new ResizeObserver(measure);
    measure();
    observer.observe(frame.current);
    return () => observer.disconnect();
  }, []);
  const { boxes, links } = subgraphOf(model, state);
  const free = Math.max(width, WIDE + 2 * SPACE), { places, height } = place(model, boxes, free, state.positions);
  if (moved) places[moved.b] = moved;
  const sums = boxes.map((_, b) => links.reduce((sum, link) => sum + (link.to === b ? Math.abs(link.weight) : 0), 0));
  const part = link => (sums[link.to] ? Math.abs(link.weight) / sums[link.to] : 0);
  const keep = all => act.place(all.map(({ x, y }) => `${Math.round(1000 * x / free)} ${Math.round(1000 * y / height)}`).join(" "));
  const start = (event, b) => {
    if (event.target.closest("button, input")) return;
    event.currentTarget.setPointerCapture(event.pointerId);
    drag.current = { b, dx: places[b].x - event.clientX, dy: places[b].y - event.clientY };
  };
  const move = event => {
    if (!drag.current) return;
    const { b, dx, dy } = drag.current, inside = (x, most) => Math.max(0, Math.min(x, most));
    setMoved({ b, x: inside(event.clientX + dx, free - WIDE), y: inside(event.clientY + dy, height - HIGH) });
  };
  const end = () => {
    if (drag.current && moved) keep(places);
    drag.current = null;
    setMoved(null);
  };
  return html`<section class="subgraph" aria-label="Subgraph"><h2>Subgraph <span class="soft small">${count(boxes.length)}</span></h2>
    ${!boxes.length && html`<p class="soft">Pin nodes to see them alone, with the sums of the edges between them; select several to name them as a group.</p>`}
    <div ref=${frame} class="board" style=${{ height: `${boxes.length ? height : 0}px` }}>
      <svg width=${free} height=${height} aria-hidden="true"><defs>${["plus", "minus"].map(sign => html`<marker id=${`tip-${sign}`} viewBox="0 0 8 8"
        refX="7" refY="4" markerWidth="7" markerHeight="7" markerUnits="userSpaceOnUse" orient="auto"><path class=${sign} d="M0,0L8,4L0,8Z" /></marker>`)}</defs>
        ${links.map(link => html`<${Arrow} key=${`${link.from} ${link.to}`} link=${link} part=${part(link)} from=${places[link.from]} to=${places[link.to]} />`)}</svg>
      ${boxes.map((box, b) => html`<div key=${box.group ?? `node ${box.nodes[0]}`} class=${box.group === null ? "box" : "box group"} data-box=${b}
        style=${{ transform: `translate(${places[b].x}px, ${places[b].y}px)` }} onPointerDown=${event => start(event, b)} onPointerMove=${move} onPointerUp=${end}
        onPointerCancel=${end}>
        ${box.group === null
          ? html`<button class="said" title=${box.name} onClick=${() => act.click(box.nodes[0])}>${box.name}</button>
            <button class="off" aria-label=${`Unpin ${box.name}`} onClick=${() => act.pin(box.nodes[0])}>\u00d7</button>`
          : html`<input value=${box.name} aria-label="Name of the group" maxlength="100" onChange=${event => act.rename(box.group, event.target.value)} />
            <button class="off" aria-label=${`Ungroup ${box.name}`} onClick=${() => act.ungroup(box.group)}>\u00d7</button>
            <span class="members">${box.nodes.map(i => html`<button key=${i} title=${model.nodes.id[i]} aria-label=${`Node ${model.nodes.id[i]} of ${box.name}`}
              aria-current=${i === state.clicked} onClick=${() => act.click(i)} />`)}</span>`}</div>`)}</div></section>`;
}

function Arrow({ link, part, from, to }) {
  const up = from.y > to.y, [x0, x1] = [from.x + WIDE / 2, to.x + WIDE / 2];
  const [y0, y1] = up ? [from.y, to.y + HIGH + 2] : [from.y + HIGH, to.y - 2], bend = (y0 - y1) * 0.4;
  const sign = link.weight < 0 ? "minus" : "plus";
  return html`<g class=${sign}><path class="arrow" marker-end=${`url(#tip-${sign})`} d=${`M${x0},${y0}C${x0},${y0 - bend} ${x1},${y1 + bend} ${x1},${y1}`}
    style=${{ strokeWidth: 0.8 + 3.2 * part, opacity: 0.35 + 0.65 * part }} />
    ${part > LABELED && html`<text x=${(x0 + x1) / 2} y=${(y0 + y1) / 2} text-anchor="middle">${weightText(link.weight)}</text>`}</g>`;
}

// Boxes by layer and token, or where a reader has put them.
function place(model, boxes, width, positions) {
  const { layer, source, position } = model.nodes, mean = (nodes, of) => nodes.reduce((sum, i) => sum + of(i), 0) / nodes.length;
  const ranked = boxes.map((box, b) => ({ b, y: mean(box.nodes, i => 1000 * layer[i] + source[i]), x: mean(box.nodes, i => position[i]) }));
  const perLine = Math.max(1, Math.floor((width + SPACE) / (WIDE + SPACE))), lines = [];
  for (const y of [...new Set(ranked.map(one => one.y))].sort((a, b) => b - a)) {
    const own = ranked.filter(one => one.y === y).sort((a, b) => a.x - b.x);
    for (let i = 0; i < own.length; i += perLine) lines.push(own.slice(i, i + perLine));
  }
  const places = new Array(boxes.length), height = Math.max(1, lines.length) * DROP + SPACE;
  const far = Math.max(1, model.tokens.length - 1);
  lines.forEach((line, row) => {
    let left = 0;
    line.forEach((one, i) => {  // at its token, but clear of the boxes before it and with room for those after it
      const most = width - (line.length - i) * (WIDE + SPACE) + SPACE, x = Math.max(left, Math.min((width - WIDE) * one.x / far, most));
      places[one.b] = { b: one.b, x, y: SPACE + row * DROP };
      left = x + WIDE + SPACE;
    });
  });
  const given = positions.split(" ").filter(Boolean).map(Number);
  if (given.length === 2 * boxes.length && given.every(x => x >= 0 && x <= 1000)) {
    boxes.forEach((_, b) => { places[b] = { b, x: Math.min(given[2 * b] * width / 1000, width - WIDE), y: Math.min(given[2 * b + 1] * height / 1000, height - HIGH) }; });
  }
  return { places, height };
}
