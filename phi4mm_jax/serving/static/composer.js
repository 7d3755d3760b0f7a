/** The message that is being written: its words, its pictures and its recordings. */

import { Recorder, clock, readMedium, readSound } from "./media.js";
import { mediumItem } from "./thread.js";

/**
 * @typedef {import("./media.js").Medium} Medium
 * @typedef {{words: string, media: Medium[]}} Draft
 */

/** @param {string} id @returns {any} */
const $ = (id) => document.getElementById(id);
const text = $("text");
const recorder = new Recorder();

/** @type {Medium[]} */
let media = [];
/** Settles when everything attached so far has been read. */
let attaching = Promise.resolve();
/** Whether an answer is coming. */
let running = false;

/** What has been written. @returns {Draft} */
export const draft = () => ({ words: text.value, media });

/** Waits for what is being recorded and read. */
export async function completed() {
  if (recorder.running) endRecording(true);
  await attaching;
}

/** @param {Draft} draft */
export function write(draft) {
  text.value = draft.words;
  show(draft.media);
  text.focus();
}

/** Offers to stop while an answer is coming. @param {boolean} isRunning */
export function showRunning(isRunning) {
  running = isRunning;
  update();
}

/**
 * Says something above the composer.
 *
 * @param {string} words "" for nothing
 * @param {string} [label] of a button
 * @param {() => void} [act] what it does
 */
export function notify(words, label, act) {
  $("notice").replaceChildren(words);
  if (!label) return;
  const button = Object.assign(document.createElement("button"), { type: "button", className: "link", onclick: act });
  button.append(label);
  $("notice").append(button);
}

/** Drops the recording that is being made. @returns {boolean} whether there was one */
export function discardRecording() {
  if (!recorder.running) return false;
  endRecording(false);
  return true;
}

/** @param {Medium[]} shown */
function show(shown) {
  media = shown;
  const without = (/** @type {Medium} */ medium) => () => write({ ...draft(), media: media.filter((m) => m !== medium) });
  $("tray").replaceChildren(...media.map((medium) => mediumItem(medium, without(medium))));
  update();
}

/** Brings buttons and sizes in line with the state. */
function update() {
  const recording = recorder.running;
  $("recording").hidden = !recording;
  $("record").ariaPressed = String(recording);
  $("record").ariaLabel = $("record").title = recording ? "Finish recording" : "Record speech";
  $("send").hidden = running;
  $("send").disabled = !(text.value.trim() || media.length || recording);
  $("stop").hidden = !running;
  text.style.height = "auto";
  text.style.height = `${text.scrollHeight}px`;
}

/** Adds a medium when it has been read; what cannot be read is told. @param {() => Promise<Medium>} read */
function attach(read) {
  attaching = attaching.then(async () => {
    try {
      // Pictures first, as the model was trained.
      show([...media, await read()].sort((a, b) => b.kind.localeCompare(a.kind)));
    } catch (error) {
      notify(error.message);
    }
  });
}

/** @param {Iterable<File>} files */
function attachFiles(files) {
  notify("");
  for (const file of files) attach(() => readMedium(file));
  text.focus();
}

let ticking = 0;

async function startRecording() {
  notify("");
  $("record").disabled = true; // while the browser asks whether it may
  try {
    await recorder.start();
  } catch (error) {
    return notify(error.message);
  } finally {
    $("record").disabled = false;
  }
  const start = Date.now();
  ticking = setInterval(() => ($("clock").value = clock((Date.now() - start) / 1000)), 250);
  update();
}

/** @param {boolean} keep */
function endRecording(keep) {
  clearInterval(ticking);
  $("clock").value = clock(0);
  const recording = recorder.stop();
  if (keep) attach(() => recording.then((blob) => readSound(blob, "Recording")));
  text.focus();
  update();
}

text.addEventListener("input", update);
$("attach").onclick = () => $("files").click();
$("files").onchange = () => {
  attachFiles([...$("files").files]);
  $("files").value = ""; // so that the same file may be chosen again
};
$("record").onclick = () => (recorder.running ? endRecording(true) : startRecording());
$("discard").onclick = discardRecording;
document.addEventListener("paste", (event) => {
  const { files, types } = event.clipboardData;
  if (!files.length || types.includes("text/plain")) return; // office programs add a picture to their text
  event.preventDefault();
  attachFiles([...files]);
});
for (const kind of /** @type {const} */ (["dragenter", "dragover", "dragleave", "drop"])) {
  document.addEventListener(kind, (event) => {
    if (!event.dataTransfer.types.includes("Files")) return;
    event.preventDefault();
    document.body.classList.toggle("dropping", kind === "dragenter" || kind === "dragover");
    if (kind === "drop") attachFiles([...event.dataTransfer.files]);
  });
}
