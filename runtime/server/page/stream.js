// An answer as it comes: server-sent events, and the pieces of a chat completion put together.

import { BROKEN, ServerFault, post } from "./client.js";

// The events of a response: {data: text}, or {comment: text} for a keep-alive.
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const lines = (rest + value).split(/\r\n|\n|\r(?!$)/);
      rest = lines.pop();
      for (const line of lines) {
        if (line === "") {
          if (data.length) yield { data: data.join("\n") };
          data = [];
        } else if (line.startsWith(":")) {
          yield { comment: line.slice(1).trim() };
        } else if (line.startsWith("data:")) {
          data.push(line.slice(line.startsWith("data: ") ? 6 : 5));
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // it may have failed already
  }
}

// Streams an answer into a turn; calls `changed` after every event.
//
// Throws ServerFault, or AbortError when `signal` stops it. What came until then is in the turn.
export async function streamAnswer(body, turn, signal, changed) {
  const asked = performance.now();
  let first = null;
  let last = null;
  let pieces = 0;
  let ended = false;
  try {
    const response = await post("v1/chat/completions", body, signal);
    for await (const { data } of events(response)) {
      if (data === undefined) {
        turn.queued = true; // the server says that it waits for the model
        changed();
        continue;
      }
      if (data === "[DONE]") {
        ended = true; // the response's own end follows, and leaves its connection for the next request
        continue;
      }
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ServerFault("broken", chunk.error.message ?? BROKEN);
      if (take(chunk, turn)) {
        pieces += 1;
        last = performance.now();
        first ??= last;
        turn.firstToken = (first - asked) / 1000;
      }
      // Pieces stand for tokens until the server's own measure comes, with the usage at the end.
      if (last > first) turn.speed = (pieces - 1) / ((last - first) / 1000);
      turn.speed = turn.usage?.timing?.decode_tokens_per_s ?? turn.speed;
      changed();
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof ServerFault) throw error;
    throw new ServerFault("broken", BROKEN);
  }
  // A proxy that gives up closes the stream as if it were whole.
  if (!ended) throw new ServerFault("broken", BROKEN);
}

// Adds a chunk to the turn; whether it held anything of the answer.
function take(chunk, turn) {
  if (chunk.usage) turn.usage = chunk.usage;
  const choice = chunk.choices?.[0];
  if (!choice) return false;
  if (choice.finish_reason) turn.finish = choice.finish_reason;
  const { content, tool_calls: calls = [] } = choice.delta ?? {};
  if (content) turn.text += content;
  for (const piece of calls ?? []) {
    const call = (turn.calls[piece.index ?? 0] ??= { id: "", name: "", arguments: "" });
    if (piece.id) call.id = piece.id;
    call.name += piece.function?.name ?? "";
    call.arguments += piece.function?.arguments ?? "";
  }
  if (content || calls?.length) turn.state = "streaming";
  return Boolean(content || calls?.length);
}
