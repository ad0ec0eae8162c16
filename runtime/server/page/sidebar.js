// The list of conversations. On a narrow screen it is a drawer over the conversation.

import { byId, el } from "./dom.js";

const NARROW = matchMedia("(max-width: 859px)");

export class Sidebar {
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
    byId("conversations").replaceChildren(...entries.map(({ id, title }) => el("li", {},
      el("button", {
        type: "button", class: "conversation", title, "aria-current": id === current ? "true" : null,
        on: { click: () => { this.close(); this.choose(id); } },
      }, title))));
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
