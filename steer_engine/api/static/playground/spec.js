// The fields of an edit's form, and the JSON of a request's `steering`. Pure functions: no page, no network.

/** The state of an untouched form. Numbers are text, as in their controls. */
export const EMPTY = Object.freeze({
  vector: "", op: "add", scale: "1", unit: "vector", lo: "", hi: "", target: "", blocks: "",
  scope: "all", start: "", end: "", after: "", until: "", each: false, tokens: "", except: "",
  schedule: "", over: "24", to: "0",
  when: "", when_vector: "", measure: "cosine", at: "last_prompt_token", above: "", below: "",
  gate_vector: "", min_cos: "", max_cos: "", more: "",
});

/** Scopes that are objects: the value of the choice, its label, and the fields that it shows. */
export const SCOPE_FORMS = [
  ["answer_tokens", "part of the answer", ["start", "end", "except"]],
  ["positions", "prompt positions", ["start", "end", "except"]],
  ["window", "around a text", ["after", "until", "each", "tokens", "except"]],
  ["all_but", "all except", ["except"]],
];

export const SCOPE_WORDS = {
  all: "every token", prompt: "the prompt", generation: "the answer's tokens", last_prompt_token: "the last prompt token",
  thinking: "the reasoning", answer: "what follows the reasoning", tool_calls: "tool calls",
};

export const OPERATIONS = {
  add: "add the vector", add_relative: "add, relative to each token", ablate: "remove the direction",
  clamp: "keep within bounds", set: "set to a value",
};

/** Operations that have a scale, and can so be made stronger, weaker or opposite. */
export const SCALED = ["add", "add_relative", "ablate"];

/** A field that is not usable. `field` is its name in the form. */
export class FieldError extends Error {
  constructor(field, message) {
    super(message);
    this.field = field;
  }
}

/** A number from a control's text. Raises FieldError if it is not one; undefined if it is empty and may be. */
export function number(text, field, { optional = true, integer = false } = {}) {
  const trimmed = String(text ?? "").trim();
  if (!trimmed) {
    if (optional) return undefined;
    throw new FieldError(field, `Enter a number for "${label(field)}".`);
  }
  const value = Number(trimmed);
  if (!Number.isFinite(value)) throw new FieldError(field, `"${label(field)}" must be a number, not ${trimmed}.`);
  if (integer && !Number.isInteger(value)) throw new FieldError(field, `"${label(field)}" must be a whole number.`);
  return value;
}

const LABELS = {
  scale: "Strength", lo: "Lowest", hi: "Highest", target: "Value", over: "Over", to: "Ends at", min_cos: "Cosine from",
  max_cos: "Cosine to", start: "From token", end: "Before token", tokens: "At most",
};
const label = (field) => LABELS[field] ?? field[0].toUpperCase() + field.slice(1).replaceAll("_", " ");

/** The edit of a request. Fields that have their default are left out. Raises FieldError. */
export function editOf(fields) {
  const given = { ...EMPTY, ...fields };
  if (!given.vector.trim()) throw new FieldError("vector", "Choose a vector for this edit.");
  const edit = { vector: given.vector.trim() };
  if (SCALED.includes(given.op)) edit.scale = number(given.scale, "scale", { optional: false });
  if (given.op !== "add") edit.op = given.op;
  if (given.op === "add" && given.unit !== "vector") edit.unit = given.unit;
  if (given.op === "clamp") {
    Object.assign(edit, defined({ lo: number(given.lo, "lo"), hi: number(given.hi, "hi") }));
    if (edit.lo === undefined && edit.hi === undefined) throw new FieldError("lo", "Enter a lowest or a highest value.");
  }
  if (given.op === "set") edit.target = number(given.target, "target", { optional: false });
  if (given.blocks.trim()) edit.blocks = blocksOf(given.blocks);
  const scope = scopeOf(given);
  if (scope !== "all") edit.scope = scope;
  if (given.schedule) {
    edit.schedule = {
      kind: given.schedule, over: number(given.over, "over", { optional: false, integer: true }),
      to: number(given.to, "to", { optional: false }),
    };
  }
  if (given.when) edit.when = conditionOf(given);
  if (given.gate_vector.trim()) {
    const bounds = defined({ min_cos: number(given.min_cos, "min_cos"), max_cos: number(given.max_cos, "max_cos") });
    if (!Object.keys(bounds).length) throw new FieldError("min_cos", "Enter a lowest or a highest cosine.");
    edit.gate = { vector: given.gate_vector.trim(), ...bounds };
  }
  return { ...edit, ...moreFields(given.more) };
}

/** The form's fields of an edit. What the form has no control for goes into `more`, so that nothing is lost. */
export function fieldsOf(edit) {
  const fields = { ...EMPTY };
  const { vector, scale, op, unit, lo, hi, target, blocks, scope, schedule, when, gate, ...more } = edit;
  if (typeof vector === "string") fields.vector = vector;
  else if (vector !== undefined) more.vector = vector;
  if (typeof op === "string") fields.op = op;
  else if (op !== undefined) more.op = op;
  const isAdd = fields.op === "add";
  if (unit !== undefined && (isAdd || unit !== "vector")) Object.assign(isAdd && typeof unit === "string" ? fields : more, { unit });
  // A number without a control in this operation, such as the target of a feature, must reach the server as well.
  const shown = { scale: SCALED.includes(fields.op), lo: fields.op === "clamp", hi: fields.op === "clamp", target: fields.op === "set" };
  for (const [name, value] of Object.entries({ scale, lo, hi, target })) {
    if (value === undefined || value === null) continue;
    if (shown[name]) fields[name] = String(value);
    else more[name] = value;
  }
  if (blocks !== undefined && blocks !== null && blocks !== "all") {
    fields.blocks = Array.isArray(blocks) ? blocks.join(", ") : String(blocks);
  }
  if (!fillScope(fields, scope)) more.scope = scope;
  if (schedule && ["linear", "exponential"].includes(schedule.kind)) {
    Object.assign(fields, { schedule: schedule.kind, over: String(schedule.over ?? ""), to: String(schedule.to ?? "") });
  } else if (schedule) more.schedule = schedule;
  if (when && !fillCondition(fields, when)) more.when = when;
  const isPlainGate = gate && typeof gate.vector === "string" && Object.keys(gate).every((key) => ["vector", "min_cos", "max_cos"].includes(key));
  if (isPlainGate) {
    Object.assign(fields, { gate_vector: gate.vector, min_cos: text(gate.min_cos), max_cos: text(gate.max_cos) });
  } else if (gate) more.gate = gate;
  if (Object.keys(more).length) fields.more = JSON.stringify(more);
  return fields;
}

/** `8-22`, `14`, `8, 9` or `all`, as a request has it. */
export function blocksOf(written) {
  const given = written.trim();
  if (/^\d+$/.test(given)) return [Number(given)];
  if (/^\d+(\s*,\s*\d+)+$/.test(given)) return given.split(",").map(Number);
  if (given === "all" || /^\d+-\d+$/.test(given)) return given;
  throw new FieldError("blocks", `Blocks are "all", a range such as 8-22, or numbers such as 8, 9; not ${given}.`);
}

/** Tokens of a trigger: text, or JSON with the ids of tokens, `[12, 7]`. */
function tokensOf(written, field) {
  if (!written.trim().startsWith("[")) return written;
  let ids = null;
  try {
    ids = JSON.parse(written);
  } catch { /* reported below */ }
  if (!Array.isArray(ids) || !ids.length || !ids.every((id) => Number.isInteger(id) && id >= 0)) {
    // A text may begin with a bracket, too.
    return written;
  }
  return ids;
}

function scopeOf(given) {
  const kind = SCOPE_FORMS.find(([name]) => name === given.scope);
  if (!kind) return given.scope;
  const uses = (field) => kind[2].includes(field);
  const scope = given.scope === "answer_tokens" ? { from: "generation" } : {};
  for (const field of ["start", "end", "tokens"]) {
    const value = uses(field) ? number(given[field], field, { integer: true }) : undefined;
    if (value !== undefined) scope[field] = value;
  }
  for (const field of ["after", "until"]) {
    if (uses(field) && given[field] !== "") scope[field] = tokensOf(given[field], field);
  }
  if (given.scope === "window" && scope.after === undefined && scope.until === undefined) {
    throw new FieldError("after", 'Enter the text after which, or until which, the edit applies.');
  }
  if (uses("each") && given.each && scope.after !== undefined) scope.each = true;
  if (uses("except") && given.except) scope.except = given.except;
  if (given.scope === "all_but" && !scope.except) throw new FieldError("except", "Choose what is left out.");
  return Object.keys(scope).length ? scope : "all";
}

/** Fill in the scope; false if the form has no control for it. */
function fillScope(fields, scope) {
  if (scope === undefined || scope === null) return true;
  if (typeof scope === "string") {
    fields.scope = scope;
    return scope in SCOPE_WORDS;
  }
  const { from, start, end, after, until, each, tokens, except, ...unknown } = scope;
  const isTrigger = after !== undefined || until !== undefined;
  const hasSpan = start !== undefined || end !== undefined || from !== undefined;
  const foreign = (except !== undefined && typeof except !== "string") || (from !== undefined && from !== "generation");
  if (Object.keys(unknown).length || foreign || (isTrigger && hasSpan)) return false;
  if (isTrigger) fields.scope = "window";
  else if (from === "generation") fields.scope = "answer_tokens";
  else fields.scope = hasSpan ? "positions" : "all_but";
  const tokenText = (value) => (typeof value === "string" ? value : value === undefined ? "" : JSON.stringify([value].flat()));
  Object.assign(fields, {
    start: text(start), end: text(end), tokens: text(tokens), after: tokenText(after), until: tokenText(until),
    each: each === true, except: except ?? "",
  });
  return true;
}

function conditionOf(given) {
  if (!given.when_vector.trim()) throw new FieldError("when_vector", "Choose the vector of the condition.");
  const condition = { vector: given.when_vector.trim() };
  if (given.when === "stored") return condition;
  Object.assign(condition, { measure: given.measure, at: given.at });
  Object.assign(condition, defined({ above: number(given.above, "above"), below: number(given.below, "below") }));
  if (condition.above === undefined && condition.below === undefined) {
    throw new FieldError("above", "Enter a number that the condition is above or below.");
  }
  return condition;
}

function fillCondition(fields, when) {
  const { vector, measure, at, above, below, ...unknown } = when;
  if (typeof vector !== "string" || Object.keys(unknown).length) return false;
  fields.when_vector = vector;
  fields.when = above === undefined && below === undefined ? "stored" : "bounds";
  if (fields.when === "stored" && (measure !== undefined || at !== undefined)) {
    Object.assign(fields, { when: "", when_vector: "" });
    return false;
  }
  Object.assign(fields, { above: text(above), below: text(below) });
  if (measure) fields.measure = measure;
  if (at) fields.at = at;
  return true;
}

function moreFields(written) {
  if (!written.trim()) return {};
  let fields = null;
  try {
    fields = JSON.parse(written);
  } catch { /* reported below */ }
  if (fields === null || typeof fields !== "object" || Array.isArray(fields)) {
    throw new FieldError("more", `"More fields" must be a JSON object, not ${written.trim()}`);
  }
  return fields;
}

/**
 * The steering of one column. factor: 1 as it is, 0 plain, -1 opposite. presets: name -> spec, to scale a preset.
 * probes stand beside the edits, and alone in the plain column. false: plain. Raises an error if no other factor is
 * possible: a column never has another strength than its heading says.
 */
export function scaled(spec, factor, presets = {}) {
  const { edits, preset, preserve_norm, when, ...rest } = spec || {};
  const kept = Object.keys(rest).length ? rest : false;
  if (factor === 0) return kept;
  if (factor === 1 || (!edits && !preset)) return spec;
  if (preset) {
    const base = presets[preset];
    if (preserve_norm !== undefined || when !== undefined) return spec; // the server says that a preset has its own
    if (!base?.edits) throw new Error(`The edits of the preset ${preset} are not known, so its strength cannot be changed.`);
    const [probes, stop] = ["probes", "stop"].map((name) => [...(base[name] ?? []), ...(rest[name] ?? [])]);
    return scaled({ ...base, ...rest, ...(probes.length ? { probes } : {}), ...(stop.length ? { stop } : {}) }, factor);
  }
  const shared = defined({ preserve_norm, when });
  return { edits: edits.map((edit) => scaledEdit(edit, factor)), ...shared, ...rest };
}

function scaledEdit(edit, factor) {
  const op = edit.op ?? "add";
  const times = (value) => (value === undefined || value === null ? undefined : round(value * factor));
  if (SCALED.includes(op)) return { ...edit, scale: times(edit.scale ?? 1) };
  if (op === "set") return { ...edit, target: times(edit.target) };
  if (op !== "clamp") throw new Error(`An edit with the operation ${op} cannot be multiplied by ${factor}; change its own numbers.`);
  const { lo, hi, ...others } = edit;
  const [low, high] = factor < 0 ? [times(hi), times(lo)] : [times(lo), times(hi)];
  return { ...others, ...defined({ lo: low, hi: high }) };
}

/** Twelve digits: 0.1 * 3 is 0.3 here. */
export const round = (value) => Number(value.toPrecision(12));
const text = (value) => (value === undefined || value === null ? "" : String(value));
const defined = (object) => Object.fromEntries(Object.entries(object).filter(([, value]) => value !== undefined));
