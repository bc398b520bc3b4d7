"use strict";
// One page, no build step. The API key stays in its input field: it is never put in the link, the copied code or storage.

const $ = (id) => document.getElementById(id);
const state = { model: "", vectors: [], presets: [], scopes: [], maxScale: 100, blocks: 0 };
let running = null;

const headers = () => {
  const key = $("key").value.trim();
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
};

async function get(path) {
  const answer = await fetch(path, { headers: headers() });
  const body = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Error(messageOf(body, answer.status));
  return body;
}

const messageOf = (body, status) =>
  body.error?.message ?? (status === 401 ? "This server requires an API key." : `The server responded with status ${status}.`);

function showError(text) {
  $("error").textContent = text;
  $("error").hidden = !text;
}

async function connect() {
  try {
    const facts = await get("v1/steering");
    const [vectors, presets] = await Promise.all([
      get("v1/steering/vectors?limit=1000"), get("v1/steering/presets?limit=1000"),
    ]);
    state.model = facts.model;
    state.blocks = facts.num_blocks;
    state.maxScale = facts.limits.max_abs_scale;
    state.scopes = facts.scopes.filter((scope) => typeof scope === "string");
    state.vectors = vectors.data.map((each) => each.name);
    state.presets = presets.data.map((each) => each.name);
    $("about").textContent =
      `${facts.model}: ${facts.num_blocks} blocks, ${state.vectors.length} vectors, ${state.presets.length} presets`;
    $("preset").replaceChildren(
      new Option("none (use the edits below)", ""), ...state.presets.map((name) => new Option(name, name)));
    showError("");
    restore();
  } catch (error) {
    $("about").textContent = "Not connected";
    showError(error.message);
  }
}

function addEdit(edit = {}) {
  const row = $("edit").content.cloneNode(true).firstElementChild;
  const part = (name) => row.querySelector(`.${name}`);
  part("vector").replaceChildren(...state.vectors.map((name) => new Option(name, name)));
  if (edit.vector) part("vector").value = edit.vector;
  const limit = Math.min(state.maxScale, 20);
  Object.assign(part("slider"), { min: -limit, max: limit, step: limit / 200 });
  Object.assign(part("scale"), { min: -state.maxScale, max: state.maxScale });
  part("scale").value = part("slider").value = edit.scale ?? 1;
  part("slider").addEventListener("input", () => { part("scale").value = part("slider").value; });
  part("scale").addEventListener("input", () => { part("slider").value = part("scale").value; });
  part("blocks").placeholder = `all, or 0-${Math.max(0, state.blocks - 1)}`;
  part("blocks").value = edit.blocks ?? "";
  part("scope").replaceChildren(...state.scopes.map((word) => new Option(word, word)));
  const { vector, scale, blocks, ...more } = edit;
  if (state.scopes.includes(more.scope)) {
    part("scope").value = more.scope;
    delete more.scope;
  }
  if (Object.keys(more).length) part("more").value = JSON.stringify(more);
  part("remove").addEventListener("click", () => { row.remove(); changed(); });
  $("edits").append(row);
}

function steering() {
  if ($("preset").value) return { preset: $("preset").value };
  const edits = [...document.querySelectorAll(".edit")].map((row) => {
    const value = (name) => row.querySelector(`.${name}`).value;
    const blocks = value("blocks").trim(), more = value("more").trim();
    return {
      vector: value("vector"), scale: Number(value("scale")), ...(blocks ? { blocks } : {}), scope: value("scope"),
      ...(more ? moreFields(more) : {}),
    };
  });
  return edits.length ? { edits } : false;
}

function moreFields(text) {
  let fields = null;
  try {
    fields = JSON.parse(text);
  } catch { /* reported below */ }
  if (fields === null || typeof fields !== "object" || Array.isArray(fields)) {
    throw new Error(`"More fields" must be a JSON object, not ${text}`);
  }
  return fields;
}

const body = (spec) => ({
  model: state.model,
  messages: [{ role: "user", content: $("prompt").value }],
  max_tokens: Number($("tokens").value),
  temperature: Number($("temperature").value),
  steering: spec,
});

async function stream(target, spec, signal) {
  const answer = await fetch("v1/chat/completions", {
    method: "POST", headers: headers(), signal, body: JSON.stringify({ ...body(spec), stream: true }),
  });
  if (!answer.ok) throw new Error(messageOf(await answer.json().catch(() => ({})), answer.status));
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "", report = null;
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return report;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      if (!event.startsWith("data: ") || event === "data: [DONE]") continue;
      const chunk = JSON.parse(event.slice(6));
      if (chunk.error) throw new Error(chunk.error.message);
      target.textContent += chunk.choices[0]?.delta?.content ?? "";
      report = chunk.steering ?? report;
    }
  }
}

async function compare(event) {
  event.preventDefault();
  running?.abort();
  running = new AbortController();
  const { signal } = running;
  let spec = false;
  try {
    spec = steering();
  } catch (error) {
    return showError(error.message);
  }
  showError("");
  for (const id of ["plain", "steered", "applied"]) $(id).textContent = "";
  $("stop").disabled = false;
  const results = await Promise.allSettled([
    stream($("plain"), false, signal), stream($("steered"), spec, signal),
  ]);
  if (signal.aborted) return;
  $("stop").disabled = true;
  const failed = results.find((each) => each.status === "rejected");
  if (failed) showError(failed.reason.message);
  const report = results[1].value;
  $("applied").textContent = report ? `applied: ${report.digest}${detailsOf(report)}` : "";
}

function detailsOf(report) {
  const tokens = report.edits.map((edit) => edit.applied_tokens ?? "?").join(", ");
  const decided = (report.conditions ?? []).map((each) => `${each.value?.toFixed(3)} ${each.held ? "held" : "did not hold"}`);
  return (tokens ? `; tokens of each edit: ${tokens}` : "") + (decided.length ? `; conditions: ${decided.join(", ")}` : "");
}

function curl() {
  const json = JSON.stringify(body(steering()), null, 2).replaceAll("'", "'\\''");
  const key = $("key").value.trim() ? ` \\\n  -H "Authorization: Bearer $API_KEY"` : "";
  return `curl ${new URL("v1/chat/completions", location.href.split("#")[0])} \\\n` +
    `  -H "Content-Type: application/json"${key} \\\n  -d '${json}'`;
}

function literal(value) {
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (Array.isArray(value)) return `[${value.map(literal).join(", ")}]`;
  if (typeof value !== "object") return JSON.stringify(value);
  return `{${Object.entries(value).map(([key, each]) => `${JSON.stringify(key)}: ${literal(each)}`).join(", ")}}`;
}

function python() {
  const request = body(steering());
  return [
    "from openai import OpenAI", "",
    `client = OpenAI(base_url=${JSON.stringify(String(new URL("v1", location.href.split("#")[0])))}, api_key="...")`,
    "answer = client.chat.completions.create(",
    `    model=${JSON.stringify(request.model)},`, `    messages=[{"role": "user", "content": ${JSON.stringify($("prompt").value)}}],`,
    `    max_tokens=${request.max_tokens},`, `    temperature=${request.temperature},`,
    `    extra_body={"steering": ${literal(request.steering)}},`, ")", "print(answer.choices[0].message.content)",
  ].join("\n");
}

function link() {
  const { model, ...rest } = body(steering());
  const shared = { prompt: $("prompt").value, tokens: rest.max_tokens, temperature: rest.temperature, steering: rest.steering };
  return `${location.href.split("#")[0]}#${encodeURIComponent(JSON.stringify(shared))}`;
}

function restore() {
  let shared = {};
  try {
    shared = JSON.parse(decodeURIComponent(location.hash.slice(1)) || "{}") ?? {};
  } catch { /* ignore a damaged link */ }
  for (const [id, value] of [["prompt", shared.prompt], ["tokens", shared.tokens], ["temperature", shared.temperature]]) {
    if (typeof value === "string" || typeof value === "number") $(id).value = value;
  }
  if (typeof shared.steering?.preset === "string") $("preset").value = shared.steering.preset;
  document.querySelectorAll(".edit").forEach((row) => row.remove());
  const edits = Array.isArray(shared.steering?.edits) ? shared.steering.edits : [];
  if (edits.length) edits.filter((edit) => edit && typeof edit === "object").forEach(addEdit);
  else if (state.vectors.length && !shared.steering) addEdit();
  changed();
}

function changed() {
  try {
    $("code").textContent = state.model ? curl() : "";
  } catch (error) {
    $("code").textContent = error.message;
  }
}

async function copy(make) {
  try {
    const text = make();
    $("code").textContent = text;
    await navigator.clipboard.writeText(text);
    $("copied").textContent = "copied";
  } catch {
    $("copied").textContent = "copy failed; select the text below";
  }
}

$("comparison").addEventListener("submit", compare);
$("comparison").addEventListener("input", changed);
$("add").addEventListener("click", () => { addEdit(); changed(); });
$("stop").addEventListener("click", () => { running?.abort(); $("stop").disabled = true; });
$("key").addEventListener("change", connect);
$("copy-curl").addEventListener("click", () => copy(curl));
$("copy-python").addEventListener("click", () => copy(python));
$("copy-link").addEventListener("click", () => copy(link));
connect();
