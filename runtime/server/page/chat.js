// What a person does with a conversation: send, stop, ask again, edit, give a tool's result. Answers of several
// conversations may be under way at once; each goes on when another is looked at.

import { ServerFault } from "./client.js";
import { openCalls, requestOf, titleOf } from "./conversation.js";
import { newId } from "./dom.js";
import { streamAnswer } from "./stream.js";

const SAVED_EVERY_MS = 1000; // while an answer comes: what a closed tab may lose

export class Chat {
  #running = new Map(); // conversation's id: {conversation, controller}
  #deleted = new Set(); // ids: an answer that ends later must not bring its conversation back

  // `changed(conversation)`: turns came or went; `asked(conversation)`: they are in the store;
  // `streamed(conversation, turn)`: an answer grew;
  // `ended(conversation, turn)`: it is whole, stopped or failed; `parted(conversation)`: another tab went on with
  // it, too, so this one's has an id of its own now.
  constructor({ store, model, changed, asked, streamed, ended, parted }) {
    Object.assign(this, { store, model, changed, asked, streamed, ended, parted });
  }

  isBusy(conversation) {
    return this.#running.has(conversation.id);
  }

  // The conversation of an answer under way, which is newer than the one in the store.
  running(id) {
    return this.#running.get(id)?.conversation;
  }

  send(conversation, text, attachments) {
    conversation.turns.push({ role: "user", text, attachments });
    if (!conversation.named) conversation.title = titleOf(conversation.turns);
    return this.#answer(conversation);
  }

  stop(conversation) {
    this.#running.get(conversation.id)?.controller.abort();
  }

  // Answers again: the answer and what follows it go.
  regenerate(conversation, turn) {
    this.stop(conversation);
    conversation.turns.splice(conversation.turns.indexOf(turn));
    return this.#answer(conversation);
  }

  edit(conversation, turn, text) {
    this.stop(conversation);
    const at = conversation.turns.indexOf(turn);
    conversation.turns.splice(at, Infinity, { ...turn, text });
    if (!conversation.named) conversation.title = titleOf(conversation.turns);
    return this.#answer(conversation);
  }

  // Results of the tools that an answer called: {id, name, text} each.
  giveResults(conversation, results) {
    conversation.turns.push(...results.map((result) => ({ role: "tool", ...result })));
    return this.#answer(conversation);
  }

  openCalls(conversation, turn) {
    return conversation.turns.findLast(({ role }) => role === "assistant") === turn ? openCalls(conversation) : [];
  }

  async save(conversation) {
    const { id } = conversation;
    conversation.updated = Date.now();
    if (this.#deleted.has(id) || await this.store.put(conversation) || conversation.id !== id) return;
    const run = this.#running.get(id);
    Object.assign(conversation, { id: newId(), version: 0, title: `${conversation.title} (2)`, named: true });
    if (run) {
      this.#running.delete(id);
      this.#running.set(conversation.id, run);
    }
    await this.save(conversation);
    this.parted(conversation);
  }

  // Stores its draft, at its place in the list: that makes it no newer.
  async keep(conversation) {
    if (!this.#deleted.has(conversation.id)) await this.store.keepDraft(conversation);
  }

  async delete(id) {
    this.#deleted.add(id);
    this.#running.get(id)?.controller.abort();
    await this.store.remove(id);
  }

  async #answer(conversation) {
    const body = requestOf(conversation, this.model(conversation));
    const turn = { role: "assistant", text: "", calls: [], state: "waiting" };
    const run = { conversation, controller: new AbortController() };
    conversation.turns.push(turn);
    this.#running.set(conversation.id, run);
    this.changed(conversation);
    await this.save(conversation);
    this.asked(conversation);
    let saved = performance.now();
    try {
      await streamAnswer(body, turn, run.controller.signal, () => {
        this.streamed(conversation, turn);
        if (performance.now() - saved > SAVED_EVERY_MS) {
          saved = performance.now();
          this.save(conversation);
        }
      });
      turn.state = "done";
    } catch (error) {
      if (error.name === "AbortError") turn.state = "stopped";
      else if (error instanceof ServerFault) {
        turn.state = "failed";
        turn.fault = { kind: error.kind, message: error.message };
      } else throw error;
    } finally {
      // A later answer to the same conversation may have begun: it stopped this one.
      if (this.#running.get(conversation.id) === run) this.#running.delete(conversation.id);
    }
    if (!conversation.turns.includes(turn)) return;
    await this.save(conversation);
    this.ended(conversation, turn);
  }
}
