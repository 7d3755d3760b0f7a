/** What the page says to the server: OpenAI's wire format, at addresses relative to the page. */

/**
 * @typedef {{prompt_tokens: number, completion_tokens: number}} Usage
 * @typedef {{choices: {delta: {content?: string | null}, finish_reason: string | null}[], usage?: Usage | null}} Chunk
 */

/** What the server or the way to it says is wrong. `status` is HTTP's, 0 where there was no response. */
export class ServerError extends Error {
  /** @param {string} message @param {number} [status] */
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

const UNREACHABLE = "The server cannot be reached.";
const BROKEN = "The connection ended before the answer was complete.";

/**
 * @param {string} path
 * @param {string} key API key, or ""
 * @param {RequestInit} [init]
 * @returns {Promise<Response>}
 */
async function call(path, key, init = {}) {
  const headers = { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
  const response = await fetch(path, { ...init, headers }).catch((error) => {
    if (!init.signal?.aborted) throw new ServerError(UNREACHABLE);
    throw error;
  });
  if (response.ok) return response;
  const body = await response.json().catch(() => ({}));
  throw new ServerError(body?.error?.message ?? `The server answered ${response.status}.`, response.status);
}

/** Whether the model is ready to answer. @returns {Promise<boolean>} */
export async function isReady() {
  try {
    await call("ready", "");
    return true;
  } catch (error) {
    if (error.status) return false;
    throw error;
  }
}

/** Names of the models. @param {string} key @returns {Promise<string[]>} */
export async function models(key) {
  const { data } = await (await call("v1/models", key)).json();
  return data.map((/** @type {{id: string}} */ model) => model.id);
}

/**
 * An answer, chunk by chunk.
 *
 * @param {object} request body of a chat completion
 * @param {string} key
 * @param {AbortSignal} signal ends it
 * @returns {AsyncGenerator<Chunk>}
 */
export async function* streamAnswer(request, key, signal) {
  const body = JSON.stringify({ ...request, stream: true, stream_options: { include_usage: true } });
  const response = await call("v1/chat/completions", key, { method: "POST", body, signal });
  for await (const data of events(response, signal)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ServerError(chunk.error.message, response.status);
    yield chunk;
  }
  throw new ServerError(BROKEN);
}

/** The data of server-sent events. @param {Response} response @param {AbortSignal} signal */
async function* events(response, signal) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { value, done } = await reader.read().catch((error) => {
      throw signal.aborted ? error : new ServerError(BROKEN);
    });
    if (done) return;
    const parts = (buffer + value).split(/\r?\n\r?\n/);
    buffer = parts.pop();
    for (const part of parts) {
      const lines = part.split(/\r?\n/).filter((line) => line.startsWith("data:"));
      if (lines.length) yield lines.map((line) => line.slice(5).trimStart()).join("\n");
    }
  }
}
