/** The chat page: a conversation with the server, kept in memory. */

import { completed, discardRecording, draft, notify, showRunning, write } from "./composer.js";
import { toPart } from "./media.js";
import { ServerError, isReady, models, streamAnswer } from "./server.js";
import { apiKey, model, offerModels, onClosed, openSettings, sampling, systemPrompt } from "./settings.js";
import { answer, question, showEnd, showText } from "./thread.js";

/**
 * @typedef {import("./composer.js").Draft} Draft
 * @typedef {import("./server.js").Usage} Usage
 * @typedef {import("./thread.js").Turn} Turn
 */

/** @param {string} id @returns {any} */
const $ = (id) => document.getElementById(id);
const [text, thread, scroller, spoken] = [$("text"), $("thread"), $("scroller"), $("spoken")];

/** @type {Turn[]} */
let turns = [];
/** The question that is being changed, and what was being written before. @type {{turn: Turn, before: Draft} | null} */
let editing = null;
/** Ends the answer that is coming. @type {AbortController | null} */
let running = null;
let connecting = false;

// --- the server's state ---

/** @param {"ready" | "warming" | "away" | "locked"} state @param {string} words */
function showStatus(state, words) {
  $("status").dataset.state = state;
  $("status").textContent = words;
}

/** Asks until the server is ready. */
async function connect() {
  if (connecting) return;
  connecting = true;
  while (!(await greet())) await new Promise((resolve) => setTimeout(resolve, 2000));
  connecting = false;
}

/** Asks once whether the server is ready, and for its models. @returns {Promise<boolean>} whether asking on is no use */
async function greet() {
  try {
    const ready = await isReady();
    offerModels(await models(apiKey()));
    if (ready) showStatus("ready", model());
    else showStatus("warming", "The model is warming up");
    return ready;
  } catch (error) {
    const locked = error.status === 401;
    if (locked) showStatus("locked", "An API key is needed");
    else showStatus("away", "The server cannot be reached");
    return locked;
  }
}

// --- the conversation ---

/** @param {Turn} turn */
function toMessage({ role, text, media }) {
  if (!media.length) return { role, content: text };
  return { role, content: [...media.map(toPart), ...(text ? [{ type: "text", text }] : [])] };
}

/** The body of a request for the next answer. */
function request() {
  const messages = turns.filter((turn) => turn.text || turn.media.length).map(toMessage);
  const system = systemPrompt() ? [{ role: "system", content: systemPrompt() }] : [];
  return { model: model() || undefined, messages: [...system, ...messages], ...sampling() };
}

/** @param {Turn} turn */
function append(turn) {
  turns.push(turn);
  thread.append(turn.node);
  follow();
}

/** Takes a turn and all that follow out of the conversation. @param {Turn} turn */
function dropFrom(turn) {
  for (const { node } of turns.splice(turns.indexOf(turn))) node.remove();
}

/** Gets the next answer and shows it as it comes. */
async function getAnswer() {
  const abort = (running = new AbortController());
  const body = request();
  const turn = answer();
  append(turn);
  spoken.replaceChildren();
  update();
  let [frame, first, last, reason] = [0, 0, 0, ""];
  /** @type {Usage | undefined} */
  let usage;
  try {
    for await (const chunk of streamAnswer(body, apiKey(), abort.signal)) {
      const [choice] = chunk.choices;
      if (choice?.delta.content) {
        last = performance.now();
        first ||= last;
        turn.text += choice.delta.content;
        frame ||= requestAnimationFrame(() => {
          frame = 0;
          speak(showText(turn).slice(0, -1));
        });
      }
      reason = choice?.finish_reason ?? reason;
      usage = chunk.usage ?? usage;
    }
    showEnd(turn, { figures: figures(usage, (last - first) / 1000, reason) });
  } catch (error) {
    if (abort.signal.aborted) showEnd(turn, { figures: "stopped" });
    else showProblem(turn, error);
  }
  cancelAnimationFrame(frame);
  speak(showText(turn));
  if (running === abort) running = null;
  update();
}

/** Tells screen readers what is new among an answer's finished blocks; word by word it would be a stammer. */
function speak(/** @type {string[]} */ blocks) {
  for (const block of blocks.slice(spoken.children.length)) {
    spoken.appendChild(document.createElement("p")).textContent = block;
  }
}

/** Counts and speed in words. @param {Usage | undefined} usage @param {number} seconds @param {string} reason */
function figures(usage, seconds, reason) {
  const parts = reason === "length" ? ["cut off at the limit of tokens"] : [];
  if (!usage) return parts.join();
  const { completion_tokens: written, prompt_tokens: read } = usage;
  parts.push(`${written.toLocaleString("en")} ${written === 1 ? "token" : "tokens"}`);
  if (seconds > 0) {
    const rate = (written - 1) / seconds; // the first token starts the clock
    parts.push(`${rate.toLocaleString("en", { maximumSignificantDigits: 3 })} tokens/s`);
  }
  return [...parts, `${read.toLocaleString("en")} in the prompt`].join(" · ");
}

/** @param {Turn} turn @param {any} error */
function showProblem(turn, error) {
  if (!(error instanceof ServerError)) console.error(error);
  showEnd(turn, { problem: error.message });
  if (error.status === 401) openSettings("key");
  if (error.status === 0 || error.status === 503) connect();
}

async function send() {
  await completed();
  const { words, media } = draft();
  if (running || !(words.trim() || media.length)) return;
  if (editing) dropFrom(editing.turn);
  editing = null;
  append(question(words.trim(), media));
  notify("");
  write({ words: "", media: [] });
  getAnswer();
}

function regenerate() {
  if (running) return;
  dropFrom(turns.at(-1));
  text.focus();
  getAnswer();
}

function startEditing() {
  const turn = turns.findLast(({ role }) => role === "user");
  if (!turn || running || editing) return;
  editing = { turn, before: draft() };
  write({ words: turn.text, media: turn.media });
  update();
}

function endEditing() {
  const { before } = editing;
  editing = null;
  write(before);
  update();
}

/** @param {Turn[]} others to go on with */
function replaceTurns(others) {
  running?.abort();
  running = null;
  if (editing) endEditing();
  turns = others;
  thread.replaceChildren(...turns.map(({ node }) => node));
  text.focus();
  update();
}

function startAnew() {
  const old = turns;
  replaceTurns([]);
  notify("The conversation is cleared.", "Undo", () => {
    notify("");
    replaceTurns(old);
  });
}

// --- what the page shows ---

function update() {
  $("welcome").hidden = turns.length > 0;
  $("new").disabled = !turns.length;
  $("editing").hidden = !editing;
  showRunning(running !== null);
}

/** Whether the end of the conversation stays in view as it grows, until the user scrolls up. */
let following = true;

function follow() {
  following = true;
  scroller.scrollTop = scroller.scrollHeight;
}

function seeWhere() {
  following = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 40;
  $("latest").hidden = following;
}

/** Copies and says so on the button. @param {HTMLElement} button @param {string} words */
async function copy(button, words) {
  if (navigator.clipboard) await navigator.clipboard.writeText(words);
  else {
    // A page from plain HTTP has no clipboard.
    const area = Object.assign(document.createElement("textarea"), { value: words });
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
    button.focus();
  }
  const label = button.querySelector("span");
  label.textContent = "Copied";
  setTimeout(() => (label.textContent = "Copy"), 1500);
}

// --- events ---

$("composer").addEventListener("submit", (/** @type {Event} */ event) => {
  event.preventDefault();
  send();
});
text.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
  const composing = event.isComposing || event.keyCode === 229; // the latter is Safari's way to say it
  if (event.key === "Enter" && !event.shiftKey && !composing) {
    event.preventDefault();
    send();
  } else if (event.key === "ArrowUp" && !text.value) {
    event.preventDefault();
    startEditing();
  }
});
$("stop").onclick = () => {
  running?.abort();
  text.focus();
};
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
  if (running) running.abort();
  else if (!discardRecording() && editing) endEditing();
});
$("new").onclick = startAnew;
$("cancel-editing").onclick = endEditing;
$("latest").onclick = follow;
$("open-settings").onclick = () => openSettings();
onClosed(connect);
thread.onclick = (/** @type {MouseEvent} */ event) => {
  const button = /** @type {Element} */ (event.target).closest("button");
  if (!button) return;
  if (button.matches(".edit")) startEditing();
  else if (button.matches(".again")) regenerate();
  else if (button.matches(".copy")) copy(button, turns.find(({ node }) => node.contains(button)).text);
  else copy(button, button.closest("figure").querySelector("code").textContent);
};
addEventListener("beforeunload", (event) => {
  const { words, media } = draft();
  if (turns.length || words || media.length) event.preventDefault();
});

scroller.onscroll = seeWhere;
const growth = new ResizeObserver(() => (following ? follow() : seeWhere()));
growth.observe(thread);
growth.observe(scroller);
// Safari's keyboard covers the page instead of making it smaller.
visualViewport?.addEventListener("resize", () => {
  document.documentElement.style.setProperty("--height", `${visualViewport.height * visualViewport.scale}px`);
});
connect();
