// The page: makes the parts, and joins them.

import { ask } from "./ask.js";
import { Chat } from "./chat.js";
import { ServerFault, getJson, signOut } from "./client.js";
import { Composer } from "./composer.js";
import { exported, newConversation } from "./conversation.js";
import { announce, byId, el, hasKeyboard, saveFile, toast } from "./dom.js";
import { showContext, showSpeed, watchHealth } from "./meters.js";
import { SettingsDialog, applyTheme, lastSettings, setTheme } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import { openStore, remember, remembered } from "./store.js";
import { Transcript } from "./transcript.js";

const DRAFT_SAVED_AFTER_MS = 300;
const ANNOUNCED_CHARACTERS = 1500;
const DARK = matchMedia("(prefers-color-scheme: dark)");
const SUGGESTIONS = [
  { text: "Explain how a rainbow forms, in three sentences." },
  { text: "Write a polite e-mail that moves a meeting to Thursday." },
  { text: "Describe this picture.", needs: "image" },
  { text: "Write down what is said in this recording.", needs: "audio" },
];

class App {
  models = [];
  limits = {};
  current = null;
  #choice = 0; // counts the conversations that the person chose: the last one is shown, however late the store is

  async start() {
    applyTheme();
    this.store = await openStore();
    this.chat = new Chat({
      store: this.store,
      model: (conversation) => this.modelOf(conversation).id,
      changed: (conversation) => this.#changed(conversation),
      asked: (conversation) => conversation === this.current && this.#showHead(), // the list is the store's
      streamed: (conversation, turn) => this.#streamed(conversation, turn),
      ended: (conversation, turn) => this.#ended(conversation, turn),
      parted: (conversation) => this.#parted(conversation),
    });
    this.store.listen((id) => this.#changedElsewhere(id));
    this.transcript = new Transcript({
      edit: (turn, text) => this.chat.edit(this.current, turn, text),
      regenerate: (turn) => this.chat.regenerate(this.current, turn),
      retry: (turn) => this.chat.regenerate(this.current, turn),
      results: (turn, results) => this.chat.giveResults(this.current, results),
      openCalls: (turn) => this.chat.openCalls(this.current, turn),
    });
    this.composer = new Composer({
      send: (text, attachments) => this.chat.send(this.current, text, attachments),
      stop: () => this.chat.stop(this.current),
      drafted: (draft) => this.#keepDraft(draft),
    });
    this.sidebar = new Sidebar({ choose: (id) => this.open(id), startNew: () => this.startNew() });
    this.#listen();
    await this.#askServer();
    await this.open(remembered("current"));
    if (!this.store.kept) byId("sidebar-foot").textContent = "This browser keeps nothing: export what you need.";
    this.lookAtHealth = watchHealth((sentence, health) => this.#serverIs(sentence, health));
    document.documentElement.dataset.ready = "true";
  }

  // What the server has. Without an answer the page still shows what this browser keeps.
  async #askServer() {
    try {
      const { models = [], limits = {}, signed_in: signedIn = false } = await getJson("page.json");
      Object.assign(this, { models, limits });
      this.#makeSettings(signedIn);
    } catch (error) {
      if (!(error instanceof ServerFault)) throw error;
      if (error.kind === "signed-out") location.reload();
      this.#notice(error.message);
    }
  }

  #makeSettings(signedIn) {
    this.settings = new SettingsDialog({
      models: this.models, signedIn,
      saved: (settings, model) => {
        this.current.settings = { ...settings, model };
        if (this.current.turns.length) this.chat.save(this.current);
        this.#showModel();
      },
      exportAll: () => this.#exportAll(),
      deleteAll: () => this.#deleteAll(),
      signOut: async () => {
        await signOut();
        location.reload();
      },
    });
  }

  modelOf(conversation) {
    return this.models.find(({ id }) => id === conversation.settings.model) ?? this.models[0] ?? { id: "", modalities: [] };
  }

  async open(id) {
    const choice = ++this.#choice;
    const conversation = (id && (this.chat.running(id) ?? await this.store.get(id))) || null;
    if (choice !== this.#choice) return;
    if (!conversation) {
      await this.startNew();
      return;
    }
    for (const turn of conversation.turns) {
      // The page was left while this answer came.
      if (["waiting", "streaming"].includes(turn.state) && !this.chat.isBusy(conversation)) turn.state = "stopped";
    }
    const unsaved = remembered("unsaved");
    remember("unsaved", null);
    if (unsaved?.id === conversation.id) {
      conversation.draft.text = unsaved.text;
      await this.chat.keep(conversation);
    }
    this.#show(conversation);
  }

  // The conversation without a turn, if there is one: it may hold a draft.
  async startNew() {
    const choice = ++this.#choice;
    if (this.current?.turns.length === 0) {
      this.composer.focus();
      return;
    }
    const begun = (await this.store.list()).find(({ turns }) => turns === 0);
    const conversation = (begun && await this.store.get(begun.id)) ?? newConversation(lastSettings());
    if (choice === this.#choice) this.#show(conversation);
  }

  #show(conversation) {
    if (this.current) this.chat.keep(this.current); // its draft may still wait to be saved
    clearTimeout(this.draftTimer);
    this.current = conversation;
    remember("current", conversation.id);
    this.transcript.show(conversation, { fresh: true });
    this.composer.setDraft(conversation.draft);
    this.composer.setBusy(this.chat.isBusy(conversation));
    this.#showModel();
    this.#showHead();
    this.#showFigures();
    if (hasKeyboard) this.composer.focus();
  }

  #showModel() {
    const { id, modalities = [] } = this.modelOf(this.current);
    const takes = { image: modalities.includes("image"), audio: modalities.includes("audio"), audioSeconds: this.limits.audio_seconds };
    byId("model-name").textContent = id;
    this.composer.setModel(takes);
    byId("suggestions").replaceChildren(...SUGGESTIONS.filter(({ needs }) => !needs || takes[needs]).map(({ text, needs }) => (
      el("li", {}, el("button", { type: "button", on: { click: () => this.composer.suggest(text, Boolean(needs)) } }, text))
    )));
  }

  #showTitle() {
    const { title, turns } = this.current;
    byId("title").textContent = title;
    document.title = turns.length ? `${title} · gemma-edge` : "gemma-edge";
    byId("open-actions").hidden = turns.length === 0;
  }

  async #showHead() {
    this.#showTitle();
    const entries = await this.store.list();
    this.sidebar.show(entries.filter((entry) => entry.turns > 0), this.current.id);
  }

  #showFigures() {
    const last = this.current.turns.findLast(({ role }) => role === "assistant");
    const counted = this.current.turns.findLast(({ usage }) => usage);
    showContext(counted?.usage.total_tokens ?? 0, this.modelOf(this.current).context);
    showSpeed(last?.speed);
  }

  #changed(conversation) {
    if (conversation !== this.current) return;
    this.transcript.show(conversation);
    this.composer.setBusy(true);
    this.#notice("");
    announce("Waiting for the answer");
    this.#showTitle();
  }

  #streamed(conversation, turn) {
    if (conversation !== this.current) return;
    this.transcript.update(turn);
    showSpeed(turn.speed);
  }

  // Screen readers hear an answer once, whole: not every token of it.
  #ended(conversation, turn) {
    if (conversation !== this.current) return;
    this.transcript.update(turn, true);
    this.composer.setBusy(this.chat.isBusy(conversation));
    this.#showFigures();
    this.#showHead();
    const calls = turn.calls.map(({ name }) => `The model calls ${name}.`).join(" ");
    const text = this.transcript.turns.lastElementChild.querySelector(".markdown").textContent;
    const more = text.length > ANNOUNCED_CHARACTERS ? " The rest is in the conversation." : "";
    if (turn.state === "stopped") announce("Stopped");
    else if (turn.state === "done") announce(`Answer: ${text.slice(0, ANNOUNCED_CHARACTERS)}${more} ${calls}`);
    this.lookAtHealth?.();
  }

  // Another tab stored or deleted a conversation. If it is shown here, its turns are; what is typed here stays.
  async #changedElsewhere(id) {
    const shown = this.current;
    if (id === shown?.id && !this.chat.isBusy(shown)) {
      const stored = await this.store.get(id);
      if (this.current !== shown || this.chat.isBusy(shown)) return;
      if (!stored || !shown.turns.length) {
        const { draft } = shown;
        shown.draft = { text: "", attachments: [] }; // it was never the other tab's
        this.#show({ ...newConversation(lastSettings()), draft });
      } else {
        this.current = { ...stored, draft: shown.draft };
        this.transcript.show(this.current);
        this.#showFigures();
      }
    }
    if (this.current) this.#showHead();
  }

  #parted(conversation) {
    if (conversation !== this.current) return;
    remember("current", conversation.id);
    this.#showHead();
    toast("Another tab went on with this conversation, too: this one is now a copy.");
  }

  #keepDraft(draft) {
    const conversation = this.current;
    conversation.draft = draft;
    clearTimeout(this.draftTimer);
    this.draftTimer = setTimeout(() => this.chat.keep(conversation), DRAFT_SAVED_AFTER_MS);
  }

  #notice(sentence) {
    const notice = byId("notice");
    if (notice.textContent !== sentence) notice.textContent = sentence;
    notice.hidden = !sentence;
  }

  // A server that came back after the page began is asked what it has.
  async #serverIs(sentence, health) {
    this.#notice(sentence ?? "");
    if (!health || this.models.length) return;
    await this.#askServer();
    this.#showModel();
    this.#showFigures();
  }

  #listen() {
    byId("open-settings").addEventListener("click", () => {
      if (this.settings) this.settings.open(this.current.settings, this.modelOf(this.current).id);
      else toast("The settings come from the server, which does not answer.");
    });
    byId("rename").addEventListener("click", () => this.#rename());
    byId("export").addEventListener("click", () => this.#export());
    byId("delete").addEventListener("click", () => this.#delete());
    byId("theme-switch").addEventListener("click", () => {
      setTheme(byId("theme-switch").getAttribute("aria-pressed") === "true" ? "light" : "dark");
      this.#showTheme();
    });
    DARK.addEventListener("change", () => this.#showTheme());
    new MutationObserver(() => this.#showTheme()).observe(document.documentElement, { attributeFilter: ["data-theme"] });
    this.#showTheme();
    document.addEventListener("keydown", (event) => {
      if (event.key !== "Escape" || event.defaultPrevented || document.querySelector("dialog[open], :popover-open")) return;
      if (this.composer.escape()) return;
      if (this.sidebar.isOpen) this.sidebar.close();
      else this.chat.stop(this.current);
    });
    // The last words typed, where the page is left at once: IndexedDB may be too late for them.
    addEventListener("pagehide", () => remember("unsaved", { id: this.current.id, text: this.current.draft.text }));
  }

  #showTheme() {
    const { theme } = document.documentElement.dataset;
    byId("theme-switch").setAttribute("aria-pressed", String(theme === "dark" || (theme === "system" && DARK.matches)));
  }

  async #rename() {
    byId("actions").hidePopover();
    const title = await ask({ title: "Rename the conversation", yes: "Rename", value: this.current.title });
    if (!title) return;
    Object.assign(this.current, { title, named: true });
    await this.chat.save(this.current);
    this.#showHead();
  }

  #export() {
    byId("actions").hidePopover();
    const name = this.current.title.replace(/[^\p{L}\p{N} -]+/gu, "").trim() || "conversation";
    saveFile(`${name}.json`, exported([this.current]));
  }

  async #delete() {
    byId("actions").hidePopover();
    const text = `“${this.current.title}” is deleted from this browser. Export it first to keep a copy.`;
    if (!await ask({ title: "Delete the conversation?", text, yes: "Delete", danger: true })) return;
    await this.chat.delete(this.current.id);
    this.#show(newConversation(lastSettings()));
    announce("Deleted");
  }

  async #exportAll() {
    const entries = await this.store.list();
    const all = await Promise.all(entries.filter(({ turns }) => turns).map(({ id }) => this.store.get(id)));
    if (all.length) saveFile("conversations.json", exported(all));
    else toast("There is no conversation to export.");
  }

  async #deleteAll() {
    const text = "All conversations are deleted from this browser. Export them first to keep a copy.";
    if (!await ask({ title: "Delete all conversations?", text, yes: "Delete all", danger: true })) return;
    for (const { id } of await this.store.list()) await this.chat.delete(id);
    this.settings.dialog.close();
    this.#show(newConversation(lastSettings()));
  }
}

new App().start();
