// From the path of a field that a server names in an error, to the control that has it. Pure functions.

/** Fields of an edit that the form calls otherwise, whatever the operation. */
const EDIT_FIELDS = { to_degrees: "degrees", "gate.vector": "gate_vector", "gate.feature": "gate_feature", "schedule.over": "over", "schedule.to": "to" };
const STOP_FIELDS = { probe: "rule", block: "stop_block" };

/**
 * Where the field of a path such as `steering.edits[0].when.any[1].above` is entered:
 * { list: "edits", "probes", "stop", "when" or "page"; index: of the edit, probe or rule; field; part: "scope" or "when"
 * for a form inside of it, or undefined; at: number of the condition }. null if the path is of another kind.
 * edits: those that were sent, for fields that an operation calls otherwise.
 */
export function placeOf(param, edits = []) {
  const [, list, number, path = ""] = /^steering\.(\w+)(?:\[(\d+)\])?\.?(.*)$/.exec(param ?? "") ?? [];
  const index = Number(number);
  if (list === "when") return { list, ...inWhen(path) };
  if (list === "preset" || list === "preserve_norm") return { list: "page", field: list };
  if (number === undefined) return null;
  if (list === "stop") return { list, index, field: STOP_FIELDS[path] ?? (path || "rule") };
  if (list !== "edits" && list !== "probes") return null;
  const [first] = path.split(/[.[]/);
  const inner = path.slice(first.length).replace(/^\./, "");
  if (first === "scope") return { list, index, part: "scope", field: inner ? inner.replace("except.", "except_") : "scope" };
  if (first === "when") return { list, index, part: "when", ...inWhen(inner) };
  const isFeature = list === "edits" && edits[index]?.op === "feature" && ["target", "add", "scale"].includes(path);
  const field = isFeature ? "amount" : EDIT_FIELDS[path] ?? (first === "gate" ? "gate_low" : first || "vector");
  return { list, index, field };
}

/** path: behind `when`: "above", "any[1].above" or "". */
function inWhen(path) {
  const [, number, field = ""] = /^(?:any|all)\[(\d+)\]\.?(.*)$/.exec(path) ?? [];
  if (number !== undefined) return { at: Number(number), field: field || "vector" };
  return path && !["any", "all"].includes(path) ? { at: 0, field: path } : { at: undefined, field: "mode" };
}
