// Markdown within a line: code, emphasis, links and breaks, as DOM nodes.

import { el } from "./dom.js";

const DEPTH = 12;
const MOST_ADDRESS = 2048; // characters
const ESCAPED = /[\\`*_{}[\]()#+\-.!|~<>"'$&,/:;=?@^%]/;
const ADDRESS = /^(?:https?:\/\/|mailto:)[^\s<>]+/i;
const MARKS = [
  { mark: "***", tags: ["strong", "em"] },
  { mark: "**", tags: ["strong"] },
  { mark: "__", tags: ["strong"], words: true },
  { mark: "~~", tags: ["del"] },
  { mark: "*", tags: ["em"] },
  { mark: "_", tags: ["em"], words: true },
];
const isWord = (character) => character !== undefined && /[\p{L}\p{N}]/u.test(character);
const isSpace = (character) => character === undefined || /\s/.test(character);

// A fragment of the text's nodes.
export function inline(text, depth = 0) {
  const fragment = document.createDocumentFragment();
  if (depth > DEPTH) {
    fragment.append(text);
    return fragment;
  }
  let plain = "";
  const add = (node) => {
    if (plain) fragment.append(plain);
    plain = "";
    fragment.append(node);
  };
  const unclosed = new Set(); // marks with no end from here on: not searched for again
  for (let at = 0; at < text.length;) {
    const found = special(text, at, depth, unclosed);
    if (found) {
      if (typeof found.node === "string") plain += found.node;
      else add(found.node);
      at = found.end;
    } else {
      plain += text[at];
      at += 1;
    }
  }
  if (plain) fragment.append(plain);
  return fragment;
}

// What stands at a place, if it is more than a character: {node, end}.
function special(text, at, depth, unclosed) {
  switch (text[at]) {
    case "\\":
      if (text[at + 1] === "\n") return { node: el("br"), end: at + 2 };
      return ESCAPED.test(text[at + 1] ?? "") ? { node: text[at + 1], end: at + 2 } : null;
    case "`":
      return codeSpan(text, at);
    case "\n":
      return { node: el("br"), end: at + 1 };
    case "!":
      return text[at + 1] === "[" ? link(text, at + 1, depth) : null;
    case "[":
      return link(text, at, depth);
    case "<":
      return angled(text, at);
    case "h":
    case "m":
      return isWord(text[at - 1]) ? null : bare(text, at);
    case "*":
    case "_":
    case "~":
      return emphasis(text, at, depth, unclosed);
    default:
      return null;
  }
}

function codeSpan(text, at) {
  const ticks = /^`+/.exec(text.slice(at, at + 32))[0];
  for (let end = text.indexOf(ticks, at + ticks.length); end >= 0; end = text.indexOf(ticks, end)) {
    let length = ticks.length;
    while (text[end + length] === "`") length += 1;
    if (length === ticks.length) {
      let code = text.slice(at + ticks.length, end).replace(/\n/g, " ");
      if (/^ .*[^ ].* $/.test(code)) code = code.slice(1, -1);
      return { node: el("code", {}, code), end: end + length };
    }
    end += length;
  }
  return { node: ticks, end: at + ticks.length };
}

function emphasis(text, at, depth, unclosed) {
  for (const { mark, tags, words } of MARKS) {
    if (!text.startsWith(mark, at) || unclosed.has(mark) || isSpace(text[at + mark.length])) continue;
    if (words && isWord(text[at - 1])) continue;
    const end = closing(text, at + mark.length, mark, words);
    if (end < 0) {
      unclosed.add(mark);
      continue;
    }
    const children = inline(text.slice(at + mark.length, end), depth + 1);
    const node = tags.reduceRight((child, tag) => el(tag, {}, child), children);
    return { node, end: end + mark.length };
  }
  // A run of marks that means nothing is text as a whole.
  const run = /^(?:\*+|_+|~+)/.exec(text.slice(at, at + 64))[0];
  return { node: run, end: at + run.length };
}

function closing(text, from, mark, words) {
  for (let end = text.indexOf(mark, from + 1); end >= 0; end = text.indexOf(mark, end + 1)) {
    if (isSpace(text[end - 1]) || text[end - 1] === "\\") continue;
    if (words && isWord(text[end + mark.length])) continue;
    // A single mark does not end within a double one.
    if (mark.length === 1 && (text[end + 1] === mark || text[end - 1] === mark)) {
      while (text[end + 1] === mark) end += 1;
      continue;
    }
    return end;
  }
  return -1;
}

function link(text, open, depth) {
  const middle = text.indexOf("](", open);
  if (middle < 0 || text.slice(open, middle).includes("\n\n")) return null;
  let end = middle + 2;
  for (let nested = 0; end < text.length && (text[end] !== ")" || nested > 0); end += 1) {
    if (text[end] === "\n" || end - middle > MOST_ADDRESS) return null;
    nested += { "(": 1, ")": -1 }[text[end]] ?? 0;
  }
  if (end >= text.length) return null;
  const target = text.slice(middle + 2, end).trim().replace(/\s+["'].*["']$/, "").replace(/^<(.*)>$/, "$1");
  const label = text.slice(open + 1, middle);
  if (!ADDRESS.test(target)) return null;
  return { node: anchor(target, inline(label || target, depth + 1)), end: end + 1 };
}

// Opens elsewhere, and tells the other page neither this one's address nor its window.
function anchor(target, content) {
  return el("a", { href: target, target: "_blank", rel: "noopener noreferrer" }, content);
}

function angled(text, at) {
  const end = text.indexOf(">", at);
  const target = text.slice(at + 1, end);
  return end > 0 && ADDRESS.exec(target)?.[0] === target ? { node: anchor(target, target), end: end + 1 } : null;
}

function bare(text, at) {
  const found = ADDRESS.exec(text.slice(at, at + MOST_ADDRESS));
  if (!found || /^mailto:/i.test(found[0])) return null;
  let target = found[0].replace(/[.,;:!?'"*_~]+$/, "");
  while (target.endsWith(")") && !target.includes("(")) target = target.slice(0, -1);
  return { node: anchor(target, target), end: at + target.length };
}
