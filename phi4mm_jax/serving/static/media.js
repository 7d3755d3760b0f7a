/** Pictures and recordings in the form in which they are sent. */

/**
 * @typedef {object} Medium
 * @property {"image" | "audio"} kind
 * @property {string} name
 * @property {string} data base64 data URL
 * @property {number} [seconds] of a recording
 */

/** Pixels of a picture's longest side; larger ones are scaled down. */
const LONGEST_SIDE = 2048;
/** What goes out as it is; everything else that a browser can show goes out as PNG. */
const PICTURE_TYPES = ["image/jpeg", "image/png", "image/webp"];
/** Samples a second that the model hears. */
const RATE = 16000;

/**
 * @param {File} file picture or recording
 * @returns {Promise<Medium>}
 * @throws {Error} in words for the user
 */
export async function readMedium(file) {
  if (file.type.startsWith("image/")) return readPicture(file);
  if (file.type.startsWith("audio/")) return readSound(file, file.name);
  throw new Error(`${file.name} is neither a picture nor a recording.`);
}

/** The part of a message that holds a medium. @param {Medium} medium */
export function toPart({ kind, data }) {
  return kind === "image"
    ? { type: "image_url", image_url: { url: data } }
    : { type: "input_audio", input_audio: { data: data.slice(data.indexOf(",") + 1), format: "wav" } };
}

/** Minutes and seconds. @param {number} seconds */
export const clock = (seconds) => `${Math.floor(seconds / 60)}:${String(Math.floor(seconds % 60)).padStart(2, "0")}`;

/** @param {Blob} blob @param {string} name @returns {Promise<string>} */
const toDataUrl = (blob, name) =>
  new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(String(reader.result));
    reader.onerror = () => reject(new Error(`${name} cannot be read.`));
    reader.readAsDataURL(blob);
  });

/** @param {File} file @returns {Promise<Medium>} */
async function readPicture(file) {
  const { name, type } = file;
  const image = new Image();
  image.src = await toDataUrl(file, name);
  await image.decode().catch(() => {
    throw new Error(`${name} is not a picture that this browser can read.`);
  });
  const { naturalWidth: width, naturalHeight: height } = image;
  const scale = Math.min(1, LONGEST_SIDE / Math.max(width, height));
  if (scale === 1 && PICTURE_TYPES.includes(type)) return { kind: "image", name, data: image.src };
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(width * scale));
  canvas.height = Math.max(1, Math.round(height * scale));
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(image, 0, 0, canvas.width, canvas.height);
  return { kind: "image", name, data: canvas.toDataURL(type === "image/jpeg" ? type : "image/png", 0.92) };
}

/**
 * A sound as 16 kHz mono WAV, which every server decodes; what browsers record, WebM and MP4, few do.
 *
 * @param {Blob} blob in any form that the browser plays
 * @param {string} name
 * @returns {Promise<Medium>}
 */
export async function readSound(blob, name) {
  const context = new OfflineAudioContext(1, 1, RATE); // decodes at its own rate
  const sound = await context.decodeAudioData(await blob.arrayBuffer()).catch(() => {
    throw new Error(`${name} is not a recording that this browser can read.`);
  });
  const channels = Array.from({ length: sound.numberOfChannels }, (_, i) => sound.getChannelData(i));
  const mono = channels[0].map((_, t) => channels.reduce((sum, channel) => sum + channel[t], 0) / channels.length);
  return { kind: "audio", name, data: await toDataUrl(toWav(mono), name), seconds: sound.duration };
}

/** @param {Float32Array} samples in -1 to 1 */
function toWav(samples) {
  const view = new DataView(new ArrayBuffer(44 + 2 * samples.length));
  const ascii = (/** @type {number} */ at, /** @type {string} */ text) =>
    [...text].forEach((sign, i) => view.setUint8(at + i, sign.charCodeAt(0)));
  ascii(0, "RIFF");
  view.setUint32(4, 36 + 2 * samples.length, true);
  ascii(8, "WAVEfmt ");
  view.setUint32(16, 16, true); // bytes of the format that follows
  view.setUint16(20, 1, true); // PCM
  view.setUint16(22, 1, true); // channels
  view.setUint32(24, RATE, true);
  view.setUint32(28, 2 * RATE, true); // bytes a second
  view.setUint16(32, 2, true); // bytes of a frame
  view.setUint16(34, 16, true); // bits of a sample
  ascii(36, "data");
  view.setUint32(40, 2 * samples.length, true);
  samples.forEach((sample, t) => view.setInt16(44 + 2 * t, Math.round(32767 * Math.max(-1, Math.min(1, sample))), true));
  return new Blob([view], { type: "audio/wav" });
}

/** The microphone, from `start` to `stop`. */
export class Recorder {
  /** @type {MediaRecorder | null} */
  #recorder = null;

  get running() {
    return this.#recorder !== null;
  }

  /** @throws {Error} in words for the user */
  async start() {
    if (!navigator.mediaDevices) throw new Error("Browsers open the microphone only for pages from HTTPS or localhost.");
    const stream = await navigator.mediaDevices.getUserMedia({ audio: true }).catch((error) => {
      const denied = error.name === "NotAllowedError";
      throw new Error(denied ? "The microphone is blocked for this page." : "No microphone was found.");
    });
    this.#recorder = new MediaRecorder(stream);
    this.#recorder.start();
  }

  /** Ends the recording. @returns {Promise<Blob>} what was recorded */
  stop() {
    const recorder = this.#recorder;
    this.#recorder = null;
    return new Promise((resolve) => {
      recorder.ondataavailable = (event) => resolve(event.data);
      recorder.stop();
      recorder.stream.getTracks().forEach((track) => track.stop());
    });
  }
}
