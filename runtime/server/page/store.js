// Conversations in the browser's IndexedDB: whole ones, and an index of titles that the list is made from.
// Tabs share them: each counts a conversation's versions, and tells the others of what it changed.

const NAME = "gemma-edge";
const VERSION = 1;

const done = (request) => new Promise((resolve, reject) => {
  request.onsuccess = () => resolve(request.result);
  request.onerror = () => reject(request.error);
});

const finished = (transaction) => new Promise((resolve, reject) => {
  transaction.oncomplete = () => resolve();
  transaction.onabort = transaction.onerror = () => reject(transaction.error);
});

const entryOf = ({ id, title, updated, turns }) => ({ id, title, updated, turns: turns.length });

// The store; `kept` is false where the browser keeps nothing, as some private windows do.
export async function openStore() {
  try {
    const request = indexedDB.open(NAME, VERSION);
    request.onupgradeneeded = () => {
      request.result.createObjectStore("conversations", { keyPath: "id" });
      request.result.createObjectStore("index", { keyPath: "id" });
    };
    return new BrowserStore(await done(request));
  } catch {
    return new MemoryStore();
  }
}

class BrowserStore {
  kept = true;

  constructor(database) {
    this.database = database;
    this.channel = new BroadcastChannel(NAME);
    // Another tab with a newer page may change the layout.
    database.onversionchange = () => database.close();
  }

  // Index entries {id, title, updated, turns}, newest first.
  async list() {
    const entries = await done(this.database.transaction("index").objectStore("index").getAll());
    return entries.sort((a, b) => b.updated - a.updated);
  }

  get(id) {
    return done(this.database.transaction("conversations").objectStore("conversations").get(id));
  }

  // Stores a conversation as its next version; false if another tab has stored that already.
  async put(conversation) {
    let newest = true;
    await this.#replace(conversation, (stored) => {
      newest = !stored || (stored.version ?? 0) === (conversation.version ?? 0);
      if (!newest) return null;
      conversation.version = (conversation.version ?? 0) + 1;
      return conversation;
    });
    if (newest) this.channel.postMessage(conversation.id);
    return newest;
  }

  // Stores a draft alone: its turns may be newer in another tab, or deleted there.
  keepDraft(conversation) {
    return this.#replace(conversation, (stored) => {
      if (stored?.turns.length) return { ...stored, draft: conversation.draft };
      return conversation.turns.length ? null : conversation;
    });
  }

  async remove(id) {
    await this.#change((conversations, index) => {
      conversations.delete(id);
      index.delete(id);
    });
    this.channel.postMessage(id);
  }

  // `changed(id)`: another tab stored or deleted a conversation.
  listen(changed) {
    this.channel.onmessage = ({ data: id }) => changed(id);
  }

  // Stores what `next` makes of the stored conversation; nothing if that is null.
  #replace({ id }, next) {
    return this.#change((conversations, index) => {
      conversations.get(id).onsuccess = ({ target: { result: stored } }) => {
        const made = next(stored);
        if (!made) return;
        conversations.put(made);
        index.put(entryOf(made));
      };
    });
  }

  #change(change) {
    const transaction = this.database.transaction(["conversations", "index"], "readwrite");
    change(transaction.objectStore("conversations"), transaction.objectStore("index"));
    return finished(transaction);
  }
}

class MemoryStore {
  kept = false;
  #held = new Map();

  async list() {
    return [...this.#held.values()].map(entryOf).sort((a, b) => b.updated - a.updated);
  }

  async get(id) {
    return this.#held.get(id);
  }

  async put(conversation) {
    this.#held.set(conversation.id, conversation);
    return true;
  }

  keepDraft(conversation) {
    return this.put(conversation);
  }

  async remove(id) {
    this.#held.delete(id);
  }

  listen() {}
}

// Small things that are needed before the first paint, or are one value: theme, settings, key.
export function remembered(name, fallback = null) {
  try {
    const text = localStorage.getItem(`gemma-edge.${name}`);
    return text === null ? fallback : JSON.parse(text);
  } catch {
    return fallback;
  }
}

export function remember(name, value) {
  try {
    if (value === null) localStorage.removeItem(`gemma-edge.${name}`);
    else localStorage.setItem(`gemma-edge.${name}`, JSON.stringify(value));
  } catch {
    // A private window without storage: the value holds until the page is left.
  }
}
