// Sound as the model wants it: 16 kHz, one channel, 16-bit WAV.

export const RATE = 16_000;

// Samples at 16 kHz, from samples of one channel at another rate. The browser filters what would alias.
export async function resampled(samples, rate) {
  if (rate === RATE || samples.length === 0) return samples;
  const offline = new OfflineAudioContext(1, Math.max(1, Math.round(samples.length * RATE / rate)), RATE);
  const buffer = offline.createBuffer(1, samples.length, rate);
  buffer.copyToChannel(samples, 0);
  const source = offline.createBufferSource();
  source.buffer = buffer;
  source.connect(offline.destination);
  source.start();
  return (await offline.startRendering()).getChannelData(0);
}

// {blob, seconds} of a sound file that the browser can decode, its channels averaged. Throws EncodingError otherwise.
export async function wavOfFile(file) {
  // The decoder of an offline context resamples to its rate.
  const context = new OfflineAudioContext(1, 1, RATE);
  const sound = await context.decodeAudioData(await file.arrayBuffer());
  const samples = new Float32Array(sound.length);
  for (let channel = 0; channel < sound.numberOfChannels; channel += 1) {
    const data = sound.getChannelData(channel);
    for (let at = 0; at < data.length; at += 1) samples[at] += data[at] / sound.numberOfChannels;
  }
  return { blob: wavOf(samples), seconds: sound.duration };
}

// A WAV file of samples between -1 and 1 at 16 kHz.
export function wavOf(samples) {
  const bytes = new DataView(new ArrayBuffer(44 + 2 * samples.length));
  const text = (at, characters) => [...characters].forEach((c, i) => bytes.setUint8(at + i, c.charCodeAt(0)));
  text(0, "RIFF");
  bytes.setUint32(4, 36 + 2 * samples.length, true);
  text(8, "WAVEfmt ");
  bytes.setUint32(16, 16, true);
  bytes.setUint16(20, 1, true); // PCM
  bytes.setUint16(22, 1, true); // channels
  bytes.setUint32(24, RATE, true);
  bytes.setUint32(28, 2 * RATE, true); // bytes a second
  bytes.setUint16(32, 2, true); // bytes a sample
  bytes.setUint16(34, 16, true); // bits a sample
  text(36, "data");
  bytes.setUint32(40, 2 * samples.length, true);
  samples.forEach((sample, at) => {
    bytes.setInt16(44 + 2 * at, Math.round(Math.max(-1, Math.min(1, sample)) * 32767), true);
  });
  return new Blob([bytes], { type: "audio/wav" });
}
