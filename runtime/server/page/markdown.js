// Markdown as DOM nodes. Text never becomes HTML: every node is made by hand, so a model's answer cannot bring markup.

import { copyButton, el } from "./dom.js";
import { highlighted } from "./highlight.js";
import { inline } from "./markdown_inline.js";

const PAGE_LEVEL = 2; // the page's own headings are h1 and h2
const DEPTH = 8; // of lists and quotes in each other; deeper ones are text
const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^\s`]*)[^`]*$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)\s*#*\s*$/;
const RULE = /^ {0,3}([-*_])(?:\s*\1){2,}\s*$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])( +|$)(.*)$/;
const DELIMITERS = /^ {0,3}\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;

const isTable = (lines, at) => lines[at].includes("|") && at + 1 < lines.length
  && lines[at + 1].includes("-") && DELIMITERS.test(lines[at + 1])
  && cells(lines[at]).length === cells(lines[at + 1]).length;

const begins = (lines, at) => FENCE.test(lines[at]) || HEADING.test(lines[at]) || RULE.test(lines[at])
  || QUOTE.test(lines[at]) || ITEM.test(lines[at]) || isTable(lines, at);

// Shows a text. Blocks whose source is as before keep their nodes: a stream changes the last one alone, and what a
// person has selected stays selected.
export function renderMarkdown(element, text) {
  const old = [...element.children];
  let same = 0;
  let level = PAGE_LEVEL;
  for (const source of split(text)) {
    const marks = HEADING.exec(source)?.[1].length;
    // Headings go down one level at a time, whatever the model does: screen readers count on it.
    if (marks) level = Math.min(marks + PAGE_LEVEL, level + 1);
    const known = marks ? `${level} ${source}` : source;
    if (old[same]?.source === known) {
      same += 1;
      continue;
    }
    old.splice(same).forEach((node) => node.remove());
    const node = marks ? heading(source, level) : block(source, 0);
    node.source = known;
    element.append(node);
  }
  old.slice(same).forEach((node) => node.remove());
}

const heading = (source, level) => el(`h${Math.min(level, 6)}`, {}, inline(HEADING.exec(source)[2]));

// The blocks of a text: each as its lines.
function split(text) {
  const lines = text.replace(/\r\n?/g, "\n").replace(/\t/g, "    ").split("\n");
  const found = [];
  for (let at = 0; at < lines.length;) {
    if (!lines[at].trim()) {
      at += 1;
      continue;
    }
    const end = endOf(lines, at);
    found.push(lines.slice(at, end).join("\n"));
    at = end;
  }
  return found;
}

function endOf(lines, start) {
  let end = start + 1;
  const fence = FENCE.exec(lines[start]);
  if (fence) {
    const closing = new RegExp(`^ {0,3}${fence[1][0]}{${fence[1].length},}\\s*$`);
    while (end < lines.length && !closing.test(lines[end])) end += 1;
    return Math.min(end + 1, lines.length);
  }
  if (HEADING.test(lines[start]) || RULE.test(lines[start])) return end;
  if (QUOTE.test(lines[start])) {
    while (end < lines.length && QUOTE.test(lines[end])) end += 1;
    return end;
  }
  if (ITEM.test(lines[start])) return endOfList(lines, start);
  if (isTable(lines, start)) {
    while (end < lines.length && lines[end].includes("|")) end += 1;
    return end;
  }
  while (end < lines.length && lines[end].trim() && !begins(lines, end)) end += 1;
  return end;
}

const ordered = (item) => /\d/.test(item[2]);

function endOfList(lines, start) {
  const first = ITEM.exec(lines[start]);
  let end = start + 1;
  for (let at = end; at < lines.length; at += 1) {
    const line = lines[at];
    const item = ITEM.exec(line);
    if (!line.trim()) continue; // ends the list only if what follows does not belong to it
    const indent = line.length - line.trimStart().length;
    if (item && indent <= first[1].length && (ordered(item) !== ordered(first) || RULE.test(line))) break;
    const belongs = item || indent > first[1].length + 1 || (lines[at - 1].trim() && !begins(lines, at));
    if (!belongs) break;
    end = at + 1;
  }
  return end;
}

function block(source, depth) {
  const lines = source.split("\n");
  const fence = FENCE.exec(lines[0]);
  if (fence) return code(lines, fence);
  const title = HEADING.exec(lines[0]);
  if (title) return el("p", {}, el("strong", {}, inline(title[2]))); // within a list or a quote
  if (RULE.test(lines[0])) return el("hr");
  if (QUOTE.test(lines[0]) && depth < DEPTH) {
    return el("blockquote", {}, ...inner(lines.map((line) => line.replace(QUOTE, "")), depth));
  }
  if (ITEM.test(lines[0]) && depth < DEPTH) return list(lines, depth);
  if (isTable(lines, 0)) return table(lines);
  return el("p", {}, inline(lines.map((line) => line.trimStart()).join("\n")));
}

const inner = (lines, depth) => split(lines.join("\n")).map((source) => block(source, depth + 1));

function code(lines, fence) {
  const closed = lines.length > 1 && lines.at(-1).trim().startsWith(fence[1]);
  const text = lines.slice(1, closed ? -1 : undefined).join("\n");
  const language = fence[2];
  const label = language ? `Code, ${language}` : "Code";
  return el("figure", { class: "code" },
    el("figcaption", {}, el("span", {}, language || "code"), copyButton(() => text, "Copy code")),
    el("pre", { tabindex: "0", role: "region", "aria-label": label }, el("code", {}, highlighted(text, language))));
}

function list(lines, depth) {
  const base = ITEM.exec(lines[0])[1].length;
  const items = [];
  for (const line of lines) {
    const item = ITEM.exec(line);
    if (item && item[1].length <= base + 1) {
      items.push({ offset: item[1].length + item[2].length + Math.min(item[3].length || 1, 4), lines: [item[4]] });
    } else {
      const { offset, lines: own } = items.at(-1);
      const indent = line.length - line.trimStart().length;
      own.push(line.slice(Math.min(indent, offset)));
    }
  }
  const first = ITEM.exec(lines[0]);
  const start = Number.parseInt(first[2], 10);
  const attributes = ordered(first) && start !== 1 ? { start } : {};
  const loose = items.slice(0, -1).some((item) => !item.lines.at(-1).trim());
  return el(ordered(first) ? "ol" : "ul", attributes, ...items.map((item) => listItem(item.lines, loose, depth)));
}

function listItem(lines, loose, depth) {
  const task = /^\[([ xX])\] +/.exec(lines[0]);
  if (task) lines = [lines[0].slice(task[0].length), ...lines.slice(1)];
  const children = inner(lines, depth);
  if (!loose && children[0]?.tagName === "P") children.splice(0, 1, ...children[0].childNodes);
  if (!task) return el("li", {}, ...children);
  const done = task[1] !== " ";
  const box = el("span", { class: "task", role: "img", "aria-label": done ? "done" : "to do" }, done ? "☑" : "☐");
  return el("li", { class: "task-item" }, box, " ", ...children);
}

// The cells of a row; a pipe after a backslash, or in code, is text.
function cells(line) {
  const found = [""];
  let inCode = false;
  for (let at = 0; at < line.length; at += 1) {
    if (line[at] === "\\" && line[at + 1] === "|") {
      found[found.length - 1] += "|";
      at += 1;
    } else if (line[at] === "|" && !inCode) {
      found.push("");
    } else {
      if (line[at] === "`") inCode = !inCode;
      found[found.length - 1] += line[at];
    }
  }
  const trimmed = found.map((cell) => cell.trim());
  if (trimmed[0] === "") trimmed.shift();
  if (trimmed.at(-1) === "") trimmed.pop();
  return trimmed;
}

function table(lines) {
  const sides = cells(lines[1]).map((cell) => {
    if (cell.endsWith(":")) return cell.startsWith(":") ? "centre" : "end";
    return null;
  });
  const row = (line, tag) => {
    const texts = cells(line);
    return el("tr", {}, ...sides.map((side, at) => el(tag, { class: side }, inline(texts[at] ?? ""))));
  };
  return el("div", { class: "table", tabindex: "0", role: "region", "aria-label": "Table" }, el("table", {},
    el("thead", {}, row(lines[0], "th")),
    el("tbody", {}, ...lines.slice(2).map((line) => row(line, "td")))));
}
