// The fields of an edit's form, and the JSON of a request's `steering`. Pure functions: no page, no network.

import { EMPTY_OPERATION, fillOperation, operationOf, scaledEdit } from "./operations.js";
import { EMPTY_SCOPE, NO_CONDITION, scopeFields, scopeOf, whenFields, whenOf } from "./scope.js";
import { FieldError, blocksOf, blocksText, defined, inPart, isNumber, isObject, moreFields, number, text } from "./values.js";

/** The state of an untouched form. Numbers are text, as in their controls. `scope` and `when` have forms of their own. */
export const EMPTY = Object.freeze({
  ...EMPTY_OPERATION, vector: "", blocks: "", site: "block", schedule: "", over: "24", to: "0",
  gate_vector: "", gate_measure: "cos", gate_feature: "", gate_low: "", gate_high: "", more: "",
  scope: EMPTY_SCOPE, when: NO_CONDITION,
});

export const SITES = { block: "stream after the block", attn: "output of the attention", mlp: "output of the MLP" };

/** The edit of a request. Fields that have their default are left out. Raises FieldError. */
export function editOf(fields) {
  const given = { ...EMPTY, ...fields };
  if (!given.vector.trim()) throw new FieldError("vector", "Choose a vector for this edit.");
  const edit = { vector: given.vector.trim(), ...operationOf(given) };
  if (given.blocks.trim()) edit.blocks = blocksOf(given.blocks);
  if (given.site !== "block") edit.site = given.site;
  const scope = inPart("scope", () => scopeOf(given.scope));
  if (scope !== "all") edit.scope = scope;
  if (given.schedule) {
    edit.schedule = {
      kind: given.schedule, over: number(given.over, "over", { optional: false, integer: true }),
      to: number(given.to, "to", { optional: false }),
    };
  }
  const when = inPart("when", () => whenOf(given.when));
  if (when) edit.when = when;
  if (given.gate_vector.trim()) edit.gate = gateOf(given);
  return { ...edit, ...moreFields(given.more) };
}

/** The form's fields of an edit. What the form has no control for goes into `more`, so that nothing is lost. */
export function fieldsOf(edit) {
  const fields = { ...EMPTY };
  const { vector, blocks, site, scope, schedule, when, gate, ...rest } = edit;
  const more = fillOperation(fields, rest);
  if (typeof vector === "string") fields.vector = vector;
  else if (vector !== undefined) more.vector = vector;
  fields.blocks = blocksText(blocks);
  if (typeof site === "string") fields.site = site;
  else if (site) more.site = site;
  if (scope) {
    const shown = scopeFields(scope);
    if (shown) fields.scope = shown;
    else more.scope = scope;
  }
  if (isObject(schedule) && ["linear", "exponential"].includes(schedule.kind)) {
    Object.assign(fields, { schedule: schedule.kind, over: text(schedule.over), to: text(schedule.to) });
  } else if (schedule) more.schedule = schedule;
  if (when) {
    const shown = whenFields(when);
    if (shown) fields.when = shown;
    else more.when = when;
  }
  if (gate && !fillGate(fields, gate)) more.gate = gate;
  if (Object.keys(more).length) fields.more = JSON.stringify(more);
  return fields;
}

/** gate_measure: "cos" and "dot" bound the token's similarity to a vector, "feature" that of a feature. */
function gateOf(given) {
  const gate = { vector: given.gate_vector.trim() };
  const kind = given.gate_measure === "cos" ? "cos" : "dot";
  if (given.gate_measure === "feature") gate.feature = number(given.gate_feature, "gate_feature", { optional: false, integer: true });
  const bounds = defined({ [`min_${kind}`]: number(given.gate_low, "gate_low"), [`max_${kind}`]: number(given.gate_high, "gate_high") });
  if (!Object.keys(bounds).length) throw new FieldError("gate_low", "Enter where the gate begins or ends.");
  return { ...gate, ...bounds };
}

function fillGate(fields, gate) {
  if (!isObject(gate)) return false;
  const { vector, feature, min_cos, max_cos, min_dot, max_dot, ...unknown } = gate;
  const given = [min_cos, max_cos, min_dot, max_dot].filter((each) => each !== undefined && each !== null);
  const hasCosine = isNumber(min_cos) || isNumber(max_cos);
  const isOne = !(hasCosine && (isNumber(min_dot) || isNumber(max_dot) || isNumber(feature)));
  if (typeof vector !== "string" || Object.keys(unknown).length || !given.length || !given.every(isNumber) || !isOne) return false;
  Object.assign(fields, {
    gate_vector: vector, gate_measure: isNumber(feature) ? "feature" : hasCosine ? "cos" : "dot", gate_feature: text(feature),
    gate_low: text(hasCosine ? min_cos : min_dot), gate_high: text(hasCosine ? max_cos : max_dot),
  });
  return true;
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
