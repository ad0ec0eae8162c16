// A conversation as the page keeps it, and as the server's chat route takes it.
//
// {id, title, named, created, updated, settings, turns, draft: {text, attachments}}; a turn is one of
//   {role: "user", text, attachments: [{kind: "image" | "audio", name, url, seconds}]}    url: a data URL
//   {role: "assistant", text, calls: [{id, name, arguments}], state, fault, usage, speed, firstToken}
//   {role: "tool", id, name, text}
// The state of an answer: "waiting", "streaming", "done", "stopped", "failed".

import { newId } from "./dom.js";

const TITLE_CHARACTERS = 60;

export function newConversation(settings) {
  const now = Date.now();
  return {
    id: newId(), title: "New conversation", named: false, created: now, updated: now,
    settings: { ...settings }, turns: [], draft: { text: "", attachments: [] },
  };
}

// The title that a conversation has until it is given one: its first words.
export function titleOf(turns) {
  const first = turns.find((turn) => turn.role === "user");
  if (!first) return "New conversation";
  const text = first.text.replace(/\s+/g, " ").trim();
  if (!text) return first.attachments.some((a) => a.kind === "audio") ? "A recording" : "A picture";
  if (text.length <= TITLE_CHARACTERS) return text;
  return `${text.slice(0, TITLE_CHARACTERS).replace(/\s+\S*$/, "")} …`;
}

function partsOf(turn) {
  const parts = turn.attachments.map((attachment) => attachment.kind === "image"
    ? { type: "image_url", image_url: { url: attachment.url } }
    : { type: "input_audio", input_audio: { data: attachment.url.split(",", 2)[1], format: "wav" } });
  return turn.text ? [...parts, { type: "text", text: turn.text }] : parts;
}

const inWords = (parts) => parts.every((part) => part.type === "text")
  ? parts.map((part) => part.text).join("\n\n") : parts;

// Whether the server refused what a turn asked: asked again with the next message, it would refuse that too.
function isRefused(turns, at) {
  const answer = turns[at + 1];
  return answer?.fault?.kind === "refused" && !answer.text;
}

// The messages of a request. Answers that never began are left out, and what was asked twice in a row becomes one
// message: chat templates want user and model in turn.
export function messagesOf(conversation) {
  const messages = [];
  const system = conversation.settings.system?.trim();
  if (system) messages.push({ role: "system", content: system });
  for (const [at, turn] of conversation.turns.entries()) {
    if (isRefused(conversation.turns, at)) continue;
    const last = messages.at(-1);
    if (turn.role === "user") {
      if (last?.role === "user") last.content.push(...partsOf(turn));
      else messages.push({ role: "user", content: partsOf(turn) });
    } else if (turn.role === "tool") {
      messages.push({ role: "tool", tool_call_id: turn.id, content: turn.text });
    } else if (turn.text || turn.calls.length) {
      const message = { role: "assistant", content: turn.text || null };
      if (turn.calls.length) {
        message.tool_calls = turn.calls.map((call) => (
          { id: call.id, type: "function", function: { name: call.name, arguments: call.arguments } }
        ));
      }
      messages.push(message);
    }
  }
  return messages.map((m) => Array.isArray(m.content) ? { ...m, content: inWords(m.content) } : m);
}

// The body of a request: what the person set, and nothing for what the model's defaults decide.
export function requestOf(conversation, model) {
  const { temperature, top_p, top_k, max_tokens, seed, tools } = conversation.settings;
  const body = { model, messages: messagesOf(conversation), stream: true, stream_options: { include_usage: true } };
  for (const [name, value] of Object.entries({ temperature, top_p, top_k, max_tokens, seed })) {
    if (typeof value === "number") body[name] = value;
  }
  if (tools?.length) body.tools = tools;
  return body;
}

// The calls of the last answer that still wait for a result.
export function openCalls(conversation) {
  const at = conversation.turns.findLastIndex((turn) => turn.role === "assistant");
  if (at < 0) return [];
  const answered = new Set(conversation.turns.slice(at + 1).map((turn) => turn.id));
  return conversation.turns[at].calls.filter((call) => !answered.has(call.id));
}

export function exported(conversations) {
  const text = JSON.stringify({ format: "gemma-edge conversations", version: 1, conversations }, null, 2);
  return new Blob([text], { type: "application/json" });
}
