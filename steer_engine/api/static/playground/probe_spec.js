// The fields of a probe's form with its stop rule, and their JSON; what is known about the numbers of a run.
// Pure functions: no page, no network.

import { EMPTY_SCOPE, scopeFields, scopeOf } from "./scope.js";
import { FieldError, blocksOf, blocksText, defined, inPart, isNumber, isObject, number, text, withoutNulls } from "./values.js";

/** The name of the first probe of the form. Presets may have probes of their own, with other names. */
export const PROBE = "playground";

/** rule: "" for none, "above", "below" or "between". stop_block: "" if the probe has one block. */
export const EMPTY_PROBE = Object.freeze({
  name: PROBE, vector: "", blocks: "", site: "block", measure: "cosine", after: false, return: "tokens",
  scope: Object.freeze({ ...EMPTY_SCOPE, scope: "generation" }), rule: "", above: "", below: "", stop_block: "", for: "1",
});

/** { probe, stop } of a request; stop is null without a rule. Raises FieldError. */
export function probeOf(fields) {
  const given = { ...EMPTY_PROBE, ...fields };
  if (!given.vector.trim()) throw new FieldError("vector", "Choose a vector for this probe, or remove it.");
  const name = given.name.trim();
  if (!/^[\w.:/-]{1,64}$/.test(name)) {
    throw new FieldError("name", `The name of a probe has up to 64 letters, digits and _ . : / - in it; not "${name}".`);
  }
  const probe = { name, vector: given.vector.trim() };
  if (given.blocks.trim()) probe.blocks = blocksOf(given.blocks);
  if (given.site !== "block") probe.site = given.site;
  probe.measure = given.measure;
  const scope = inPart("scope", () => scopeOf(given.scope));
  if (scope !== "generation") probe.scope = scope;
  if (given.after) probe.after = true;
  if (given.return !== "tokens") probe.return = given.return;
  return { probe, stop: given.rule ? stopOf(given, name) : null };
}

function stopOf(given, name) {
  const stop = { probe: name, ...defined({ block: number(given.stop_block, "stop_block", { integer: true }) }) };
  for (const bound of given.rule === "between" ? ["above", "below"] : [given.rule]) {
    stop[bound] = number(given[bound], bound, { optional: false });
  }
  const tokens = number(given.for, "for", { integer: true });
  if (tokens !== undefined && tokens !== 1) stop.for = tokens;
  return stop;
}

/** The form's fields of a probe and its stop rule (or null); null if the form cannot show the probe. */
export function probeFields(probe, stop = null) {
  if (!isObject(probe)) return null;
  const { name, vector, blocks, site, measure, scope = "generation", after, return: returned, ...unknown } = withoutNulls(probe);
  const shown = scopeFields(scope);
  if (typeof vector !== "string" || typeof name !== "string" || Object.keys(unknown).length || !shown) return null;
  const fields = { ...EMPTY_PROBE, ...defined({ site, measure, return: returned }), name, vector, blocks: blocksText(blocks), scope: shown };
  return { ...fields, after: after === true, ...(stop ? stopFields(stop) : {}) };
}

function stopFields({ block, above, below, for: tokens }) {
  const rule = isNumber(above) ? (isNumber(below) ? "between" : "above") : "below";
  return { rule, above: text(above), below: text(below), stop_block: text(block), for: text(tokens ?? 1) };
}

const isStop = (stop) => isObject(stop) && [stop.above, stop.below].some(isNumber) &&
  Object.entries(stop).every(([key, value]) => ["probe", "block", "above", "below", "for"].includes(key) && (key === "probe" || value === null || isNumber(value)));

/**
 * { forms, rest }: the forms of a spec's probes with the first stop rule of each, and the spec without them. What the
 * forms cannot show stays in the rest.
 */
export function takeProbes(spec) {
  const { probes, stop, ...rest } = spec || {};
  const stops = Array.isArray(stop) ? [...stop] : [];
  const forms = [];
  const left = [];
  for (const probe of Array.isArray(probes) ? probes : []) {
    const at = stops.findIndex((each) => isStop(each) && each.probe === probe?.name);
    const fields = probeFields(probe, at < 0 ? null : stops[at]);
    if (fields) {
      forms.push(fields);
      if (at >= 0) stops.splice(at, 1);
    } else left.push(probe);
  }
  return { forms, rest: { ...rest, ...(left.length ? { probes: left } : {}), ...(stops.length ? { stop: stops } : {}) } };
}

/** The steering with the probes of the forms beside it. given: { probe, stop } of each. */
export function withProbes(spec, given) {
  if (!given.length) return spec;
  const { probes = [], stop = [], ...rest } = spec || {};
  const rules = [...given.map((each) => each.stop).filter(Boolean), ...stop];
  return { ...rest, probes: [...given.map((each) => each.probe), ...probes], ...(rules.length ? { stop: rules } : {}) };
}

/** A probe of a link that was made before probes had their own form: { vector, block, measure, after, rule, bound, tokens }. */
export function probeOfBefore({ vector, block, measure = "cosine", after = false, rule = "", bound = "", tokens = "1" }) {
  return { ...EMPTY_PROBE, vector, blocks: text(block), measure, after, rule, for: text(tokens), ...(rule ? { [rule]: text(bound) } : {}) };
}

/** The key of one probe's numbers at one block, and its words. */
export const seriesKey = (name, block) => `${name}:${block}`;
export function seriesText(key) {
  const at = key.lastIndexOf(":");
  return `${key.slice(0, at)}, block ${key.slice(at + 1)}`;
}

/**
 * What the numbers of a series mean: { threshold, measure, title }, for `scaleOf` and the legend.
 * probes: those of the run's request and preset. thresholdOf: (vector's name, block, measure) -> number or null.
 */
export function factsOf(key, probes, thresholdOf) {
  const at = key.lastIndexOf(":");
  const probe = probes.find((each) => each?.name === key.slice(0, at));
  const measure = probe?.measure ?? "cosine";
  const block = Number(key.slice(at + 1));
  const where = probe?.site && probe.site !== "block" ? `, ${probe.site}` : "";
  const title = probe ? `${probe.vector}, block ${block}${where}, ${measure}` : seriesText(key);
  return { measure, title, threshold: probe ? thresholdOf(probe.vector, block, measure) : null };
}
