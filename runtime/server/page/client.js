// Requests to the server that the page came from, and what to tell a person when one fails.

// A failed request. `message`: a sentence with what to do; `kind`: gone, signed-out, busy, refused or broken.
export class ServerFault extends Error {
  constructor(kind, message, retryAfter = null) {
    super(message);
    this.kind = kind;
    this.retryAfter = retryAfter; // seconds
  }
}

export const GONE = "The server does not answer. Check that gemma-edge serve is running and that this device reaches it.";
export const BROKEN = "The connection broke off in the middle of the answer. The text so far is kept.";

// Relative to the page, so that it also works below a path of a reverse proxy.
const address = (path) => new URL(path, document.baseURI);

async function reach(path, options = {}) {
  try {
    return await fetch(address(path), { cache: "no-store", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerFault("gone", GONE);
  }
}

// Posts JSON. The answer is a response that succeeded, its body still to be read.
export async function post(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  const response = await reach(path, { method: "POST", headers, signal, body: JSON.stringify(body) });
  if (!response.ok) throw await faultOf(response);
  return response;
}

// An answer in JSON. `accepted`: a status that is one, beside success.
export async function getJson(path, accepted = 200) {
  const response = await reach(path);
  if (!response.ok && response.status !== accepted) throw await faultOf(response);
  try {
    return await response.json();
  } catch {
    throw new ServerFault("broken", `${path} is not what gemma-edge serve answers. Does another program listen here?`);
  }
}

export const signOut = () => reach("logout", { method: "POST" });

async function faultOf(response) {
  let detail = "";
  try {
    detail = (await response.json()).error?.message ?? "";
  } catch {
    // A proxy answers with a page of its own: the status says enough.
  }
  const wait = Number.parseInt(response.headers.get("Retry-After"), 10) || null;
  const later = wait ? `Try again in ${wait} ${wait === 1 ? "second" : "seconds"}.` : "Try again in a moment.";
  switch (response.status) {
    case 401:
      return new ServerFault("signed-out", "You are signed out. Reload the page to sign in: what you typed is kept.");
    case 413:
      return new ServerFault("refused", detail || "The message is too large for the server. Remove an attachment, or start a new conversation.");
    case 429:
      return new ServerFault("busy", `The server has too much to do and took no new request. ${later}`, wait);
    case 502:
    case 503:
    case 504:
      return new ServerFault("busy", `The server cannot answer now${detail ? `: ${detail}` : ""}. ${later}`, wait);
    default:
      return new ServerFault("refused", detail || `The server answered with status ${response.status}. Its log says why.`);
  }
}
