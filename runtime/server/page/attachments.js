// Pictures and sound that a person attaches: made small enough to send, and shown.

import { clock, el, icon, iconButton } from "./dom.js";
import { wavOfFile } from "./wav.js";

const MOST_PIXELS = 1024; // a side; the image encoder looks at fewer
const MOST_BYTES = 1_000_000; // of a picture that is sent as it is
const QUALITY = 0.92;

const dataUrl = (blob) => new Promise((resolve, reject) => {
  const reader = new FileReader();
  reader.onload = () => resolve(reader.result);
  reader.onerror = () => reject(reader.error);
  reader.readAsDataURL(blob);
});

// The attachment of a file: {kind, name, url, seconds}. Throws Error with a sentence if there is none to be made.
export async function attachmentOf(file, { image, audio, audioSeconds }) {
  if (file.type.startsWith("image/")) {
    if (!image) throw new Error("This model takes no images.");
    return { kind: "image", name: file.name, url: await dataUrl(await smallPicture(file)) };
  }
  if (/^(audio|video)\//.test(file.type)) {
    if (!audio) throw new Error("This model takes no audio.");
    let sound;
    try {
      sound = await wavOfFile(file);
    } catch {
      throw new Error(`${file.name}: this browser cannot decode it. Convert it to WAV or MP3.`);
    }
    return recordingOf(file.name, sound, audioSeconds);
  }
  throw new Error(`${file.name} is neither a picture nor a recording.`);
}

export async function recordingOf(name, { blob, seconds }, most) {
  if (most && seconds > most) {
    throw new Error(`${name} is ${clock(seconds)} long. The server takes at most ${clock(most)}.`);
  }
  return { kind: "audio", name, seconds, url: await dataUrl(blob) };
}

async function smallPicture(file) {
  let picture;
  try {
    picture = await createImageBitmap(file);
  } catch {
    throw new Error(`${file.name}: this browser cannot open the picture. Convert it to JPEG or PNG.`);
  }
  const scale = Math.min(1, MOST_PIXELS / Math.max(picture.width, picture.height));
  if (scale === 1 && file.size <= MOST_BYTES && /^image\/(jpeg|png)$/.test(file.type)) return file;
  const canvas = el("canvas");
  canvas.width = Math.max(1, Math.round(picture.width * scale));
  canvas.height = Math.max(1, Math.round(picture.height * scale));
  const context = canvas.getContext("2d");
  context.fillStyle = "#fff"; // JPEG has no transparency
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.imageSmoothingQuality = "high";
  context.drawImage(picture, 0, 0, canvas.width, canvas.height);
  return new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", QUALITY));
}

// An attachment as one sees it; `remove` adds a button.
export function attachmentView(attachment, remove) {
  const { kind, name, url, seconds } = attachment;
  const shown = kind === "image"
    ? el("img", { src: url, alt: name, title: name })
    : el("div", { class: "sound" }, icon("wave"), el("span", { class: "sound-name" }, name),
        el("span", { class: "sound-length" }, clock(seconds ?? 0)),
        el("audio", { controls: true, preload: "metadata", src: url, "aria-label": name }));
  return el("li", { class: `attachment ${kind}` }, shown,
    remove ? iconButton("close", `Remove ${name}`, remove, { class: "icon-button remove" }) : null);
}
