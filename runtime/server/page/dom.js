// Elements, icons and small things of the browser that every view needs. Nothing here parses HTML: text stays text.

const SVG = "http://www.w3.org/2000/svg";

// Touch screens have no Shift+Enter, and their keyboard covers half the page.
export const hasKeyboard = matchMedia("(hover: hover)").matches;

// Whether a key press sends. While an input method composes, Enter takes its word.
export const isSending = (event) => hasKeyboard && event.key === "Enter" && !event.shiftKey && !event.isComposing;

export const byId = (id) => document.getElementById(id);

// An element. `attributes`: class, aria-label and the like; `on` maps events to listeners; false or null leaves one out.
export function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "on") {
      for (const [event, listener] of Object.entries(value)) element.addEventListener(event, listener);
    } else if (value !== false && value !== null && value !== undefined) {
      element.setAttribute(name, value === true ? "" : value);
    }
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

// A symbol of the sprite in index.html. The text beside it, or aria-label, names it.
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `#icon-${name}`);
  svg.append(use);
  return svg;
}

export function iconButton(name, label, listener, attributes = {}) {
  const given = { type: "button", class: "icon-button", "aria-label": label, title: label, ...attributes };
  return el("button", { ...given, on: { click: listener } }, icon(name));
}

// Says something to screen readers, once: the same words said twice are two messages.
export function announce(text) {
  const region = byId("announcer");
  region.textContent = "";
  setTimeout(() => { region.textContent = text; }, 50);
}

// A message for the eye and the ear that goes by itself.
let fading;
export function toast(text) {
  const region = byId("toast");
  region.textContent = text;
  region.classList.add("shown");
  clearTimeout(fading);
  fading = setTimeout(() => region.classList.remove("shown"), Math.max(3500, 80 * text.length));
}

// navigator.clipboard is there on HTTPS and localhost alone; a phone that reaches a board over HTTP has the older way.
export async function copyText(text) {
  if (navigator.clipboard) {
    await navigator.clipboard.writeText(text);
    return;
  }
  const area = el("textarea", { class: "visually-hidden", "aria-hidden": "true" });
  const before = document.activeElement;
  area.value = text;
  document.body.append(area);
  area.select();
  const copied = document.execCommand("copy");
  area.remove();
  before?.focus();
  if (!copied) throw new Error("the browser does not let the page copy");
}

// A button that copies, and says that it did.
export function copyButton(textOf, label, attributes = {}) {
  const button = iconButton("copy", label, async () => {
    try {
      await copyText(textOf());
      button.classList.add("done");
      button.replaceChildren(icon("check"));
      announce("Copied");
      setTimeout(() => {
        button.classList.remove("done");
        button.replaceChildren(icon("copy"));
      }, 1500);
    } catch {
      toast("The browser does not let this page copy. Select the text and copy it by hand.");
    }
  }, attributes);
  return button;
}

// Offers bytes to the person as a file.
export function saveFile(name, blob) {
  const link = el("a", { href: URL.createObjectURL(blob), download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

// crypto.randomUUID is there on HTTPS and localhost alone.
export function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(12));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

export const clock = (seconds) => `${Math.floor(seconds / 60)}:${String(Math.floor(seconds % 60)).padStart(2, "0")}`;
