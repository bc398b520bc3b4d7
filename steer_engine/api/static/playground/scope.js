// When an edit applies and what a probe measures: the form's fields of a scope and of conditions, and their JSON.
// Pure functions.

import { FieldError, blocksOf, blocksText, defined, isNumber, isObject, number, text, withoutNulls } from "./values.js";

/** The fields of an untouched scope. scope: a word, or the name of a form of SCOPE_FORMS. */
export const EMPTY_SCOPE = Object.freeze({
  scope: "all", start: "", end: "", within: "", after: "", until: "", each: false, tokens: "",
  except: "", except_after: "", except_until: "", except_each: false, except_tokens: "",
});

/** Scopes that are objects: the value of the choice and its label. */
export const SCOPE_FORMS = [
  ["answer_tokens", "part of the answer"], ["positions", "prompt positions"], ["window", "around a text"], ["all_but", "all except"],
];

export const SCOPE_WORDS = {
  all: "every token", prompt: "the prompt", generation: "the answer's tokens", last_prompt_token: "the last prompt token",
  thinking: "the reasoning", answer: "what follows the reasoning", tool_calls: "tool calls",
};

/** Words that are windows between tags of the server's parsers. */
export const TAGGED = ["thinking", "answer", "tool_calls"];

/** In words, for a summary. */
export const scopeText = ({ scope }) => Object.fromEntries(SCOPE_FORMS)[scope] ?? SCOPE_WORDS[scope] ?? scope;

/** Tokens of a trigger: text; or JSON with the ids of tokens, `[12, 7]`; or JSON text, for a text that looks like JSON. */
function tokensOf(written) {
  if (!/^\s*["[]/.test(written)) return written;
  try {
    const value = JSON.parse(written);
    if (typeof value === "string" && value) return value;
    if (Array.isArray(value) && value.length && value.every((id) => Number.isInteger(id) && id >= 0)) return value;
  } catch { /* a text may begin with a bracket, too */ }
  return written;
}

function tokensText(tokens) {
  if (tokens === undefined) return "";
  if (typeof tokens !== "string") return JSON.stringify([tokens].flat());
  return tokensOf(tokens) === tokens ? tokens : JSON.stringify(tokens);
}

/** prefix: of the fields' names, "" or "except_". Raises FieldError without `after` and `until`. */
function triggerOf(given, prefix = "") {
  const trigger = {};
  for (const name of ["after", "until"]) {
    if (given[prefix + name] !== "") trigger[name] = tokensOf(given[prefix + name]);
  }
  if (!Object.keys(trigger).length) {
    const what = prefix ? "that is left out" : "of the window";
    throw new FieldError(`${prefix}after`, `Enter the text after which, or until which, the part ${what} goes.`);
  }
  if (given[`${prefix}each`] && trigger.after !== undefined) trigger.each = true;
  return { ...trigger, ...defined({ tokens: number(given[`${prefix}tokens`], `${prefix}tokens`, { integer: true }) }) };
}

function triggerFields({ after, until, each, tokens }, prefix = "") {
  const fields = { after: tokensText(after), until: tokensText(until), each: each === true, tokens: text(tokens) };
  return Object.fromEntries(Object.entries(fields).map(([name, value]) => [prefix + name, value]));
}

/** The scope of a request. Raises FieldError. */
export function scopeOf(fields) {
  const given = { ...EMPTY_SCOPE, ...fields };
  const form = given.scope;
  if (!SCOPE_FORMS.some(([name]) => name === form)) return form;
  const span = form === "window" ? given.within : form === "all_but" ? "" : form;
  const scope = span === "answer_tokens" ? { from: "generation" } : {};
  for (const field of span ? ["start", "end"] : []) {
    Object.assign(scope, defined({ [field]: number(given[field], field, { integer: true }) }));
  }
  if (form === "window") Object.assign(scope, triggerOf(given));
  if (given.except === "window") scope.except = triggerOf(given, "except_");
  else if (given.except) scope.except = given.except;
  if (form === "all_but" && !scope.except) throw new FieldError("except", "Choose what is left out.");
  return Object.keys(scope).length ? scope : "all";
}

const TRIGGER_KEYS = ["after", "until", "each", "tokens"];
const isTokens = (value) => value === undefined || value === null || typeof value === "string" || [value].flat().every(Number.isInteger);
const isTrigger = (value, keys = TRIGGER_KEYS) =>
  isObject(value) && Object.keys(value).every((key) => keys.includes(key)) && isTokens(value.after) && isTokens(value.until);

/** The form's fields of a scope; null if the form cannot show it. */
export function scopeFields(given) {
  if (typeof given === "string") return given in SCOPE_WORDS ? { ...EMPTY_SCOPE, scope: given } : null;
  if (!isTrigger(given, [...TRIGGER_KEYS, "from", "start", "end", "except"])) return null;
  const scope = withoutNulls(given);
  const { from, start, end, except } = scope;
  const opens = scope.after !== undefined || scope.until !== undefined;
  if (from !== undefined && from !== "generation") return null;
  if (!opens && (scope.each !== undefined || scope.tokens !== undefined)) return null; // the server says what is missing
  const span = from === "generation" ? "answer_tokens" : start !== undefined || end !== undefined ? "positions" : "";
  const fields = { ...EMPTY_SCOPE, start: text(start), end: text(end), ...triggerFields(scope) };
  if (opens) Object.assign(fields, { scope: "window", within: span });
  else fields.scope = span || (except === undefined ? "all" : "all_but");
  if (typeof except === "string") return except === "window" ? null : { ...fields, except };
  if (except === undefined) return fields;
  if (!isTrigger(except)) return null;
  return { ...fields, except: "window", ...triggerFields(withoutNulls(except), "except_") };
}

/** At most so many conditions are in a list. */
export const MAX_CONDITIONS = 4;

/** The fields of an untouched condition. bound: "bounds", or "stored" for the condition in the vector's file. */
export const EMPTY_CONDITION = Object.freeze({
  vector: "", bound: "bounds", blocks: "", measure: "cosine", at: "last_prompt_token", above: "", below: "",
});

/** No condition. mode: "", "one", "any" or "all"; with "one", the first of the list counts. */
export const NO_CONDITION = Object.freeze({ mode: "", list: [] });

function conditionOf(fields) {
  const given = { ...EMPTY_CONDITION, ...fields };
  if (!given.vector.trim()) throw new FieldError("vector", "Choose the vector of the condition.");
  const condition = { vector: given.vector.trim() };
  if (given.bound === "stored") return condition;
  if (given.blocks.trim()) condition.blocks = blocksOf(given.blocks);
  if (given.measure !== "cosine") condition.measure = given.measure;
  if (given.at !== "last_prompt_token") condition.at = given.at;
  Object.assign(condition, defined({ above: number(given.above, "above"), below: number(given.below, "below") }));
  if (condition.above === undefined && condition.below === undefined) {
    throw new FieldError("above", "Enter a number that the condition is above or below.");
  }
  return condition;
}

/** The `when` of a request; undefined for none. Raises FieldError; its `at` is the number of the condition. */
export function whenOf({ mode, list }) {
  if (!mode) return undefined;
  const wanted = mode === "one" ? list.slice(0, 1) : list;
  if (!wanted.length) throw new FieldError("mode", "Add a condition, or choose that there is none.");
  const conditions = wanted.map((fields, at) => {
    try {
      return conditionOf(fields);
    } catch (error) {
      throw Object.assign(error, { at });
    }
  });
  return mode === "one" ? conditions[0] : { [mode]: conditions };
}

/** The form's fields of a `when`; null if the form cannot show it. */
export function whenFields(when) {
  if (!isObject(when)) return null;
  const [[mode, list] = [], ...others] = ["any", "all"].filter((key) => key in when).map((key) => [key, when[key]]);
  if (mode === undefined) {
    const one = conditionFields(when);
    return one && { mode: "one", list: [one] };
  }
  if (others.length || Object.keys(when).length > 1 || !Array.isArray(list) || list.length > MAX_CONDITIONS) return null;
  const shown = list.map(conditionFields);
  return shown.length && shown.every(Boolean) ? { mode, list: shown } : null;
}

function conditionFields(given) {
  if (!isObject(given)) return null;
  const { vector, blocks, measure, at, above, below, ...unknown } = withoutNulls(given);
  if (typeof vector !== "string" || Object.keys(unknown).length) return null;
  if (![above, below].every((bound) => bound === undefined || isNumber(bound))) return null;
  if (above === undefined && below === undefined) {
    // The file has the whole condition; parts of one beside it are for the server to judge.
    return blocks ?? measure ?? at ? null : { ...EMPTY_CONDITION, vector, bound: "stored" };
  }
  return { ...EMPTY_CONDITION, vector, blocks: blocksText(blocks), above: text(above), below: text(below), ...defined({ measure, at }) };
}
