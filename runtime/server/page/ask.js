// One small dialog: for a title, or to make sure before something is deleted.

import { byId } from "./dom.js";

// Resolves with the title, with true where none was asked for, or with null when the person goes back.
export function ask({ title, text = "", yes, value = null, danger = false }) {
  const dialog = byId("ask");
  const field = byId("ask-value");
  byId("ask-title").textContent = title;
  byId("ask-text").textContent = text;
  byId("ask-text").hidden = !text;
  byId("ask-field").hidden = value === null;
  byId("ask-yes").textContent = yes;
  byId("ask-yes").classList.toggle("danger", danger);
  field.value = value ?? "";
  dialog.returnValue = "";
  dialog.showModal();
  if (value === null) byId("ask-yes").focus();
  else field.select();
  // Enter in the field is a yes, though Cancel is the form's first button.
  const enter = (event) => {
    if (event.key !== "Enter") return;
    event.preventDefault();
    dialog.close("yes");
  };
  field.addEventListener("keydown", enter);
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      field.removeEventListener("keydown", enter);
      if (dialog.returnValue !== "yes") resolve(null);
      else resolve(value === null ? true : field.value.trim());
    }, { once: true });
  });
}
