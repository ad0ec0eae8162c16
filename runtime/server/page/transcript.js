// The turns of the conversation that is looked at, and where the view stands in it.

import { byId } from "./dom.js";
import { turnView, updateAnswer } from "./turn_view.js";

const NEAR_END = 60; // pixels: closer to the end than this, the view follows the answer

export class Transcript {
  #views = new Map(); // turn: its element
  #following = true;
  #frame = 0;

  constructor(actions) {
    this.actions = actions;
    this.scroller = byId("transcript");
    this.turns = byId("turns");
    this.toEnd = byId("to-end");
    this.scroller.addEventListener("scroll", () => this.#look(), { passive: true });
    this.toEnd.addEventListener("click", () => {
      this.#scroll();
      this.scroller.focus({ preventScroll: true });
    });
    // Pictures and a higher message box move the end.
    new ResizeObserver(() => this.#following && this.#scroll()).observe(this.turns);
    new ResizeObserver(() => this.#following && this.#scroll()).observe(this.scroller);
  }

  // Shows a conversation from its turns; elements of turns that stay are kept.
  show(conversation, { fresh = false } = {}) {
    if (fresh) this.#views.clear();
    const views = new Map(conversation.turns.map((turn) => [turn, this.#views.get(turn) ?? turnView(turn, this.actions)]));
    this.#views = views;
    // A result that was sent takes its form away.
    for (const [turn, view] of views) if (view.querySelector(".results")) updateAnswer(view, turn, this.actions);
    this.turns.replaceChildren(...views.values());
    byId("empty").hidden = views.size > 0;
    this.turns.querySelector(".last")?.classList.remove("last");
    this.turns.lastElementChild?.classList.add("last");
    this.#following = true;
    this.#scroll();
  }

  // Brings an answer up to date with the next frame; `now` where the caller looks at the result.
  update(turn, now = false) {
    const view = this.#views.get(turn);
    if (!view) return;
    if (now) {
      cancelAnimationFrame(this.#frame);
      this.#frame = 0;
      updateAnswer(view, turn, this.actions);
      if (this.#following) this.#scroll();
    } else if (!this.#frame) {
      this.#frame = requestAnimationFrame(() => this.update(turn, true));
    }
  }

  #look() {
    const { scrollTop, scrollHeight, clientHeight } = this.scroller;
    this.#following = scrollHeight - scrollTop - clientHeight < NEAR_END;
    this.toEnd.hidden = this.#following;
  }

  #scroll() {
    this.scroller.scrollTop = this.scroller.scrollHeight;
    this.#look();
  }
}
