// The meters below the message box: memory against its ceiling, context in use, speed. And the state of the server.

import { ServerFault, getJson } from "./client.js";
import { byId } from "./dom.js";

const EVERY_MS = 5000;
const NEARLY = 0.85; // of a ceiling or a context: the bar changes its colour

// A meter in words, in the fewer that a phone has room for, and as a bar if `share` of the most is known.
function show(id, words, short, share = null) {
  const meter = byId(id);
  meter.hidden = false;
  meter.querySelector(".meter-words").textContent = words;
  meter.querySelector(".meter-short").textContent = short;
  const bar = meter.querySelector(".bar");
  if (!bar) return;
  bar.hidden = share === null;
  if (share === null) return;
  const percent = Math.round(100 * Math.min(1, share));
  bar.classList.toggle("nearly", share >= NEARLY);
  bar.setAttribute("aria-valuenow", percent);
  bar.setAttribute("aria-valuetext", words);
  bar.firstElementChild.style.width = `${percent}%`;
}

// Bytes as one reads them. Beside a `total` that follows, the number alone, in the total's unit.
function inMemory(bytes, total = null) {
  const large = (total ?? bytes) >= 1e9;
  const number = large ? (bytes / 1e9).toFixed(2) : Math.round(bytes / 1e6).toLocaleString("en");
  return total ? number : `${number} ${large ? "GB" : "MB"}`;
}

export function showContext(used, context) {
  if (!context) return;
  const words = `${used.toLocaleString("en")} of ${context.toLocaleString("en")} tokens`;
  show("context-meter", words, `${Math.round(100 * used / context)} % context`, used / context);
}

export function showSpeed(tokensPerSecond) {
  const words = `${tokensPerSecond?.toFixed(1)} tok/s`;
  show("speed-meter", words, words);
  byId("speed-meter").hidden = !tokensPerSecond;
}

function showMemory({ rss_anon_bytes: used, ceiling_bytes: ceiling }) {
  if (!used) return;
  const words = ceiling ? `${inMemory(used, ceiling)} of ${inMemory(ceiling)}` : inMemory(used);
  show("memory-meter", words, words, ceiling ? used / ceiling : null);
}

// Asks /health while the page is looked at. `changed` gets a sentence when the server's state is worth one, or null.
export function watchHealth(changed) {
  let timer;
  async function look() {
    clearTimeout(timer);
    if (document.hidden) return;
    try {
      const health = await getJson("health", 503);
      showMemory(health.memory ?? {});
      changed(health.status === "unhealthy" ? `The server is not well: ${(health.reasons ?? []).join("; ")}.` : null, health);
    } catch (error) {
      if (!(error instanceof ServerFault)) throw error;
      changed(error.message, null);
    }
    timer = setTimeout(look, EVERY_MS);
  }
  document.addEventListener("visibilitychange", look);
  look();
  return look;
}
