// The microphone: records until it is told to stop, and gives 16 kHz mono WAV.

import { resampled, wavOf } from "./wav.js";

// Why this page cannot record here, in a sentence; null if it can.
export function whyNoMicrophone() {
  if (!window.isSecureContext) {
    return "Browsers let a page record only over HTTPS or on localhost. Attach a recording instead.";
  }
  return navigator.mediaDevices?.getUserMedia && window.AudioWorkletNode
    ? null : "This browser cannot record. Attach a recording instead.";
}

export class Recording {
  #blocks = [];
  #samples = 0;

  // Asks for the microphone and starts. `heard(seconds, level)` is called with every block; level: 0 to 1.
  //
  // Throws Error with a sentence when the person or the browser refuses.
  static async start(heard) {
    const recording = new Recording();
    try {
      recording.stream = await navigator.mediaDevices.getUserMedia({ audio: { channelCount: 1 } });
    } catch (error) {
      throw new Error(error.name === "NotFoundError"
        ? "No microphone was found. Connect one, or attach a recording."
        : "The browser refused the microphone. Allow it for this page in the browser's settings, or attach a recording.");
    }
    // The rate is the microphone's: not every browser lets a context have another.
    recording.context = new AudioContext();
    await recording.context.audioWorklet.addModule(new URL("recorder_worklet.js", import.meta.url));
    const node = new AudioWorkletNode(recording.context, "recorder", { numberOfOutputs: 0 });
    node.port.onmessage = ({ data }) => {
      recording.#blocks.push(data);
      recording.#samples += data.length;
      const level = data.reduce((most, sample) => Math.max(most, Math.abs(sample)), 0);
      heard(recording.#samples / recording.context.sampleRate, level);
    };
    recording.context.createMediaStreamSource(recording.stream).connect(node);
    return recording;
  }

  // Ends it: {blob, seconds}.
  async stop() {
    const rate = this.context.sampleRate;
    this.cancel();
    const samples = new Float32Array(this.#samples);
    let at = 0;
    for (const block of this.#blocks) {
      samples.set(block, at);
      at += block.length;
    }
    const speech = await resampled(samples, rate);
    return { blob: wavOf(speech), seconds: samples.length / rate };
  }

  // Lets go of the microphone. What was recorded is gone unless stop() is under way.
  cancel() {
    this.stream.getTracks().forEach((track) => track.stop());
    this.context.close();
  }
}
