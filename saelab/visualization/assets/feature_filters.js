// Filters of the feature list, as fields in a panel that opens.
import { html } from "./vendor/htm-preact-standalone.js";
import { useLoaded } from "./loading.js";

const FIELDS = {
  sign: { title: "Signs", options: { "+": "positive codes only", "-": "negative codes only", both: "both signs" } },
  kind: { title: "Kind" },
  labeled: { title: "Label", options: { yes: "labeled", no: "without a label", person: "labeled by people" } },
  list: { title: "List" },
  author: { title: "Author of the label", type: "text" },
  density_min: { title: "Density from (%)", type: "number", factor: 100 },
  density_max: { title: "Density to (%)", type: "number", factor: 100 },
  peak_min: { title: "Peak from", type: "number" },
  score_min: { title: "Label score from", type: "number" },
  concept_min: { title: "Concept score from", type: "number" },
  match_min: { title: "Match from", type: "number" },
};

// `source.filters` names the fields, `source.options()` promises the choices of those that depend on the store.
export function Filters({ source, query, ask }) {
  const { value: options } = useLoaded(() => source.options(), [source]);
  const n = source.filters.filter(name => query[name]).length;
  const clear = () => ask(Object.fromEntries(source.filters.map(name => [name, ""])));
  return html`<details class="filters"><summary>Filters${n > 0 && ` (${n})`}</summary>
    <div class="fields">
      ${source.filters.map(name => html`<label key=${name}>${FIELDS[name].title}
        <${Field} field=${{ ...FIELDS[name], ...options?.[name] }} value=${query[name] ?? ""} onChange=${value => ask({ [name]: value })} /></label>`)}
      <button type="button" onClick=${clear} disabled=${n === 0}>Clear filters</button>
    </div></details>`;
}

function Field({ field, value, onChange }) {
  const { factor } = field;  // of what is shown over what is asked for
  const scaled = (number, by) => number && by ? String(Number((number * by).toPrecision(12))) : number;
  const change = event => onChange(scaled(event.target.value, factor && 1 / factor));
  if (field.type) return html`<input type=${field.type} step="any" min="0" value=${scaled(value, factor)} onChange=${change} />`;
  const options = Object.entries(field.options ?? {});
  return html`<select value=${value} onChange=${change}><option value="">all</option>
    ${options.map(([name, title]) => html`<option value=${name} selected=${name === value}>${title}</option>`)}</select>`;
}
