// Texts of controls as values of a request, and back. Pure functions.

/** A field that is not usable. `field` is its name in its form. */
export class FieldError extends Error {
  constructor(field, message) {
    super(message);
    this.field = field;
  }
}

const LABELS = {
  scale: "Strength", lo: "Lowest", hi: "Highest", target: "Value", over: "Over", to: "Ends at", gate_low: "From", gate_high: "To",
  gate_feature: "Number of the feature", start: "From token", end: "Before token", tokens: "At most", except_tokens: "At most",
  amount: "Amount", degrees: "Degrees", for: "Tokens in a row",
};
const label = (field) => LABELS[field] ?? field[0].toUpperCase() + field.slice(1).replaceAll("_", " ");

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

/** `8-22`, `14`, `8, 9` or `all`, as a request has it. */
export function blocksOf(written, field = "blocks") {
  const given = written.trim();
  if (/^\d+$/.test(given)) return [Number(given)];
  if (/^\d+(\s*,\s*\d+)+$/.test(given)) return given.split(",").map(Number);
  if (given === "all" || /^\d+-\d+$/.test(given)) return given;
  throw new FieldError(field, `Blocks are "all", a range such as 8-22, or numbers such as 8, 9; not ${given}.`);
}

/** The text of a request's `blocks`; "" for all of them. */
export function blocksText(blocks) {
  if (blocks === undefined || blocks === null || blocks === "all") return "";
  return Array.isArray(blocks) ? blocks.join(", ") : String(blocks);
}

/** Numbers of features, `7` or `7, 4099`: a number, or a list of them. Raises FieldError. */
export function featuresOf(written) {
  const parts = written.split(/[,\s]+/).filter(Boolean);
  if (!parts.length || !parts.every((part) => /^\d+$/.test(part))) {
    const given = written.trim() ? `, not ${written.trim()}` : "";
    throw new FieldError("feature", `Enter the number of a feature, or several with commas${given}.`);
  }
  const numbers = parts.map(Number);
  return numbers.length === 1 ? numbers[0] : numbers;
}

/** A JSON object of further fields; {} for an empty text. Raises FieldError. */
export function moreFields(written, field = "more") {
  if (!written.trim()) return {};
  let fields = null;
  try {
    fields = JSON.parse(written);
  } catch { /* reported below */ }
  if (isObject(fields)) return fields;
  throw new FieldError(field, `"More fields" must be a JSON object, not ${written.trim()}`);
}

/** Do work for a part of a form that is a form of its own: an error's `part` says which. */
export function inPart(part, work) {
  try {
    return work();
  } catch (error) {
    throw Object.assign(error, { part });
  }
}

/** Twelve digits: 0.1 * 3 is 0.3 here. */
export const round = (value) => Number(value.toPrecision(12));

/** The text of a control; "" for a value that is absent. */
export const text = (value) => (value === undefined || value === null ? "" : String(value));

/** Without the fields that are undefined. */
export const defined = (object) => Object.fromEntries(Object.entries(object).filter(([, value]) => value !== undefined));

/** Without the fields that are null: they count as absent in a request. */
export const withoutNulls = (object) => Object.fromEntries(Object.entries(object).filter(([, value]) => value !== null));

export const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);

/** Whether a field can be shown in a control for numbers. */
export const isNumber = (value) => typeof value === "number" && Number.isFinite(value);
