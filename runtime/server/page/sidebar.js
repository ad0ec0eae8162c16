// The list of conversations. On a narrow screen it is a drawer over the conversation.

import { byId, el } from "./dom.js";

const NARROW = matchMedia("(max-width: 859px)");

export class Sidebar {
  #items = new Map(); // conversation's id: its element, kept while it is listed: a press would be lost with it

  constructor({ choose, startNew }) {
    this.choose = choose;
    byId("new-conversation").addEventListener("click", () => {
      this.close();
      startNew();
    });
    byId("open-sidebar").addEventListener("click", () => this.#set(true));
    byId("close-sidebar").addEventListener("click", () => this.close());
    byId("scrim").addEventListener("click", () => this.close());
    NARROW.addEventListener("change", () => this.#set(false));
    this.#set(false);
  }

  // Entries: {id, title}, newest first.
  show(entries, current) {
    const list = byId("conversations");
    const items = new Map(entries.map(({ id }) => [id, this.#items.get(id) ?? this.#item(id)]));
    for (const [id, item] of this.#items) if (!items.has(id)) item.remove();
    this.#items = items;
    for (const [at, { id, title }] of entries.entries()) {
      const item = items.get(id);
      const button = item.firstElementChild;
      button.title = button.textContent = title;
      if (id === current) button.setAttribute("aria-current", "true");
      else button.removeAttribute("aria-current");
      if (list.children[at] !== item) list.insertBefore(item, list.children[at] ?? null);
    }
  }

  #item(id) {
    const choose = () => { this.close(); this.choose(id); };
    return el("li", {}, el("button", { type: "button", class: "conversation", on: { click: choose } }));
  }

  get isOpen() {
    return byId("app").classList.contains("drawer-open");
  }

  close() {
    if (!this.isOpen) return;
    this.#set(false);
    byId("open-sidebar").focus();
  }

  // What is behind the drawer, or in a closed one, takes no focus.
  #set(open) {
    byId("app").classList.toggle("drawer-open", open);
    byId("open-sidebar").setAttribute("aria-expanded", String(open));
    byId("sidebar").inert = NARROW.matches && !open;
    byId("main").inert = NARROW.matches && open;
    // With the next frame: until then it is hidden, and takes no focus.
    if (open) requestAnimationFrame(() => byId("close-sidebar").focus());
  }
}
