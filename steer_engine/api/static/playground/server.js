// Requests to this server: JSON, lists of several pages, streams; and what an error means in plain words.

import { seriesKey } from "./probe_spec.js";

export class ServerError extends Error {
  /** kind: "key-missing", "key-wrong", "gone", "busy" or "refused". param: path of the field that is wrong, or "". */
  constructor(kind, message, param = "") {
    super(message);
    Object.assign(this, { kind, param });
  }
}

/** What an error response means. body: its JSON, or {}. retryAfter: seconds, or null. */
export function explain(status, body, { hasKey = false, retryAfter = null } = {}) {
  const said = body?.error?.message ?? "";
  const param = body?.error?.param ?? "";
  if (status === 401 && hasKey) {
    return new ServerError("key-wrong", "The server refused this API key. Check the key at the top of the page.");
  }
  if (status === 401) {
    return new ServerError("key-missing", "This server needs an API key. Enter it at the top; nothing you typed is lost.");
  }
  if (status === 502 || status === 504) {
    return new ServerError("gone", `A proxy answered, but the server behind it did not (status ${status}).`);
  }
  if (status === 503 || status === 429) {
    const wait = retryAfter ? ` Try again in ${retryAfter} s.` : " Try again in a moment.";
    return new ServerError("busy", `${said || "The server has no room for this request now."}${wait}`);
  }
  return new ServerError("refused", said || `The server answered with status ${status} and no explanation.`, param);
}

/** Complete events of a stream's text: [JSON of each, the rest that is not complete]. "[DONE]" is null. */
export function eventsOf(text) {
  const parts = text.replaceAll("\r\n", "\n").split("\n\n");
  const rest = parts.pop();
  const events = [];
  for (const part of parts) {
    const data = part.split("\n").filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trimStart());
    if (!data.length) continue;
    events.push(data[0] === "[DONE]" ? null : JSON.parse(data.join("\n")));
  }
  return [events, rest];
}

/**
 * What a chunk adds to an answer: { text, thinking, numbers, summaries, promptNumbers, finish, stopReason, report }.
 * numbers, promptNumbers: series (a probe at a block) -> list, of the answer's tokens and of the prompt's, or null.
 * summaries: series -> { mean, max, tokens }.
 */
export function partOf(chunk) {
  const choice = chunk.choices?.[0];
  const told = seriesIn(choice?.steering?.probes);
  const numbers = told.filter(([, value]) => Array.isArray(value));
  return {
    text: choice?.delta?.content ?? choice?.text ?? "",
    thinking: choice?.delta?.reasoning ?? choice?.delta?.reasoning_content ?? "",
    numbers: numbers.length ? Object.fromEntries(numbers) : null,
    summaries: Object.fromEntries(told.filter(([, value]) => !Array.isArray(value))),
    promptNumbers: choice?.steering?.prompt_probes ? Object.fromEntries(seriesIn(choice.steering.prompt_probes)) : null,
    finish: choice?.finish_reason ?? null, stopReason: choice?.stop_reason ?? null, report: chunk.steering ?? null,
  };
}

/** [series, its value] of { probe: { block: value } }. */
const seriesIn = (probes) =>
  Object.entries(probes ?? {}).flatMap(([name, blocks]) => Object.entries(blocks).map(([block, value]) => [seriesKey(name, block), value]));

/** keyOf: returns the key that is entered now, or "". */
export class Client {
  constructor(keyOf) {
    this.keyOf = keyOf;
  }

  headers() {
    const key = this.keyOf();
    return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  }

  /** The JSON at a path. Raises ServerError. */
  async get(path) {
    const answer = await this.#fetch(path, { headers: this.headers() });
    return answer.json();
  }

  /** All entries of a list, page by page. Raises ServerError. */
  async list(path) {
    const entries = [];
    for (;;) {
      const after = entries.length ? `&after=${encodeURIComponent(entries.at(-1).name)}` : "";
      const page = await this.get(`${path}?limit=1000${after}`);
      entries.push(...page.data);
      if (!page.has_more || !page.data.length) return entries;
    }
  }

  /**
   * Send a request and call onPart for what each chunk adds. Raises ServerError; an aborted request raises AbortError.
   * A stream that ends without its last event was cut off: that is an error as well.
   */
  async stream(path, body, { signal, onPart }) {
    const options = { method: "POST", headers: this.headers(), signal, body: JSON.stringify({ ...body, stream: true }) };
    const answer = await this.#fetch(path, options);
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { done, value } = await this.#read(reader, signal);
      if (done) throw new ServerError("gone", "The connection ended in the middle of the answer.");
      const [events, incomplete] = eventsOf(rest + value);
      rest = incomplete;
      for (const event of events) {
        if (event === null) return;
        if (event.error) throw explain(Number(event.error.code) || 500, event);
        onPart(partOf(event));
      }
    }
  }

  async #fetch(path, options) {
    let answer = null;
    try {
      answer = await fetch(path, options);
    } catch (error) {
      throw this.#unreachable(error, options.signal);
    }
    if (answer.ok) return answer;
    const body = await answer.json().catch(() => ({}));
    const retryAfter = answer.headers.get("Retry-After");
    throw explain(answer.status, body, { hasKey: this.keyOf() !== "", retryAfter });
  }

  async #read(reader, signal) {
    try {
      return await reader.read();
    } catch (error) {
      if (signal?.aborted) throw error;
      throw new ServerError("gone", "The server went away in the middle of the answer.");
    }
  }

  #unreachable(error, signal) {
    if (signal?.aborted) return error;
    return new ServerError("gone", `The server at ${location.host} cannot be reached. Is it still running?`);
  }
}
