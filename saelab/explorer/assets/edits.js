// Edits by the reader: how views hear of them, how their failures are shown, and how the last one is undone.
import { html, useEffect, useState } from "./vendor/htm-preact-standalone.js";
import { Failure, useLoaded } from "./loading.js";

// A number that grows with every edit, to load again what it may have changed.
export function useEdits() {
  const [n, setN] = useState(0);
  useEffect(() => {
    const heard = () => setN(n => n + 1);
    addEventListener("edited", heard);
    return () => removeEventListener("edited", heard);
  }, []);
  return n;
}

// `[run, error, busy]`: `run(() => promise)` does one thing at a time; what it threw stays until the next.
export function useAction() {
  const [state, setState] = useState({ error: "", busy: false });
  const run = async act => {
    setState({ error: "", busy: true });
    const error = await act().then(() => "", failed => (failed.name === "AbortError" ? "" : failed.message));
    setState({ error, busy: false });
  };
  return [run, state.error, state.busy];
}

// The last change with a button; where it is not `always` there, from the first edit of this visit on.
export function Undo({ source, always = false }) {
  const edits = useEdits(), { value } = useLoaded(source.history, [edits]);
  const [run, error] = useAction();
  return html`<div class="undo" role="status">${(always || edits > 0) && value?.undo && html`<span class="soft small">${value.undo}</span>
    <button type="button" onClick=${() => run(source.undo)}>Undo</button>`}<${Failure} error=${error} /></div>`;
}
