// The message box: text, attachments, microphone. What is typed is a draft that the conversation keeps.

import { attachmentOf, attachmentView, recordingOf } from "./attachments.js";
import { announce, byId, clock, el, hasKeyboard, isSending, toast } from "./dom.js";
import { Recording, whyNoMicrophone } from "./recorder.js";

const BARS = 24; // of the level meter
const RECORDED_SECONDS = 600; // where the server names no limit

export class Composer {
  #recording = null;
  #attachments = [];

  // `send(text, attachments)` and `stop()` act; `drafted({text, attachments})` is told of every change.
  constructor({ send, stop, drafted }) {
    this.send = send;
    this.drafted = drafted;
    this.takes = {};
    this.busy = false;
    this.prompt = byId("prompt");
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#submit();
    });
    byId("stop").addEventListener("click", stop);
    byId("attach").addEventListener("click", () => this.#choose());
    byId("files").addEventListener("change", ({ target }) => this.#attach(target.files).then(() => { target.value = ""; }));
    byId("microphone").addEventListener("click", () => this.#record());
    byId("recording-cancel").addEventListener("click", () => this.#endRecording(false));
    byId("recording-done").addEventListener("click", () => this.#endRecording(true));
    this.prompt.addEventListener("input", () => this.#changed());
    this.prompt.addEventListener("keydown", (event) => this.#key(event));
    this.prompt.addEventListener("paste", (event) => this.#paste(event));
    byId("keys").textContent = hasKeyboard ? "Enter sends, Shift+Enter starts a new line, Esc stops" : "";
    this.#takeDrops();
  }

  // What the model takes: {image, audio, audioSeconds}.
  setModel(takes) {
    this.takes = takes;
    const kinds = [takes.image && "pictures", takes.audio && "sound"].filter(Boolean).join(" or ");
    const attach = byId("attach");
    attach.hidden = !kinds;
    attach.title = `Attach ${kinds}`;
    attach.setAttribute("aria-label", `Attach ${kinds}`);
    byId("drop").firstElementChild.textContent = `Drop ${kinds} here`;
    byId("microphone").hidden = !takes.audio;
  }

  setBusy(busy) {
    this.busy = busy;
    byId("stop").hidden = !busy;
    byId("send").hidden = busy;
    this.#enable();
  }

  setDraft({ text, attachments }) {
    this.prompt.value = text;
    this.#attachments = [...attachments];
    this.#showAttachments();
    this.#grow();
    this.#enable();
  }

  focus() {
    this.prompt.focus({ preventScroll: true });
  }

  suggest(text, choose) {
    this.prompt.value = text;
    this.#changed();
    this.focus();
    if (choose) this.#choose();
  }

  #submit() {
    const text = this.prompt.value.trim();
    if (this.busy || this.#recording || (!text && !this.#attachments.length)) return;
    const attachments = this.#attachments;
    this.setDraft({ text: "", attachments: [] });
    this.drafted({ text: "", attachments: [] });
    this.send(text, attachments);
  }

  #key(event) {
    if (!isSending(event)) return;
    event.preventDefault();
    this.#submit();
  }

  #changed() {
    this.#grow();
    this.#enable();
    this.drafted({ text: this.prompt.value, attachments: this.#attachments });
  }

  #grow() {
    this.prompt.style.height = "auto";
    this.prompt.style.height = `${this.prompt.scrollHeight}px`;
  }

  #enable() {
    byId("send").disabled = !this.prompt.value.trim() && !this.#attachments.length;
  }

  #choose() {
    const files = byId("files");
    files.accept = [this.takes.image && "image/*", this.takes.audio && "audio/*"].filter(Boolean).join(",");
    files.click();
  }

  async #attach(files) {
    for (const file of [...files]) {
      try {
        this.#attachments.push(await attachmentOf(file, this.takes));
        announce(`Attached ${file.name}`);
      } catch (error) {
        toast(error.message);
      }
    }
    this.#showAttachments();
    this.#changed();
  }

  #showAttachments() {
    const list = byId("attachments");
    list.hidden = !this.#attachments.length;
    list.replaceChildren(...this.#attachments.map((attachment) => attachmentView(attachment, () => {
      this.#attachments = this.#attachments.filter((other) => other !== attachment);
      this.#showAttachments();
      this.#changed();
      this.focus();
    })));
  }

  #paste(event) {
    const files = [...event.clipboardData.files];
    if (!files.length || (!this.takes.image && !this.takes.audio)) return;
    event.preventDefault();
    this.#attach(files);
  }

  #takeDrops() {
    const drop = byId("drop");
    const hasFiles = (event) => event.dataTransfer?.types.includes("Files") && (this.takes.image || this.takes.audio);
    const show = (shown) => drop.classList.toggle("shown", shown);
    addEventListener("dragover", (event) => {
      if (!hasFiles(event)) return;
      event.preventDefault();
      show(true);
    });
    addEventListener("dragleave", (event) => { if (!event.relatedTarget) show(false); });
    addEventListener("drop", (event) => {
      show(false);
      if (!hasFiles(event)) return;
      event.preventDefault();
      this.#attach(event.dataTransfer.files);
    });
  }

  async #record() {
    const why = whyNoMicrophone();
    if (why) {
      toast(why);
      return;
    }
    const levels = Array.from({ length: BARS }, () => el("i"));
    byId("levels").replaceChildren(...levels);
    const most = this.takes.audioSeconds ?? RECORDED_SECONDS;
    let shown = -1;
    const heard = (seconds, level) => {
      const step = Math.floor(seconds * 10);
      if (step === shown) return;
      shown = step;
      byId("recording-time").textContent = clock(seconds);
      levels[step % BARS].style.height = `${Math.round(15 + 85 * Math.min(1, level * 1.5))}%`;
      if (seconds >= most) this.#endRecording(true);
    };
    try {
      this.#recording = await Recording.start(heard);
    } catch (error) {
      toast(error.message);
      return;
    }
    this.#showRecording(true);
    announce("Recording");
    byId("recording-done").focus();
  }

  async #endRecording(kept) {
    const recording = this.#recording;
    this.#recording = null;
    if (!recording) return;
    if (kept) {
      const sound = await recording.stop();
      this.#attachments.push(await recordingOf("Recording", sound));
      this.#showAttachments();
      this.#changed();
      announce(`Attached a recording of ${Math.round(sound.seconds)} seconds`);
    } else {
      recording.cancel();
    }
    this.#showRecording(false);
    this.focus();
  }

  // Esc: whether a recording was cancelled by it.
  escape() {
    const recording = Boolean(this.#recording);
    this.#endRecording(false);
    return recording;
  }

  #showRecording(shown) {
    byId("recording").hidden = !shown;
    byId("box").classList.toggle("is-recording", shown);
    byId("recording-time").textContent = "0:00";
  }
}
