// The source of a widget: the functions of the explorer in the notebook's kernel, called by messages. The last answers
// are in the widget's state, and need no kernel.

const plainly = value => JSON.stringify(value, (_, part) => (part?.constructor === Object ? Object.entries(part).sort() : part));

export function widgetSource(model) {
  const waiting = new Map(), own = Math.random().toString(36).slice(2);  // one model may be shown several times
  let n = 0;
  const hear = ({ id, value, event, error }) => {
    const call = waiting.get(id);
    if (!call) return;
    if (event) return call.onEvent(event);
    waiting.delete(id);
    return error ? call.reject(new Error(error)) : call.resolve(value);
  };
  model.on("msg:custom", hear);

  const held = (name, args) => {
    const last = model.get("held")[name];
    return last && plainly(last.args) === plainly(args) ? last.value : undefined;
  };

  const ask = (name, args, signal, onEvent) => new Promise((resolve, reject) => {
    const id = `${own} ${n++}`;
    waiting.set(id, { resolve, reject, onEvent });
    signal?.addEventListener("abort", () => {
      if (!waiting.delete(id)) return;
      model.send({ id, call: "stop" });
      reject(new DOMException("left", "AbortError"));
    });
    model.send({ id, call: name, args });
  });
  return {
    has: () => false,  // no page of a feature to go to
    features: (query, offset, limit, signal) => ask("features", { ...query, offset, limit }, signal),
    feature: async (feature, signal) => held("feature", { feature }) ?? ask("feature", { feature }, signal),
    expand: (feature, row, before, after) => ask("expand", { feature, row: Number(row), before, after }),
    examples: (feature, group, side, offset, limit) => ask("examples", { feature, group, side: Number(side), offset, limit }),
    prompt: async (query, signal) => held("prompt", { query }) ?? ask("prompt", { query }, signal),
    isWritten: setup => Boolean(held("steer", { setup })),
    steer: async (setup, signal, onEvent) => {
      const events = held("steer", { setup });
      if (!events) return ask("steer", { setup }, signal, onEvent);
      events.forEach(onEvent);
    },
    close: () => model.off("msg:custom", hear),
  };
}
