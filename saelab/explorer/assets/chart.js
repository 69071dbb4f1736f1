// A plotly figure in the page's colors; plotly is loaded with the first one.
import { html, useEffect, useRef, useState } from "./vendor/htm-preact-standalone.js";
import { Failure } from "./loading.js";

const CONFIG = { displayModeBar: false, responsive: true };
let loaded = null;

function loadPlotly() {
  return loaded ??= new Promise((resolve, reject) => {
    const script = document.createElement("script");
    Object.assign(script, { src: "static/plotly.min.js", onload: () => resolve(globalThis.Plotly) });
    script.onerror = () => {
      loaded = null;
      reject(new Error("plotly could not be loaded from the explorer's server."));
    };
    document.head.append(script);
  });
}

// Text that plotly would draw with tags, as lines of plain text.
function plain(text) {
  return (text ?? "").split("<br>").map(line => new DOMParser().parseFromString(line, "text/html").body.textContent);
}

// The title of an axis on as many lines as a narrow figure needs.
function folded(text, width) {
  const most = Math.max(20, width / 9);
  return text.split(" ").reduce((lines, word) => {
    const last = lines.at(-1);
    return last && last.length + word.length < most ? [...lines.slice(0, -1), `${last} ${word}`] : [...lines, word];
  }, []).join("<br>");
}

// The figure's own title is a heading of the page, which wraps; axes and text take the colors of the theme.
function dressed(layout, width) {
  const style = getComputedStyle(document.documentElement), at = name => style.getPropertyValue(name).trim();
  const clear = "rgba(0,0,0,0)", made = { ...layout, title: undefined, paper_bgcolor: clear, plot_bgcolor: clear };
  made.height = layout.height && layout.margin ? layout.height - layout.margin.t + 40 : layout.height;
  made.margin = { ...layout.margin, t: 40 };
  made.font = { ...layout.font, color: at("--ink") };
  made.hoverlabel = { ...layout.hoverlabel, bgcolor: at("--card"), bordercolor: at("--line"), font: { color: at("--ink") } };
  for (const axis of Object.keys(layout).filter(name => /^[xy]axis/.test(name))) {
    const title = { ...layout[axis].title, text: folded(layout[axis].title?.text ?? "", width) };
    made[axis] = { ...layout[axis], title, gridcolor: at("--line"), linecolor: at("--line"), zerolinecolor: at("--line") };
  }
  return made;
}

export function Chart({ figure }) {
  const ref = useRef(null), [error, setError] = useState("");
  const [title, ...notes] = plain(figure.layout.title?.text ?? figure.layout.title);
  useEffect(() => {
    const element = ref.current, dark = matchMedia("(prefers-color-scheme: dark)");
    let left = false;
    const draw = () => loadPlotly().then(
      plotly => left || plotly.react(element, figure.data, dressed(figure.layout, element.clientWidth), CONFIG),
      failed => setError(failed.message),
    );
    draw();
    addEventListener("theme", draw);
    dark.addEventListener("change", draw);
    return () => {
      left = true;
      removeEventListener("theme", draw);
      dark.removeEventListener("change", draw);
      globalThis.Plotly?.purge(element);
    };
  }, [figure]);
  return html`<figure><figcaption><strong>${title}</strong>${notes.length > 0 && html`<br />${notes.join(" ")}`}</figcaption>
    <${Failure} error=${error} /><div ref=${ref} role="img" aria-label=${[title, ...notes].join(" ")} /></figure>`;
}
