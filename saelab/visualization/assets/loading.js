// What a view loads, with its failure; and the keys that a view listens to.
import { html, useEffect, useLayoutEffect, useState } from "./vendor/htm-preact-standalone.js";

// The value of `load(signal)`, loaded again when `inputs` change. The value before stays until the next is there; an
// answer that comes after its inputs have changed is dropped.
export function useLoaded(load, inputs) {
  const [state, setState] = useState({ value: null, error: "", loading: true });
  const [turn, setTurn] = useState(0);
  useEffect(() => {
    const controller = new AbortController(), keep = change => controller.signal.aborted || setState(change);
    setState(old => ({ ...old, loading: true }));
    load(controller.signal).then(
      value => keep({ value, error: "", loading: false }),
      error => keep({ value: null, error: error.message, loading: false }),
    );
    return () => controller.abort();
  }, [...inputs, turn]);
  return { ...state, again: () => setTurn(n => n + 1) };
}

export function Failure({ error }) {
  return error ? html`<p class="failure" role="alert">${error}</p>` : null;
}

export function isTyping(target) {
  return target instanceof Element && target.matches("input, select, textarea");
}

// Calls `keys[event.key]` for keys pressed anywhere but in a field and without a modifier.
export function useKeys(keys) {
  useLayoutEffect(() => {
    const press = event => {
      const act = keys[event.key];
      if (!act || isTyping(event.target) || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      act();
    };
    document.addEventListener("keydown", press);
    return () => document.removeEventListener("keydown", press);
  });
}
