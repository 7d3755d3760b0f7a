/** The turns of a conversation as the page shows them. */

import { render } from "./markdown.js";
import { clock } from "./media.js";

/**
 * @typedef {import("./media.js").Medium} Medium
 * @typedef {{role: "user" | "assistant", text: string, media: Medium[], node: HTMLElement}} Turn
 */

/** A copy of a template's element. @param {string} id @returns {HTMLElement} */
function fromTemplate(id) {
  const template = /** @type {HTMLTemplateElement} */ (document.getElementById(id));
  return /** @type {HTMLElement} */ (template.content.firstElementChild.cloneNode(true));
}

/**
 * A list's entry for a picture or a recording.
 *
 * @param {Medium} medium
 * @param {() => void} [remove] is offered to the user
 */
export function mediumItem({ kind, name, data, seconds }, remove) {
  const item = fromTemplate("medium");
  item.className = kind;
  if (kind === "image") item.prepend(Object.assign(new Image(), { src: data, alt: name, draggable: false }));
  else {
    item.querySelector(".name").textContent = `${name}, ${clock(seconds)}`;
    item.append(Object.assign(document.createElement("audio"), { src: data, controls: true, ariaLabel: name }));
  }
  const button = /** @type {HTMLButtonElement} */ (item.querySelector(".remove"));
  if (remove) {
    button.ariaLabel = `Remove ${name}`;
    button.onclick = remove;
  } else button.remove();
  return item;
}

/** @param {string} text @param {Medium[]} media @returns {Turn} */
export function question(text, media) {
  const node = fromTemplate("question");
  node.querySelector(".media").append(...media.map((medium) => mediumItem(medium)));
  node.querySelector(".text").textContent = text;
  return { role: "user", text, media, node };
}

/** An answer that has not begun. @returns {Turn} */
export const answer = () => ({ role: "assistant", text: "", media: [], node: fromTemplate("answer") });

/**
 * Shows what an answer's text is by now.
 *
 * @param {Turn} turn
 * @returns {string[]} what its blocks say; none but the last will change when text is added
 */
export function showText({ node, text }) {
  const place = node.querySelector(".text");
  render(place, text);
  return [...place.children].map((block) => block.textContent);
}

/**
 * Shows that an answer has ended.
 *
 * @param {Turn} turn
 * @param {{figures?: string, problem?: string}} end its counts and speed, or what went wrong
 */
export function showEnd({ node }, { figures = "", problem = "" }) {
  node.ariaBusy = "false";
  node.querySelector(".figures").textContent = figures;
  const place = /** @type {HTMLElement} */ (node.querySelector(".problem"));
  place.textContent = problem;
  place.hidden = !problem;
  if (problem) node.querySelector(".again span").textContent = "Try again";
}
