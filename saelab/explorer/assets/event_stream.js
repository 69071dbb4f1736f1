// Server-sent events of a POST request: EventSource can only GET.

// Calls `onEvent` with the JSON of each event until the stream ends; throws the sentence of an event {"error": ...}.
export async function readEvents(body, onEvent) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const events = (rest + value.replaceAll("\r", "")).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const lines = event.split("\n").filter(line => line.startsWith("data:"));
      if (!lines.length) continue;  // a comment that keeps the connection open
      const said = JSON.parse(lines.map(line => line.slice(5).trimStart()).join("\n"));
      if (said.error) throw new Error(said.error);
      onEvent(said);
    }
  }
}
