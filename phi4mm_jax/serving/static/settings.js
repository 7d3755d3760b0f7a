/** The drawer of settings. They last as long as the browser's tab. */

const STORE = "phi4mm-settings";
const SAMPLING = ["temperature", "top_p", "top_k", "max_tokens", "seed"];

const drawer = /** @type {HTMLDialogElement} */ (document.getElementById("settings"));
const form = drawer.querySelector("form");
/** @type {any} */
const fields = form.elements;

export const apiKey = () => fields.key.value;
export const model = () => fields.model.value;
export const systemPrompt = () => fields.system.value.trim();

/** The settings of sampling that are given. @returns {Record<string, number>} */
export function sampling() {
  const given = SAMPLING.filter((name) => fields[name].value);
  return Object.fromEntries(given.map((name) => [name, fields[name].valueAsNumber]));
}

/** @param {string[]} names */
export function offerModels(names) {
  const chosen = model();
  fields.model.replaceChildren(...names.map((name) => new Option(name, name, false, name === chosen)));
}

/** @param {string} [field] that is to be filled in */
export function openSettings(field) {
  if (!drawer.open) drawer.showModal();
  if (field) fields[field].focus();
}

/** @param {() => void} act */
export const onClosed = (act) => drawer.addEventListener("close", act);

for (const [name, value] of Object.entries(JSON.parse(sessionStorage.getItem(STORE) ?? "{}"))) fields[name].value = value;
form.addEventListener("input", () => {
  sessionStorage.setItem(STORE, JSON.stringify(Object.fromEntries(new FormData(form))));
});
drawer.addEventListener("click", (event) => {
  if (event.target === drawer) drawer.close(); // the click was beside it
});
