// The settings dialog: model, system prompt, sampling, tools; how the page looks; what it keeps.

import { byId, el } from "./dom.js";
import { remember, remembered } from "./store.js";

const NUMBERS = ["temperature", "top_p", "top_k", "max_tokens", "seed"];

export const lastSettings = () => remembered("settings", {});

// The theme is on <html> before the first paint: app.js is a module, and so runs after the markup is there.
export function applyTheme(theme = remembered("theme", "system")) {
  document.documentElement.dataset.theme = theme;
  return theme;
}

export function setTheme(theme) {
  remember("theme", theme === "system" ? null : theme);
  applyTheme(theme);
}

// Tool definitions from the text that a person wrote: OpenAI's form, or the bare functions.
//
// Throws Error with a sentence.
export function toolsFrom(text) {
  if (!text.trim()) return [];
  let given;
  try {
    given = JSON.parse(text);
  } catch (error) {
    throw new Error(`The tools are not JSON: ${error.message}.`);
  }
  const tools = (Array.isArray(given) ? given : [given]).map((tool) => (
    tool?.function ? tool : { type: "function", function: tool }
  ));
  const wrong = tools.findIndex((tool) => typeof tool.function?.name !== "string" || !tool.function.name);
  if (wrong >= 0) throw new Error(`Tool ${wrong + 1} has no "name". A tool is {"name": ..., "description": ..., "parameters": ...}.`);
  return tools;
}

export class SettingsDialog {
  // `saved(settings, model)` gets what the person chose.
  constructor({ models, signedIn, saved, exportAll, deleteAll, signOut }) {
    this.dialog = byId("settings");
    this.form = byId("settings-form");
    this.saved = saved;
    const { model, theme, tools } = this.form.elements;
    model.replaceChildren(...models.map(({ id }) => el("option", { value: id }, id)));
    model.closest(".field").hidden = models.length < 2;
    byId("tools-field").hidden = !models.some((m) => m.tools);
    theme.addEventListener("change", () => setTheme(theme.value));
    tools.addEventListener("input", () => this.#complain(""));
    byId("sign-out").hidden = !signedIn;
    byId("sign-out").addEventListener("click", signOut);
    byId("export-all").addEventListener("click", exportAll);
    byId("delete-all").addEventListener("click", deleteAll);
    byId("settings-defaults").addEventListener("click", () => this.#fill({ system: this.form.elements.system.value }));
    this.form.addEventListener("submit", (event) => this.#submit(event));
    byId("settings-close").addEventListener("click", () => this.dialog.close());
  }

  open(settings, model) {
    this.#fill(settings);
    this.form.elements.model.value = model;
    this.form.elements.theme.value = remembered("theme", "system");
    this.dialog.showModal();
  }

  #fill(settings) {
    const fields = this.form.elements;
    fields.system.value = settings.system ?? "";
    for (const name of NUMBERS) fields[name].value = settings[name] ?? "";
    fields.tools.value = settings.tools?.length ? JSON.stringify(settings.tools, null, 2) : "";
    this.#complain("");
  }

  #complain(sentence) {
    byId("tools-error").textContent = sentence;
    this.form.elements.tools.setAttribute("aria-invalid", String(Boolean(sentence)));
  }

  #submit(event) {
    event.preventDefault(); // numbers out of range never come here: the browser says so at the field
    const fields = this.form.elements;
    const settings = { system: fields.system.value };
    for (const name of NUMBERS) {
      if (fields[name].value !== "") settings[name] = fields[name].valueAsNumber;
    }
    try {
      settings.tools = toolsFrom(fields.tools.value);
    } catch (error) {
      this.#complain(error.message);
      fields.tools.focus();
      return;
    }
    remember("settings", settings);
    this.saved(settings, fields.model.value);
    this.dialog.close();
  }
}
