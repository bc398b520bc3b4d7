// The operations of an edit: the controls that belong to each, their JSON, and an edit at another strength.
// Pure functions.

import { FieldError, defined, featuresOf, isNumber, number, round, text } from "./values.js";

export const OPERATIONS = {
  add: "add the vector", add_relative: "add, relative to each token", ablate: "remove the direction",
  clamp: "keep within bounds", set: "set to a value", feature: "change features", low_rank: "low-rank edit (LoReFT)",
  rotate: "rotate toward a vector",
};

/** Operations whose strength is `scale`, with the slider. */
export const SCALED = ["add", "add_relative", "ablate", "low_rank"];

/** The kind of file that an operation reads. Others read directions. */
export const KINDS = { feature: "features", low_rank: "low_rank" };

/** What a feature's activation becomes: the field of a request and its label. */
export const CHANGES = { target: "set to", scale: "multiply by", add: "add" };

/** What the fields of an operation begin with. lo to target: clamp and set; feature to amount: feature; toward to degrees: rotate. */
export const EMPTY_OPERATION = Object.freeze({
  op: "add", scale: "1", unit: "vector", lo: "", hi: "", target: "", feature: "", change: "target", amount: "", toward: "",
  turn: "degrees", degrees: "",
});

/** The part of an edit that its operation decides. Raises FieldError. */
export function operationOf(given) {
  const { op } = given;
  const part = {};
  if (SCALED.includes(op)) part.scale = number(given.scale, "scale", { optional: false });
  if (op !== "add") part.op = op;
  if (op === "add" && given.unit !== "vector") part.unit = given.unit;
  if (op === "clamp") {
    Object.assign(part, defined({ lo: number(given.lo, "lo"), hi: number(given.hi, "hi") }));
    if (part.lo === undefined && part.hi === undefined) throw new FieldError("lo", "Enter a lowest or a highest value.");
  }
  if (op === "set") part.target = number(given.target, "target", { optional: false });
  if (op === "feature") {
    part.feature = featuresOf(given.feature);
    part[given.change] = number(given.amount, "amount", { optional: false });
    if (part.scale === 1) throw new FieldError("amount", "Multiplied by 1, a feature stays as it is: enter another number; 0 removes it.");
  }
  if (op === "rotate") {
    if (!given.toward.trim()) throw new FieldError("toward", "Choose the vector toward which the stream turns.");
    part.toward = given.toward.trim();
    part[given.turn] = number(given.degrees, "degrees", { optional: false });
  }
  return part;
}

/** Fill in the operation's fields. Returns the parts of the edit that the form has no control for. */
export function fillOperation(fields, part) {
  const given = defined(Object.fromEntries(Object.entries(part).map(([name, value]) => [name, value ?? undefined])));
  const { op = "add" } = given;
  if (typeof op !== "string" || !(op in OPERATIONS)) {
    if (typeof op !== "string") return given;
    fields.op = op; // of a newer server
    delete given.op;
    return given;
  }
  fields.op = op;
  delete given.op;
  const take = (name, field = name, isOurs = isNumber) => {
    if (!isOurs(given[name])) return false;
    fields[field] = text(given[name]);
    delete given[name];
    return true;
  };
  if (SCALED.includes(op)) take("scale");
  if (given.unit === "vector" || op === "add") take("unit", "unit", (unit) => typeof unit === "string");
  if (op === "clamp") ["lo", "hi"].forEach((name) => take(name));
  if (op === "set") take("target");
  if (op === "feature") fillFeature(fields, given, take);
  if (op === "rotate") {
    take("toward", "toward", (toward) => typeof toward === "string");
    const turn = ["degrees", "to_degrees"].find((name) => take(name, "degrees"));
    if (turn) fields.turn = turn;
  }
  return given;
}

function fillFeature(fields, given, take) {
  const isFeatures = (value) => [value].flat().length && [value].flat().every((each) => Number.isInteger(each) && each >= 0);
  if (isFeatures(given.feature)) {
    fields.feature = [given.feature].flat().join(", ");
    delete given.feature;
  }
  const change = Object.keys(CHANGES).find((name) => take(name, "amount"));
  if (change) fields.change = change;
}

/**
 * An edit at another strength: what it adds, sets or turns by is multiplied. Raises an error where nothing else than the
 * numbers of the edit themselves says what a multiple would be.
 */
export function scaledEdit(edit, factor) {
  const op = edit.op ?? "add";
  const times = (value) => (value === undefined || value === null ? undefined : round(value * factor));
  if (SCALED.includes(op)) return { ...edit, scale: times(edit.scale ?? 1) };
  if (op === "set") return { ...edit, target: times(edit.target) };
  const numbers = { feature: ["target", "add"], rotate: ["degrees"] }[op] ?? [];
  const name = numbers.find((each) => isNumber(edit[each]));
  if (name) return { ...edit, [name]: times(edit[name]) };
  if (op !== "clamp") {
    const what = { feature: "that multiplies a feature", rotate: "that rotates to an angle" }[op] ?? `with the operation ${op}`;
    throw new Error(`An edit ${what} cannot be multiplied by ${factor}; change its own numbers.`);
  }
  const { lo, hi, ...others } = edit;
  const [low, high] = factor < 0 ? [times(hi), times(lo)] : [times(lo), times(hi)];
  return { ...others, ...defined({ lo: low, hi: high }) };
}
