// What a server allows, from GET /v1/steering: the choices of the forms, and the reasons where something is not allowed.
// Pure functions.

import { OPERATIONS } from "./operations.js";
import { SCOPE_FORMS, SCOPE_WORDS, TAGGED } from "./scope.js";
import { SITES } from "./spec.js";

const PARSERS = { thinking: "needs --reasoning-parser", answer: "needs --reasoning-parser", tool_calls: "needs --tool-call-parser" };

/** Before the first answer of a server, everything is offered that any server has. */
export const EVERYTHING = Object.freeze({
  operations: Object.keys(OPERATIONS), sites: Object.keys(SITES), scopes: Object.keys(SCOPE_WORDS), limits: {},
});

/**
 * about: the body of GET /v1/steering.
 *
 * operations, sites, scopes, excepts: choices [value, label, reason], where a reason says why it is not allowed, "" if it
 * is. why: the same for parts of a form: gate, when, probes, preserve_norm, window. maxEdits, maxProbes, maxRank: limits,
 * Infinity where unknown.
 */
export function offersOf(about = EVERYTHING) {
  const { operations = [], scopes = [], sites = ["block"], limits = {} } = about;
  const words = scopes.filter((each) => typeof each === "string");
  const onlyAdds = operations.length === 1 && operations[0] === "add";
  const armed = onlyAdds ? "The server has only op add armed (--steering-ops)." : "";
  const limited = (name) => (limits[name] === 0 ? `The server allows none (${name}).` : "");
  const triggers = limited("max_triggers");
  const choice = (allowed, labels, reason) => (value) => [value, labels[value] ?? value, allowed.includes(value) ? "" : reason(value)];
  const all = (known, offered) => [...known, ...offered.filter((each) => !known.includes(each))];
  const word = choice(words, SCOPE_WORDS, (each) => PARSERS[each] ?? "not on this server");
  return {
    operations: all(Object.keys(OPERATIONS), operations).map(choice(operations, OPERATIONS, () => "not armed: --steering-ops")),
    sites: all(Object.keys(SITES), sites).map(choice(sites, SITES, () => "not armed: --steering-sites")),
    scopes: [
      ...all(Object.keys(SCOPE_WORDS), words).map(word),
      ...SCOPE_FORMS.map(([value, label]) => [value, label, value === "window" ? triggers && "max_triggers is 0" : ""]),
    ],
    excepts: [["", "nothing", ""], ...TAGGED.map(word), ["window", "around a text", triggers && "max_triggers is 0"]],
    why: {
      gate: armed, preserve_norm: armed, when: armed || limited("max_conditions"), probes: armed || limited("max_probes"),
    },
    maxEdits: limits.max_edits ?? Infinity, maxProbes: limits.max_probes ?? Infinity, maxRank: limits.max_rank ?? Infinity,
    maxScale: limits.max_abs_scale ?? 1000,
  };
}
