// What is sent: the body of a request, code that sends the same, and the share link. Pure functions. The API key is in
// none of them.

import { PROBE, probeOf, probeOfBefore, seriesKey, withProbes } from "./probe_spec.js";
import { isObject, number } from "./values.js";

/** The state of an untouched page. Numbers are text, as in their controls. */
export const DEFAULTS = Object.freeze({
  mode: "chat", system: "", prompt: "How was your day?", tokens: "80", temperature: "0", top_p: "1", seed: "",
  repetition: "1.1", frequency: "0", presence: "0", sweep: "0.5, 1, 1.5, 2",
});

/** Choices of sampling: the field of the form, the field of a request, the value of a request that lacks it. */
const SAMPLING = [
  ["tokens", "max_tokens", null, true], ["temperature", "temperature", null, false], ["top_p", "top_p", 1, false],
  ["seed", "seed", null, true], ["repetition", "repetition_penalty", 1, false],
  ["frequency", "frequency_penalty", 0, false], ["presence", "presence_penalty", 0, false],
];

/** The body of a request without steering. turns: earlier ones, { prompt, answer }. Raises FieldError. */
export function bodyOf(settings, model, turns = []) {
  const body = { model };
  if (settings.mode === "text") body.prompt = settings.prompt;
  else {
    body.messages = settings.system.trim() ? [{ role: "system", content: settings.system }] : [];
    for (const turn of turns) {
      body.messages.push({ role: "user", content: turn.prompt }, { role: "assistant", content: turn.answer });
    }
    body.messages.push({ role: "user", content: settings.prompt });
  }
  for (const [field, name, absent, integer] of SAMPLING) {
    const value = number(settings[field], field, { integer });
    if (value !== undefined && value !== absent) body[name] = value;
  }
  return body;
}

export const pathOf = (settings) => (settings.mode === "text" ? "v1/completions" : "v1/chat/completions");

/** Factors of a sweep. Raises an error if they are not 1 to 8 numbers. */
export function factorsOf(written) {
  const factors = written.split(/[,\s]+/).filter(Boolean).map(Number);
  if (!factors.length || factors.length > 8 || !factors.every(Number.isFinite)) {
    throw new Error(`A sweep needs 1 to 8 numbers such as 0.5, 1, 2; not "${written}".`);
  }
  return [...new Set(factors)];
}

/** base: the address of this page's server, ending in a slash. */
export function curl(base, path, body, hasKey) {
  const json = JSON.stringify(body, null, 2).replaceAll("'", "'\\''");
  const key = hasKey ? ` \\\n  -H "Authorization: Bearer $API_KEY"` : "";
  return `curl ${base}${path} \\\n  -H "Content-Type: application/json"${key} \\\n  -d '${json}'`;
}

export function python(base, path, body) {
  const { model, messages, prompt, steering, repetition_penalty, ...rest } = body;
  const call = path.endsWith("chat/completions") ? "client.chat.completions" : "client.completions";
  const extra = { ...(repetition_penalty === undefined ? {} : { repetition_penalty }), ...(steering ? { steering } : {}) };
  const named = { model, ...(messages ? { messages } : { prompt }), ...rest };
  const lines = Object.entries(named).map(([name, value]) => `    ${name}=${literal(value)},`);
  if (Object.keys(extra).length) lines.push(`    extra_body=${literal(extra)},`);
  const text = messages ? "answer.choices[0].message.content" : "answer.choices[0].text";
  return [
    "import os", "", "from openai import OpenAI", "",
    `client = OpenAI(base_url=${JSON.stringify(`${base}v1`)}, api_key=os.environ.get("API_KEY", "none"))`,
    `answer = ${call}.create(`, ...lines, ")", `print(${text})`,
    ...(steering?.probes?.some((probe) => probe.return !== "none") ? ["print(answer.choices[0].steering)"] : []), "",
  ].join("\n");
}

export function node(base, path, body, hasKey) {
  const key = hasKey ? ", Authorization: `Bearer ${process.env.API_KEY}`" : "";
  const text = body.messages ? "body.choices[0].message.content" : "body.choices[0].text";
  return [
    "// Node 18 or newer. Save as ask.mjs.",
    `const answer = await fetch(${JSON.stringify(`${base}${path}`)}, {`,
    '  method: "POST",', `  headers: { "Content-Type": "application/json"${key} },`,
    `  body: JSON.stringify(${JSON.stringify(body, null, 2).replaceAll("\n", "\n  ")}),`, "});",
    "const body = await answer.json();", "if (!answer.ok) throw new Error(body.error.message);",
    `console.log(${text});`, "",
  ].join("\n");
}

/** A value in Python. */
export function literal(value) {
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (Array.isArray(value)) return `[${value.map(literal).join(", ")}]`;
  if (typeof value !== "object") return JSON.stringify(value);
  return `{${Object.entries(value).map(([key, each]) => `${JSON.stringify(key)}: ${literal(each)}`).join(", ")}}`;
}

/**
 * The part of a link after "#". Fields that have their default are left out. steering: as in a request, with its probes.
 * columns: the answers to carry along, or null.
 */
export function encodeLink({ settings, steering }, columns = null) {
  const shared = {};
  for (const [name, value] of Object.entries(settings)) if (value !== DEFAULTS[name] || name === "prompt") shared[name] = value;
  if (steering) shared.steering = steering;
  if (columns) {
    const segments = columns.flatMap((column) => column.turns.flatMap((turn) => turn.segments));
    shared.series = [...new Set(segments.flatMap((segment) => Object.keys(segment.numbers ?? {})))];
    shared.columns = columns.map((column) => shortened(column, shared.series));
  }
  return encodeURIComponent(JSON.stringify(shared));
}

/** Numbers with four digits, by the place of their series: they are drawn, not computed with. */
function shortened({ factor, label, turns }, series) {
  const digits = (value) => (value === null ? null : Number(value.toPrecision(4)));
  const short = ({ text, numbers, thinking }) => [
    text, numbers && series.map((key) => (numbers[key] ?? []).map(digits)), ...(thinking ? [true] : []),
  ];
  return { factor, label, turns: turns.map(({ prompt, label, segments, note }) => ({ prompt, label, note, segments: segments.map(short) })) };
}

/** { settings, steering, columns } of a link. A damaged link, or a damaged part of one, counts as absent. */
export function decodeLink(hash) {
  let shared = null;
  try {
    shared = JSON.parse(decodeURIComponent(hash.replace(/^#/, "")));
  } catch { /* not ours */ }
  if (!isObject(shared)) return null;
  const settings = { ...DEFAULTS };
  for (const name of Object.keys(DEFAULTS)) {
    const value = shared[name];
    if (typeof value === "string" || Number.isFinite(value)) settings[name] = String(value);
  }
  if (!["chat", "text"].includes(settings.mode)) settings.mode = "chat";
  let steering = isObject(shared.steering) ? shared.steering : null;
  if (steering?.edits !== undefined) {
    steering.edits = Array.isArray(steering.edits) ? steering.edits.filter(isObject) : [];
  }
  let series = Array.isArray(shared.series) ? shared.series.map(String) : [];
  // Links of before have one probe beside the steering, with fields of its own.
  if (isObject(shared.probe) && typeof shared.probe.vector === "string") {
    series = [seriesKey(PROBE, shared.probe.block)];
    try {
      steering = withProbes(steering ?? {}, [probeOf(probeOfBefore(shared.probe))]);
    } catch { /* a damaged probe counts as absent */ }
  }
  return { settings, steering, columns: columnsOf(shared.columns, series) };
}

function columnsOf(columns, series) {
  if (!Array.isArray(columns)) return null;
  const found = columns.filter((each) => isObject(each) && Number.isFinite(each.factor) && Array.isArray(each.turns));
  if (!found.length) return null;
  return found.slice(0, 9).map(({ factor, label, turns }) => ({
    factor, label: String(label), turns: turns.filter(isObject).map((turn) => ({
      prompt: String(turn.prompt ?? ""), label: String(turn.label ?? ""), note: typeof turn.note === "string" ? turn.note : "", finish: null, report: null,
      segments: (Array.isArray(turn.segments) ? turn.segments : []).filter(Array.isArray).map((segment) => segmentOf(segment, series)),
    })),
  }));
}

/** numbers: a list for each series; in links of before, the numbers of the only one. */
function segmentOf([text, numbers, thinking], series) {
  const lists = Array.isArray(numbers) && numbers.every(Array.isArray) ? numbers : [numbers];
  const isUsable = (list) => Array.isArray(list) && list.every((value) => value === null || Number.isFinite(value));
  const shown = lists.length === series.length && lists.every(isUsable);
  return {
    text: String(text ?? ""), numbers: shown ? Object.fromEntries(series.map((key, at) => [key, lists[at]])) : null, thinking: thinking === true,
  };
}
