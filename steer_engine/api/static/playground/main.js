// The page: connects, sends the requests of a run, and keeps its history. The API key stays in its field: it is in no
// link, no copied code and no storage.

import { Catalog } from "./catalog.js";
import { Columns } from "./columns.js";
import { $, firstInvalid, pointOut } from "./dom.js";
import { thresholdOf } from "./dose.js";
import { Form } from "./form.js";
import { SCALED } from "./operations.js";
import { factsOf } from "./probe_spec.js";
import { DEFAULTS, bodyOf, decodeLink, factorsOf, pathOf } from "./request.js";
import { Copying, History, restoreTab } from "./runs.js";
import { Client } from "./server.js";
import { scaled } from "./spec.js";
import { addPart, newTurn, textOf } from "./turns.js";

const keyOf = () => $("key").value.trim();
const client = new Client(keyOf);
const catalog = new Catalog(client);
const form = new Form(catalog, changed);
const columns = new Columns();
const history = new History(openRun);
let run = null; // { at, draft, columns, probes, facts } on the page
let running = null; // its AbortController while answers are written
let connecting = "";

/** After every change: show what fits it, and keep it for this tab. */
function changed() {
  show();
  history.keepTyped(form.typed());
}

function show() {
  const isChat = $("mode").value === "chat";
  $("system-label").hidden = !isChat;
  $("edit-part").hidden = $("preset").value !== "";
  const { temperature, tokens, repetition, seed } = form.settings;
  const parts = [`${tokens} tokens`, `temperature ${temperature}`];
  if (Number(repetition) !== 1) parts.push(`repetition penalty ${repetition}`);
  if (seed) parts.push(`seed ${seed}`);
  $("sampling-about").textContent = parts.join(" · ");
  $("stop").disabled = !running;
  $("continue").disabled = Boolean(running) || !run || !isChat || run.draft.settings.mode !== "chat" || !canContinue();
}

const canContinue = () => run.columns.every((column) => column.turns.length && textOf(column.turns.at(-1)));

// ---- The server ----------------------------------------------------------------------------------------------------

/** Ask the server what it has. False if that failed: the page says why. */
async function connect() {
  const attempt = `${keyOf()}\n${Date.now()}`;
  connecting = attempt;
  $("about").textContent = "Connecting…";
  try {
    await catalog.connect();
    if (connecting !== attempt) return false;
    $("about").textContent = catalog.describe();
    showError("");
    await form.refresh();
    show();
    columns.drawSoon(); // thresholds of probes are known now
    catalog.lookAround();
    return true;
  } catch (error) {
    if (connecting !== attempt) return false;
    $("about").textContent = "Not connected";
    fail(error);
    return false;
  }
}

// ---- A run ---------------------------------------------------------------------------------------------------------

/** Answers with the steering at each factor. Earlier answers stay in the history. */
async function compare(factors) {
  let prepared = null;
  if (!(await isReady())) return;
  try {
    prepared = prepare();
    const { steering: spec } = prepared;
    if (!spec) throw new Error("Choose a vector or a preset first. Without steering, both answers are the same.");
    const wanted = spec.edits || spec.preset ? factors() : [0];
    run = {
      at: Date.now(), draft: prepared, probes: probesOf(spec), facts: {},
      columns: wanted.map((factor) => ({ factor, label: labelOf(spec, factor), turns: [] })),
    };
  } catch (error) {
    fail(error);
    return;
  }
  columns.show(run.columns, factsIn(run));
  await answer(prepared);
}

/** The prompt as the next message of every answer's conversation. */
async function nextTurn() {
  if (!(await isReady())) return;
  try {
    const prepared = prepare();
    const sent = $("prompt").value;
    Object.assign(run, { draft: prepared, probes: probesOf(prepared.steering), facts: {} });
    await answer(prepared);
    const last = run.columns.map((column) => column.turns.at(-1));
    if ($("prompt").value === sent && last.every((turn) => turn.state === "done")) $("prompt").value = "";
  } catch (error) {
    fail(error);
  }
}

/** Connected, and every chosen vector has its strength. A click may come before that. */
async function isReady() {
  if (!catalog.connected && !(await connect())) return false;
  await form.ready();
  return true;
}

/** The probes of a request, with those of its preset. */
const probesOf = (spec) => [...(spec?.probes ?? []), ...(catalog.presets[spec?.preset]?.probes ?? [])];

/** What the numbers of a run's series mean. It is kept with the run, once the vector of the probe is known. */
const factsIn = (of) => (key) => {
  if (of.facts[key]) return of.facts[key];
  let isKnown = true;
  const found = factsOf(key, of.probes, (name, block, measure) => {
    isKnown = catalog.known.has(name);
    return thresholdOf(catalog.known.get(name), block, measure);
  });
  if (isKnown) of.facts[key] = found;
  return found;
};

/** The draft that is sent. Raises an error that says which control is wrong. */
function prepare() {
  const wrong = firstInvalid($("sampling"));
  if (wrong) throw Object.assign(new Error(`${wrong.labels[0].firstChild.textContent.trim()}: ${wrong.validationMessage}`), { control: wrong });
  if (!$("prompt").value.trim()) throw Object.assign(new Error("Enter a prompt."), { control: $("prompt") });
  return form.draft();
}

async function answer(now) {
  running?.abort();
  const mine = (running = new AbortController());
  const current = run;
  showError("");
  const hasNumbers = run.probes.some((probe) => (probe.return ?? "tokens") === "tokens");
  if (hasNumbers) $("view").value = "tokens";
  else if ($("view").value === "tokens") $("view").value = "markdown";
  $("status").textContent = `Writing ${current.columns.length} answers…`;
  show();
  const results = current.columns.map((column) => ask(column, now, mine.signal));
  columns.draw();
  bringIntoView(current);
  history.add(current);
  const errors = (await Promise.all(results)).filter(Boolean);
  columns.draw();
  history.add(current);
  if (running !== mine) return;
  running = null;
  const complete = current.columns.filter((column) => column.turns.at(-1).state === "done").length;
  $("status").textContent = `${complete} of ${current.columns.length} answers are complete.`;
  if (errors.length) fail(errors[0]);
  show();
}

/** One answer into a new turn of a column. Returns the error that ended it, or null. */
async function ask(column, now, signal) {
  const spec = now.steering;
  const earlier = column.turns.map((turn) => ({ prompt: turn.prompt, answer: textOf(turn) }));
  const label = labelOf(spec, column.factor); // the steering may have changed since the first answer of the conversation
  const turn = newTurn(now.settings.prompt, label === column.label ? "" : label);
  column.turns.push(turn);
  const onPart = (part) => { addPart(turn, part); columns.drawSoon(); };
  try {
    const body = bodyOf(now.settings, catalog.model, earlier);
    body.steering = scaled(spec, column.factor, catalog.presets);
    await client.stream(pathOf(now.settings), body, { signal, onPart });
    turn.state = "done";
    return null;
  } catch (error) {
    turn.state = turn.segments.length ? "half" : "failed";
    const reason = signal.aborted ? "Stopped." : error.message;
    turn.note = turn.segments.length ? `Incomplete: ${reason}` : `No answer: ${reason}`;
    return signal.aborted ? null : error;
  }
}

function bringIntoView(current) {
  const turns = current.columns.length && document.querySelector("#columns .turn:last-child");
  const isNarrow = matchMedia("(max-width: 64rem)").matches;
  if (turns && current.columns[0].turns.length > 1) turns.scrollIntoView({ block: "nearest" });
  else if (isNarrow) $("results").scrollIntoView({ block: "start" });
}

/** The heading of a column, with the strength if one edit has it. */
function labelOf(spec, factor) {
  if (factor === 0 || !(spec?.edits?.length || spec?.preset)) return "Plain";
  const [only, ...others] = spec.edits ?? [];
  const strength = only && !others.length && SCALED.includes(only.op ?? "add") ? scaled(spec, factor).edits[0].scale : null;
  const word = spec.preset ? `Preset ${spec.preset}` : "Steered";
  const name = factor === 1 ? word : factor === -1 ? "Opposite" : `${word} × ${factor}`;
  return `${name}${strength === null ? "" : `, strength ${strength}`}`.replaceAll("-", "−");
}

function openRun(chosen) {
  running?.abort();
  run = chosen;
  form.fill(chosen.draft);
  show();
  $("view").value = chosen.probes.length ? "tokens" : "markdown";
  columns.show(chosen.columns, factsIn(chosen));
  $("status").textContent = `Answers of ${new Date(chosen.at).toLocaleTimeString()}.`;
  showError("");
  $("results").scrollIntoView({ block: "start" });
}

// ---- Errors --------------------------------------------------------------------------------------------------------

function showError(text) {
  $("error").textContent = text;
  $("error").hidden = !text;
}

/** Say what happened, and move to the control that can mend it. */
function fail(error) {
  showError(error.message);
  if (error.kind === "gone") $("about").textContent = "The server cannot be reached";
  const control = error.control ?? controlOf(error);
  if (control) pointOut(control);
}

function controlOf(error) {
  if (error.kind === "key-missing" || error.kind === "key-wrong") return $("key");
  return error.field in DEFAULTS ? $(error.field) : form.controlOf(error.param);
}

// ---- Start ---------------------------------------------------------------------------------------------------------

const toCompare = () => compare(() => [0, 1]);
new Copying({
  draft: () => form.draft(), hasKey: () => keyOf() !== "", fail,
  columns: () => run?.columns ?? null,
  request() {
    const { settings: values, steering: spec } = form.draft();
    const body = bodyOf(values, catalog.model);
    return { settings: values, body: spec ? { ...body, steering: spec } : body };
  },
});
$("composer").addEventListener("submit", (event) => { event.preventDefault(); toCompare(); });
$("three").addEventListener("click", () => compare(() => [-1, 0, 1]));
$("run-sweep").addEventListener("click", () => compare(() => [0, ...factorsOf($("sweep").value).filter((factor) => factor !== 0)]));
$("continue").addEventListener("click", nextTurn);
$("stop").addEventListener("click", () => running?.abort());
$("add").addEventListener("click", async () => { (await form.edits.add()).control("vector").focus(); changed(); });
$("view").addEventListener("change", () => columns.draw());
$("access").addEventListener("submit", (event) => { event.preventDefault(); connect(); });
for (const id of ["composer", "settings"]) $(id).addEventListener("input", changed);
document.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
  event.preventDefault();
  toCompare();
});

const linked = decodeLink(location.hash);
const before = linked ? null : restoreTab().typed;
if (before) form.fillTyped(before);
else form.fill(linked ?? { settings: DEFAULTS, steering: null });
if (linked?.columns) {
  for (const turn of linked.columns.flatMap((column) => column.turns)) turn.state = turn.note ? "half" : "done";
  run = { at: Date.now(), draft: linked, columns: linked.columns, probes: probesOf(linked.steering), facts: {} };
  if (run.probes.length) $("view").value = "tokens";
  columns.show(run.columns, factsIn(run));
  $("status").textContent = "These answers came with the link; they were not made here.";
}
show();
connect();
