// Conversations in the browser's IndexedDB: whole ones, and an index of titles that the list is made from.

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

  put(conversation) {
    return this.#change((conversations, index) => {
      conversations.put(conversation);
      index.put(entryOf(conversation));
    });
  }

  remove(id) {
    return this.#change((conversations, index) => {
      conversations.delete(id);
      index.delete(id);
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
  }

  async remove(id) {
    this.#held.delete(id);
  }
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
