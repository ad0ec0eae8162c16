// One turn of a conversation as one sees it: what was asked, the answer with its calls, a result that was sent back.

import { attachmentView } from "./attachments.js";
import { copyButton, el, icon, iconButton, isSending } from "./dom.js";
import { renderMarkdown } from "./markdown.js";

const ENDS = {
  length: "The answer reached its limit of tokens.",
  content_filter: "The server ended the answer.",
};

// The element of a turn. `actions`: edit(turn, text), regenerate(turn), retry(turn), results(turn, [{id, name, text}]).
export function turnView(turn, actions) {
  if (turn.role === "user") return userView(turn, actions);
  if (turn.role === "tool") return resultView(turn);
  return answerView(turn, actions);
}

const named = (name) => el("h2", { class: "visually-hidden" }, name);

function userView(turn, actions) {
  const attachments = turn.attachments.map((attachment) => attachmentView(attachment));
  const item = el("li", { class: "turn user" }, named("You"),
    attachments.length ? el("ul", { class: "attachments", "aria-label": "Attachments" }, ...attachments) : null,
    turn.text ? el("div", { class: "bubble" }, turn.text) : null,
    el("div", { class: "turn-actions" },
      turn.text ? copyButton(() => turn.text, "Copy the message") : null,
      iconButton("edit", "Edit the message", () => edit(item, turn, actions), { class: "icon-button edit" })));
  return item;
}

// Turns the message into a form. What follows it stays until the changed message is sent.
function edit(item, turn, actions) {
  const before = [...item.childNodes];
  const area = el("textarea", { "aria-label": "Edit the message", rows: "2" });
  area.value = turn.text;
  const cancel = () => {
    item.classList.remove("editing");
    item.replaceChildren(...before);
    item.querySelector(".edit").focus();
  };
  const send = (event) => {
    event.preventDefault();
    if (area.value.trim() || turn.attachments.length) actions.edit(turn, area.value.trim());
  };
  const keys = (event) => {
    if (event.key === "Escape") {
      event.stopPropagation();
      cancel();
    } else if (isSending(event)) send(event);
  };
  item.classList.add("editing");
  item.replaceChildren(named("You"), el("form", { class: "edit-form", on: { submit: send, keydown: keys } },
    area,
    el("div", { class: "edit-foot" }, el("p", {}, "Sending it replaces what follows."),
      el("button", { type: "button", class: "button quiet", on: { click: cancel } }, "Cancel"),
      el("button", { type: "submit", class: "button primary" }, "Send"))));
  area.focus();
}

function answerView(turn, actions) {
  const item = el("li", { class: "turn answer" }, named("Answer"),
    el("div", { class: "waiting" }, el("span", { class: "dots", "aria-hidden": "true" }, el("i"), el("i"), el("i")),
      el("span", { class: "waiting-words" })),
    el("div", { class: "markdown" }), el("div", { class: "calls" }), el("div", { class: "fault-place" }),
    el("div", { class: "turn-foot" },
      el("div", { class: "turn-actions" },
        copyButton(() => turn.text, "Copy the answer", { class: "icon-button copy-answer" }),
        iconButton("again", "Answer again", () => actions.regenerate(turn), { class: "icon-button regenerate" })),
      el("p", { class: "figures" })));
  updateAnswer(item, turn, actions);
  return item;
}

// Brings an answer's element up to date with the turn. Called for every token: it touches what changed.
export function updateAnswer(item, turn, actions) {
  const busy = turn.state === "waiting" || turn.state === "streaming";
  item.classList.toggle("busy", busy);
  item.querySelector(".waiting").hidden = turn.state !== "waiting";
  item.querySelector(".waiting-words").textContent = turn.queued ? "Waiting for the model" : "";
  renderMarkdown(item.querySelector(".markdown"), turn.text);
  item.querySelector(".turn-foot").hidden = busy || (!turn.text && !turn.calls.length && turn.state !== "stopped");
  item.querySelector(".copy-answer").hidden = !turn.text;
  if (busy) return;
  item.querySelector(".figures").textContent = figuresOf(turn).join(" · ");
  item.querySelector(".calls").replaceChildren(...turn.calls.map(callView), ...resultForm(turn, actions));
  item.querySelector(".fault-place").replaceChildren(...(turn.fault ? [faultView(turn, actions)] : []));
}

function figuresOf(turn) {
  const figures = [];
  if (turn.state === "stopped") figures.push("Stopped");
  if (ENDS[turn.finish]) figures.push(ENDS[turn.finish]);
  if (turn.usage) figures.push(`${turn.usage.completion_tokens.toLocaleString("en")} tokens`);
  if (turn.speed) figures.push(`${turn.speed.toFixed(1)} tok/s`);
  if (turn.firstToken) figures.push(`first after ${turn.firstToken.toFixed(turn.firstToken < 10 ? 1 : 0)} s`);
  return figures;
}

function pretty(json) {
  try {
    return JSON.stringify(JSON.parse(json), null, 2);
  } catch {
    return json; // as the model wrote it
  }
}

function callView(call) {
  return el("div", { class: "call" },
    el("p", { class: "call-name" }, icon("tool"), el("span", {}, "Calls ", el("code", {}, call.name))),
    el("pre", { tabindex: "0", role: "region", "aria-label": `Arguments of ${call.name}` }, pretty(call.arguments)));
}

// Where a person plays the tool: a field for each call that waits.
function resultForm(turn, actions) {
  const waiting = actions.openCalls(turn);
  if (!waiting.length) return [];
  const fields = waiting.map((call, at) => {
    const id = `result-${call.id || at}`;
    return { call, id, area: el("textarea", { id, rows: "2", required: true, class: "mono", spellcheck: "false" }) };
  });
  const send = (event) => {
    event.preventDefault();
    actions.results(turn, fields.map(({ call, area }) => ({ id: call.id, name: call.name, text: area.value })));
  };
  return [el("form", { class: "results", on: { submit: send } },
    ...fields.flatMap(({ call, id, area }) => [el("label", { for: id }, "Result of ", el("code", {}, call.name)), area]),
    el("button", { type: "submit", class: "button primary" }, fields.length === 1 ? "Send the result" : "Send the results"))];
}

function faultView(turn, actions) {
  const { kind, message } = turn.fault;
  const signedOut = kind === "signed-out";
  return el("div", { class: "fault", role: "alert" }, el("p", {}, message),
    el("button", { type: "button", class: "button", on: {
      click: () => (signedOut ? location.reload() : actions.retry(turn)),
    } }, signedOut ? "Reload" : "Try again"));
}

function resultView(turn) {
  return el("li", { class: "turn tool" }, named("Tool"), el("details", {},
    el("summary", {}, icon("tool"), el("span", {}, "Result of ", el("code", {}, turn.name))),
    el("pre", { tabindex: "0", role: "region", "aria-label": `Result of ${turn.name}` }, pretty(turn.text))));
}
