// The page: connects, sends the requests of a run, and keeps what is typed. The API key stays in its field: it is in no
// link, no copied code and no storage.

import { Catalog } from "./catalog.js";
import { Columns, addPart, newTurn, textOf } from "./columns.js";
import { $, firstInvalid, pointOut, setChoices } from "./dom.js";
import { Edits } from "./edits.js";
import { ProbeForm } from "./probe_form.js";
import { DEFAULTS, PROBE, bodyOf, decodeLink, factorsOf, pathOf, withProbe } from "./request.js";
import { Copying, History, restoreTab } from "./runs.js";
import { Client } from "./server.js";
import { SCALED, scaled } from "./spec.js";

const keyOf = () => $("key").value.trim();
const client = new Client(keyOf);
const catalog = new Catalog(client);
const edits = new Edits(catalog, changed);
const probe = new ProbeForm(catalog, changed);
const columns = new Columns();
const history = new History(openRun);
let run = null; // { at, draft, columns, probe } on the page
let running = null; // its AbortController while answers are written
let wantsFirstEdit = true;
let connecting = "";

// ---- What is typed -------------------------------------------------------------------------------------------------

const settings = () => Object.fromEntries(Object.keys(DEFAULTS).map((name) => [name, $(name).value]));

/** The steering of the form, without the probe's; false for none. Raises FieldError. */
function steering() {
  const extra = extraFields();
  if ($("preset").value) return { preset: $("preset").value, ...extra };
  const all = edits.edits();
  if (!all.length) return Object.keys(extra).length ? extra : false;
  return { edits: all, ...($("preserve_norm").checked ? { preserve_norm: true } : {}), ...extra };
}

function extraFields() {
  if (!$("extra").value.trim()) return {};
  try {
    const fields = JSON.parse($("extra").value);
    if (typeof fields === "object" && fields !== null && !Array.isArray(fields)) return fields;
  } catch { /* reported below */ }
  throw Object.assign(new Error(`"More fields" must be a JSON object, not ${$("extra").value}`), { control: $("extra") });
}

const draft = () => ({ settings: settings(), steering: steering(), probe: probe.read() });

/** Show a draft: of a link, of this tab before it was loaded again, or of an earlier run. */
function fill({ settings: values, steering: spec, probe: asked }) {
  for (const [name, value] of Object.entries({ ...DEFAULTS, ...values })) $(name).value = value;
  const { edits: all = [], preset = "", preserve_norm: keepsNorm = false, ...extra } = spec || {};
  if (preset) setChoices($("preset"), presetChoices([preset]));
  $("preset").value = preset;
  $("preserve_norm").checked = keepsNorm === true;
  $("extra").value = Object.keys(extra).length ? JSON.stringify(extra) : "";
  $("more-part").open = $("extra").value !== "";
  wantsFirstEdit = !spec;
  const filled = Promise.all([edits.fill(all), probe.fill(asked)]);
  show();
  return filled;
}

/** After every change: show what fits it, and keep it for this tab. */
function changed() {
  show();
  try {
    history.keepDraft(draft());
  } catch {
    // A field is not finished. What was typed elsewhere is kept with the last complete edits.
    history.keepDraft({ ...history.draft, settings: settings() });
  }
}

function show() {
  const isChat = $("mode").value === "chat";
  $("system-label").hidden = !isChat;
  $("edit-part").hidden = $("preset").value !== "";
  const { temperature, tokens, repetition, seed } = settings();
  const parts = [`${tokens} tokens`, `temperature ${temperature}`];
  if (Number(repetition) !== 1) parts.push(`repetition penalty ${repetition}`);
  if (seed) parts.push(`seed ${seed}`);
  $("sampling-about").textContent = parts.join(" · ");
  $("stop").disabled = !running;
  $("continue").disabled = Boolean(running) || !run || !isChat || run.draft.settings.mode !== "chat" || !canContinue();
}

const canContinue = () => run.columns.every((column) => column.turns.length && textOf(column.turns.at(-1)));

// ---- The server ----------------------------------------------------------------------------------------------------

const presetChoices = (names) => [["", "none: the edits below"], ...names.map((name) => [name, name])];

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
    setChoices($("preset"), presetChoices(Object.keys(catalog.presets)));
    $("empty").hidden = catalog.names.length > 0;
    edits.refresh();
    await probe.refresh();
    if (wantsFirstEdit && !edits.cards.length && catalog.names.length) await edits.add();
    wantsFirstEdit = false;
    show();
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
    const { spec, asked } = prepared;
    if (!spec && !asked) throw new Error("Choose a vector or a preset first. Without steering, both answers are the same.");
    const wanted = spec ? factors() : [0];
    run = {
      at: Date.now(), draft: prepared.draft, probe: asked ? probe.facts() : { threshold: null, measure: "cosine", title: "" },
      columns: wanted.map((factor) => ({ factor, label: labelOf(spec, factor), turns: [] })),
    };
  } catch (error) {
    fail(error);
    return;
  }
  columns.show(run.columns, run.probe);
  await answer(prepared);
}

/** The prompt as the next message of every answer's conversation. */
async function nextTurn() {
  if (!(await isReady())) return;
  try {
    const prepared = prepare();
    const sent = $("prompt").value;
    if (prepared.asked) Object.assign(run.probe, probe.facts());
    run.draft = prepared.draft;
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
  await Promise.all([edits.ready(), probe.ready]);
  return true;
}

/** { draft, spec, asked }: what is sent. Raises an error that says which control is wrong. */
function prepare() {
  const wrong = firstInvalid($("sampling"));
  if (wrong) throw Object.assign(new Error(`${wrong.labels[0].firstChild.textContent.trim()}: ${wrong.validationMessage}`), { control: wrong });
  if (!$("prompt").value.trim()) throw Object.assign(new Error("Enter a prompt."), { control: $("prompt") });
  const now = draft();
  return { draft: now, spec: now.steering, asked: now.probe };
}

async function answer({ draft: now, spec, asked }) {
  running?.abort();
  const mine = (running = new AbortController());
  const current = run;
  showError("");
  if (asked) $("view").value = "tokens";
  else if ($("view").value === "tokens") $("view").value = "markdown";
  $("status").textContent = `Writing ${current.columns.length} answers…`;
  show();
  const results = current.columns.map((column) => ask(column, now, withProbe(spec, asked), mine.signal));
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
async function ask(column, now, spec, signal) {
  const earlier = column.turns.map((turn) => ({ prompt: turn.prompt, answer: textOf(turn) }));
  const label = labelOf(spec, column.factor); // the steering may have changed since the first answer of the conversation
  const turn = newTurn(now.settings.prompt, label === column.label ? "" : label);
  column.turns.push(turn);
  const onPart = (part) => { addPart(turn, part); columns.drawSoon(); };
  try {
    const body = bodyOf(now.settings, catalog.model, earlier);
    body.steering = scaled(spec, column.factor, catalog.presets);
    await client.stream(pathOf(now.settings), body, { signal, probe: PROBE, onPart });
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
  fill(chosen.draft);
  $("view").value = chosen.probe.title ? "tokens" : "markdown";
  columns.show(chosen.columns, chosen.probe);
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
  if (error.field?.startsWith("probe_")) return probe.control(error.field.slice(6));
  if (error.field in DEFAULTS) return $(error.field);
  const [, at, field] = /^steering\.edits\[(\d+)\]\.(\w+)/.exec(error.param ?? "") ?? [];
  if (at !== undefined && !$("preset").value) return edits.cards[at]?.control(field) ?? null;
  if (error.param?.startsWith("steering.stop")) return probe.control("bound");
  const [, probeField] = /^steering\.probes\[\d+\]\.(\w+)/.exec(error.param ?? "") ?? [];
  return probeField ? probe.control({ blocks: "block" }[probeField] ?? probeField) : null;
}

// ---- Start ---------------------------------------------------------------------------------------------------------

const toCompare = () => compare(() => [0, 1]);
new Copying({
  draft, hasKey: () => keyOf() !== "", fail,
  columns: () => run?.columns ?? null,
  request() {
    const now = draft();
    const body = bodyOf(now.settings, catalog.model);
    const spec = withProbe(now.steering, now.probe);
    return { settings: now.settings, body: spec ? { ...body, steering: spec } : body };
  },
});
$("composer").addEventListener("submit", (event) => { event.preventDefault(); toCompare(); });
$("three").addEventListener("click", () => compare(() => [-1, 0, 1]));
$("run-sweep").addEventListener("click", () => compare(() => [0, ...factorsOf($("sweep").value).filter((factor) => factor !== 0)]));
$("continue").addEventListener("click", nextTurn);
$("stop").addEventListener("click", () => running?.abort());
$("add").addEventListener("click", async () => { (await edits.add()).control("vector").focus(); changed(); });
$("view").addEventListener("change", () => columns.draw());
$("access").addEventListener("submit", (event) => { event.preventDefault(); connect(); });
for (const id of ["composer", "settings"]) $(id).addEventListener("input", changed);
document.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
  event.preventDefault();
  toCompare();
});

const linked = decodeLink(location.hash);
fill(linked ?? restoreTab().draft ?? { settings: DEFAULTS, steering: null, probe: null });
if (linked?.columns) {
  const facts = { threshold: null, measure: linked.probe?.measure ?? "cosine", title: linked.probe ? `${linked.probe.vector}, block ${linked.probe.block}` : "" };
  for (const turn of linked.columns.flatMap((column) => column.turns)) turn.state = turn.note ? "half" : "done";
  run = { at: Date.now(), draft: linked, columns: linked.columns, probe: facts };
  if (linked.probe) $("view").value = "tokens";
  columns.show(run.columns, run.probe);
  $("status").textContent = "These answers came with the link; they were not made here.";
  show();
}
connect();
