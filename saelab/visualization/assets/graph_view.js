// The graph itself: nodes as shapes, edges on a canvas below them, the links of one node on a second canvas.
import { html, useLayoutEffect, useMemo, useRef, useState } from "./vendor/htm-preact-standalone.js";
import { visible } from "./format.js";
import { BOTTOM, layoutGraph, nearestNode, neighborNode, TOP } from "./graph_layout.js";
import { describeNode, nameOf } from "./graph_model.js";

export const MOST_DRAWN = 3000;
const STRENGTHS = [0.04, 0.12, 0.3, Infinity];  // shares of a target's inputs up to which an edge is faint, ..., strong
const BAR = "M-2.6,0H2.6";
const SHAPES = {
  circle: "M5,0A5,5 0 1 1 -5,0A5,5 0 1 1 5,0Z", triangle: "M0,-6L5.8,4.6H-5.8Z", diamond: "M0,-5.6L5.6,0L0,5.6L-5.6,0Z",
  square: "M-4.6,-4.6H4.6V4.6H-4.6Z", cross: "M-4.5,0H4.5M0,-4.5V4.5",
};

export function shapeOf(model, i) {
  const { kind, source, activation } = model.nodes;
  const plain = { embedding: "square", logit: "square", error: "diamond", bias: "cross" }[kind[i]];
  if (plain) return SHAPES[plain];
  return SHAPES[model.attention[source[i]] ? "triangle" : "circle"] + (activation[i] < 0 ? (model.attention[source[i]] ? "M-2.6,1.6H2.6" : BAR) : "");
}

export function Shape({ path, kind }) {
  return html`<svg class="mark" viewBox="-8 -8 16 16" aria-hidden="true"><path class=${kind} d=${path} /></svg>`;
}

export function LinkGraph({ model, state, kept, edges, found, selected, hovered, act }) {
  const frame = useRef(null), paper = useRef(null), overlay = useRef(null), tip = useRef(null), lit = useRef([]);
  const [width, setWidth] = useState(0), [cursor, setCursor] = useState(null), [theme, setTheme] = useState(0);
  useLayoutEffect(() => {
    const measure = () => setWidth(Math.floor(frame.current.clientWidth)), observer = new ResizeObserver(measure);
    const dark = matchMedia("(prefers-color-scheme: dark)"), turn = () => setTheme(n => n + 1);
    measure();
    observer.observe(frame.current);
    dark.addEventListener("change", turn);
    return () => { observer.disconnect(); dark.removeEventListener("change", turn); };
  }, []);
  const layout = useMemo(() => width && layoutGraph(model, kept, width), [model, kept, width]);

  useLayoutEffect(() => {
    if (!layout) return;
    const context = prepare(paper.current, layout);
    drawEdges(context, model, layout, edges.slice(0, MOST_DRAWN), 0.5);
  }, [layout, edges, theme]);

  useLayoutEffect(() => {  // where the graph is wider than the page: at the clicked node, or at the logits
    if (layout) frame.current.scrollLeft = state.clicked === null ? layout.width : layout.x[state.clicked] - width / 2;
  }, [layout]);

  const light = i => {
    for (const path of lit.current) path.style.fill = "";
    lit.current = [];
    const context = prepare(overlay.current, layout), on = i !== null && kept[i];
    paper.current.classList.toggle("faint", on);
    if (!on) return;
    const links = linksOf(model, state.linkType, i).filter(e => kept[model.edges.source[e]] && kept[model.edges.target[e]]);
    drawEdges(context, model, layout, links, 1);
    for (const e of links) {
      const other = model.edges.source[e] === i ? model.edges.target[e] : model.edges.source[e];
      const path = frame.current.querySelector(`[data-node="${other}"]`);
      if (!path) continue;
      path.style.fill = `rgb(var(--${model.edges.weight[e] < 0 ? "minus" : "plus"}) / ${(0.25 + 0.75 * Math.min(1, 2.5 * model.part(e))).toFixed(2)})`;
      lit.current.push(path);
    }
  };
  const show = i => {
    light(i ?? state.clicked);
    tip.current.hidden = i === null || !kept[i];
    if (tip.current.hidden) return;
    tip.current.textContent = describeNode(model, state.labels, i);
    const left = Math.max(0, Math.min(layout.x[i] - frame.current.scrollLeft + 12, width - tip.current.offsetWidth - 4));
    tip.current.style.transform = `translate(${left + frame.current.scrollLeft}px, ${layout.y[i] + 12}px)`;
  };
  useLayoutEffect(() => { layout && show(hovered ?? cursor); }, [layout, state.clicked, state.linkType, state.labels, hovered, cursor, theme]);

  const at = event => {
    const box = paper.current.getBoundingClientRect();
    return nearestNode(layout, kept, event.clientX - box.left, event.clientY - box.top, event.pointerType === "touch" ? 18 : 11);
  };
  const last = useRef(null);
  const move = event => {
    const i = at(event);
    if (i === last.current) return;
    last.current = i;
    show(i);
  };
  const leave = () => {
    last.current = null;
    show(cursor);
  };
  const press = event => {
    const i = at(event);
    setCursor(null);
    if (i === null) return act.click(null);
    if (event.shiftKey) act.select(i);
    else if (event.ctrlKey || event.metaKey) act.pin(i);
    else act.click(i === state.clicked ? null : i);
  };
  const key = event => {
    const i = cursor ?? state.clicked ?? model.nodes.id.findIndex((_, j) => kept[j] && model.nodes.kind[j] === "logit");
    if (event.ctrlKey || event.metaKey || event.altKey || i < 0) return;
    const acts = { Enter: () => act.click(i), " ": () => act.click(i), p: () => act.pin(i), s: () => act.select(i), Escape: () => act.click(null) };
    if (event.key.startsWith("Arrow")) {
      const next = cursor === null ? i : neighborNode(model, layout, kept, i, event.key);
      setCursor(next);
      const left = layout.x[next];
      if (left < frame.current.scrollLeft + 70 || left > frame.current.scrollLeft + width - 20) frame.current.scrollLeft = left - width / 2;
    } else if (acts[event.key]) acts[event.key]();
    else return;
    event.preventDefault();
    event.stopPropagation();
  };
  const shapes = useMemo(() => layout && html`<g>${model.nodes.id.map((id, i) => kept[i] && html`<path key=${id} data-node=${i}
    class=${[model.nodes.kind[i], found.has(i) && "found", state.pinned.includes(i) && "pinned", selected.includes(i) && "selected",
      i === state.clicked && "clicked"].filter(Boolean).join(" ")}
    transform=${`translate(${layout.x[i].toFixed(1)},${layout.y[i].toFixed(1)})`} d=${shapeOf(model, i)} />`)}</g>`,
  [layout, found, state.pinned, selected, state.clicked]);
  const size = layout && { width: layout.width, height: layout.height };
  return html`<div class="links" ref=${frame}>
    ${layout && html`<div class="sheet" style=${{ width: `${size.width}px`, height: `${size.height}px` }}>
      <${Rows} layout=${layout} />
      <canvas ref=${paper} aria-hidden="true" /><canvas ref=${overlay} aria-hidden="true" />
      <svg ...${size} class="nodes" tabindex="0" role="application" aria-roledescription="graph" aria-label="Nodes of the graph"
        aria-describedby="keys" onPointerMove=${move} onPointerLeave=${leave} onClick=${press} onKeyDown=${key} onBlur=${() => setCursor(null)}>
        <${Axes} model=${model} layout=${layout} labels=${state.labels} kept=${kept} />${shapes}
        ${cursor !== null && html`<circle class="cursor" r="10" cx=${layout.x[cursor]} cy=${layout.y[cursor]} />`}</svg>
      <div class="tip" ref=${tip} hidden />
    </div>`}
    <p class="unseen" aria-live="polite">${cursor === null ? "" : describeNode(model, state.labels, cursor)}</p></div>`;
}

function Rows({ layout }) {
  return html`${layout.rows.map((row, i) => html`<div key=${row.name} class=${`band ${i % 2 ? "odd" : "even"}`}
    style=${{ top: `${row.y}px`, height: `${row.height}px` }}><span>${row.name}</span></div>`)}`;
}

// Tokens below their columns and logits above their nodes, slanted so that narrow columns do not cut them.
function Axes({ model, layout, labels, kept }) {
  const { kind, activation } = model.nodes, bottom = layout.height - BOTTOM + 14;
  const logits = model.nodes.id.map((_, i) => i).filter(i => kept[i] && kind[i] === "logit");
  return html`<g class="axis" aria-hidden="true">
    ${model.tokens.map((token, t) => {
      const x = layout.columns[t].x + layout.columns[t].width / 2;
      return html`<text key=${t} text-anchor="end" transform=${`translate(${x + 4},${bottom}) rotate(-40)`}>${cut(visible(token))}</text>`;
    })}
    ${logits.map(i => html`<text key=${i} text-anchor="end" transform=${`translate(${layout.x[i] - 2},${Math.min(layout.y[i] - 10, TOP + 4)}) rotate(40)`}
      >${cut(nameOf(model, labels, i))} ${activation[i] === null ? "" : activation[i].toFixed(2)}</text>`)}</g>`;
}

function cut(text) {
  return text.length > 12 ? `${text.slice(0, 11)}\u2026` : text;
}

function linksOf(model, linkType, i) {
  if (linkType === "input") return model.inputs[i];
  return linkType === "output" ? model.outputs[i] : [...model.inputs[i], ...model.outputs[i]];
}

function prepare(canvas, layout) {
  const ratio = Math.min(2, devicePixelRatio), [width, height] = [layout.width * ratio, layout.height * ratio].map(Math.round);
  const context = canvas.getContext("2d");
  if (canvas.width !== width || canvas.height !== height) {
    Object.assign(canvas, { width, height });
    Object.assign(canvas.style, { width: `${layout.width}px`, height: `${layout.height}px` });
  }
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, layout.width, layout.height);
  return context;
}

// Edges in eight strokes: two signs, four strengths; the weakest first, so that the strong lie on top.
function drawEdges(context, model, layout, edges, opacity) {
  const { source, target, weight } = model.edges, style = getComputedStyle(document.documentElement);
  const bins = STRENGTHS.map(() => ({ minus: [], plus: [] }));
  for (const e of edges) bins[STRENGTHS.findIndex(most => model.part(e) < most)][weight[e] < 0 ? "minus" : "plus"].push(e);
  bins.forEach((signs, strength) => {
    for (const [sign, own] of Object.entries(signs)) {
      context.beginPath();
      for (const e of own) {
        const [x0, y0, x1, y1] = [layout.x[source[e]], layout.y[source[e]], layout.x[target[e]], layout.y[target[e]]];
        const bend = (y0 - y1) * 0.4;
        context.moveTo(x0, y0);
        context.bezierCurveTo(x0, y0 - bend, x1, y1 + bend, x1, y1);
      }
      context.lineWidth = [0.6, 1, 1.7, 2.6][strength];
      context.strokeStyle = `rgb(${style.getPropertyValue(`--${sign}`)} / ${opacity * [0.28, 0.5, 0.75, 0.95][strength]})`;
      context.stroke();
    }
  });
}

