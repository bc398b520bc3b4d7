// The playground's forms and the JSON of a request, in both directions. `test_playground_modules.py` runs it.

import assert from "node:assert/strict";
import { test } from "node:test";

import { describeDose, rowsOf } from "./dose.js";
import { offersOf } from "./offers.js";
import { placeOf } from "./params.js";
import { EMPTY_PROBE, PROBE, factsOf, probeFields, probeOf, takeProbes, withProbes } from "./probe_spec.js";
import { scopeFields, scopeOf, whenFields, whenOf } from "./scope.js";
import { EMPTY, editOf, fieldsOf, scaled } from "./spec.js";
import { FieldError, blocksOf, featuresOf, number } from "./values.js";

const SCOPES = [
  "prompt", "generation", "last_prompt_token", "thinking", "answer", "tool_calls",
  { from: "generation", start: 0, end: 8 }, { from: "generation" }, { start: 1, end: -1 },
  { after: "<think>", until: "</think>", each: true, tokens: 4, except: "tool_calls" }, { until: [5, 7] }, { after: " " },
  { after: "</think>", from: "generation", except: "tool_calls" }, { after: "a", until: "b", start: -4 }, { from: "generation", start: 3, until: "." },
  { except: "thinking" }, { except: { after: "(", until: ")", each: true, tokens: 9 } }, { start: 2, except: { until: "x" } },
  // Texts that look like the ids of tokens, or like JSON.
  { after: "[7]" }, { after: '"[7]"', until: "[INST]" }, { after: '"' },
];

const WHENS = [
  { vector: "w", measure: "dot", at: "max_prompt", above: 0.1, below: 3 }, { vector: "w" }, { vector: "w", above: 0 },
  { vector: "w", above: 0.1, blocks: "8-10" }, { vector: "w", below: 0.1, blocks: [3, 5], at: "mean_prompt" },
  { any: [{ vector: "w", above: 0 }, { vector: "x" }] }, { all: [{ vector: "w", below: 1 }] },
];

const EDITS = [
  { vector: "v", scale: 0.3 },
  { vector: "v", scale: -2, op: "add_relative", blocks: "8-22" },
  { vector: "v", scale: 1, unit: "residual", blocks: [8, 9] },
  { vector: "v", scale: 0.5, op: "ablate" },
  { vector: "v", op: "clamp", lo: -1, hi: 0.5 },
  { vector: "v", op: "set", target: 0 },
  { vector: "v", op: "feature", feature: [3, 5], target: 2 },
  { vector: "v", op: "feature", feature: 3, scale: 0, blocks: [14] },
  { vector: "v", op: "feature", feature: 3, add: -1.5 },
  { vector: "v", op: "low_rank", scale: 0.5 },
  { vector: "v", op: "rotate", toward: "w", degrees: 20 },
  { vector: "v", op: "rotate", toward: "w", to_degrees: -90 },
  { vector: "v", scale: 1, site: "mlp" },
  { vector: "v", op: "ablate", scale: 1, site: "attn", blocks: "8-19" },
  { vector: "v", scale: 1, schedule: { kind: "linear", over: 24, to: 0 } },
  ...[{ min_cos: 0.1, max_cos: 0.9 }, { min_dot: 2 }, { max_dot: 0, feature: 4 }].map((bounds) => ({ vector: "v", scale: 1, gate: { vector: "w", ...bounds } })),
  ...SCOPES.map((scope) => ({ vector: "v", scale: 1, scope })),
  ...WHENS.map((when) => ({ vector: "v", scale: 1, when })),
];

test("an edit goes through the form and back without a change, and every part has a control", () => {
  for (const edit of EDITS) {
    const fields = fieldsOf(edit);
    assert.equal(fields.more, "", JSON.stringify(edit));
    assert.deepEqual(editOf(fields), edit);
  }
});

test("what no control can show is kept", () => {
  const odd = [
    { vector: "v", op: "ablate", scale: 1, unit: "residual" }, { vector: "v", op: "clamp", lo: 0, scale: 2 },
    { vector: "v", scale: 1, scope: { from: "prompt", start: 1 } }, { vector: "v", scale: 1, scope: { each: true } },
    { vector: "v", scale: 1, when: { vector: "w", measure: "dot" } }, { vector: "v", scale: 1, when: { any: [], all: [] } },
    { vector: "v", scale: 1, gate: { vector: "w", min_cos: 0, min_dot: 2 } }, { vector: "v", op: "newer", strength: 3 },
    { vector: "v", op: "feature", feature: 3, target: 2, scale: 3 }, { vector: "v", scale: 1, schedule: { kind: "cosine" } },
  ];
  for (const edit of odd) {
    assert.notEqual(fieldsOf(edit).more, "", JSON.stringify(edit));
    assert.deepEqual(editOf(fieldsOf(edit)), edit);
  }
  assert.deepEqual(JSON.parse(fieldsOf({ vector: { data: "AAAA" }, scale: 1 }).more), { vector: { data: "AAAA" } });
});

test("scopes and conditions that are null or have null in them", () => {
  assert.equal(scopeOf(scopeFields({ start: null, end: null })), "all");
  assert.deepEqual(scopeOf(scopeFields({ after: 7, until: null })), { after: [7] });
  assert.deepEqual(whenOf(whenFields({ vector: "w", above: 1, below: null })), { vector: "w", above: 1 });
  assert.equal(whenOf({ mode: "", list: [] }), undefined);
  assert.equal(scopeFields({ after: 1.5 }), null);
});

test("fields that are wrong are named", () => {
  const scope = (fields) => ({ vector: "v", scope: fields });
  const when = (list, mode = "one") => ({ vector: "v", when: { mode, list } });
  const wrong = [
    [{}, "vector"], [{ vector: "v", scale: "" }, "scale"], [{ vector: "v", scale: "x" }, "scale"],
    [{ vector: "v", op: "clamp" }, "lo"], [{ vector: "v", op: "set" }, "target"], [{ vector: "v", blocks: "8..9" }, "blocks"],
    [{ vector: "v", op: "feature", amount: "1" }, "feature"], [{ vector: "v", op: "feature", feature: "3 x", amount: "1" }, "feature"],
    [{ vector: "v", op: "feature", feature: "3" }, "amount"], [{ vector: "v", op: "feature", feature: "3", change: "scale", amount: "1" }, "amount"],
    [{ vector: "v", op: "rotate", degrees: "3" }, "toward"], [{ vector: "v", op: "rotate", toward: "w" }, "degrees"],
    [scope({ scope: "window" }), "after", "scope"], [scope({ scope: "all_but" }), "except", "scope"],
    [scope({ scope: "all_but", except: "window" }), "except_after", "scope"], [scope({ scope: "positions", start: "1.5" }), "start", "scope"],
    [{ vector: "v", schedule: "linear", over: "" }, "over"], [{ vector: "v", gate_vector: "w" }, "gate_low"],
    [{ vector: "v", gate_vector: "w", gate_measure: "feature", gate_low: "1" }, "gate_feature"],
    [when([{ vector: "w" }]), "above", "when", 0], [when([{ vector: "w", bound: "stored" }, { above: "1" }], "any"), "vector", "when", 1],
    [when([], "all"), "mode", "when"], [{ vector: "v", more: "[1]" }, "more"], [{ vector: "v", more: "{" }, "more"],
  ];
  for (const [fields, field, part, at] of wrong) {
    const matches = (error) => error instanceof FieldError && error.field === field && error.part === part && error.at === at;
    assert.throws(() => editOf({ ...EMPTY, ...fields }), matches, JSON.stringify(fields));
  }
  assert.throws(() => number("1e999", "seed"), /must be a number/);
});

test("blocks and features as they are written", () => {
  assert.deepEqual([blocksOf("14"), blocksOf("8, 9"), blocksOf("8-22"), blocksOf("all")], [[14], [8, 9], "8-22", "all"]);
  assert.deepEqual([featuresOf("7"), featuresOf(" 7, 4099 ")], [7, [7, 4099]]);
});

test("a column has the steering at its factor", () => {
  const spec = { edits: [{ vector: "v", scale: 0.1 }, { vector: "v", op: "set", target: 2 }, { vector: "v", op: "clamp", lo: -1, hi: 3 }], preserve_norm: true, when: { vector: "w", above: 1 } };
  assert.equal(scaled(spec, 0), false);
  assert.equal(scaled(spec, 1), spec);
  const minus = scaled(spec, -1);
  assert.deepEqual([minus.preserve_norm, minus.when], [true, spec.when]);
  assert.deepEqual(minus.edits.map((edit) => edit.scale ?? edit.target ?? [edit.lo, edit.hi]), [-0.1, -2, [-3, 1]]);
  assert.equal(scaled(spec, 3).edits[0].scale, 0.3);
  assert.deepEqual(scaled({ edits: [{ vector: "v", op: "clamp", lo: 1 }] }, -2).edits, [{ vector: "v", op: "clamp", hi: -2 }]);
  assert.deepEqual(scaled({ preset: "p" }, -1, { p: { edits: [{ vector: "v" }] } }), { edits: [{ vector: "v", scale: -1 }] });
  assert.equal(scaled(false, 1), false);
  const more = [
    [{ op: "low_rank", scale: 0.5 }, { scale: 1 }], [{ op: "low_rank" }, { scale: 2 }], [{ op: "rotate", toward: "w", degrees: 20 }, { degrees: 40 }],
    [{ op: "feature", feature: 3, target: 4 }, { target: 8 }], [{ op: "feature", feature: 3, add: -1 }, { add: -2 }],
  ];
  for (const [edit, changed] of more) assert.deepEqual(scaled({ edits: [{ vector: "v", ...edit }] }, 2).edits, [{ vector: "v", ...edit, ...changed }]);
});

test("no column has another strength than its heading says", () => {
  const preset = { edits: [{ vector: "v" }], preserve_norm: true, probes: [{ name: "own" }], stop: [{ probe: "own", above: 1 }] };
  const twice = scaled({ preset: "p", probes: [{ name: PROBE }] }, 2, { p: preset });
  assert.deepEqual(twice, { ...preset, edits: [{ vector: "v", scale: 2 }], probes: [{ name: "own" }, { name: PROBE }] });
  assert.throws(() => scaled({ preset: "p" }, -1, {}), /preset p are not known/);
  assert.deepEqual(scaled({ preset: "p" }, 1, {}), { preset: "p" });
  for (const edit of [{ op: "feature", feature: 3, scale: 0 }, { op: "rotate", to_degrees: 10 }, { op: "newer" }]) {
    const spec = { edits: [{ vector: "v", ...edit }] };
    assert.throws(() => scaled(spec, -1), /cannot be multiplied by -1/);
    assert.equal(scaled(spec, 1), spec);
  }
  // What the server refuses is sent as it is, for it says why.
  for (const spec of [{ when: { vector: "w", above: 1 } }, { preserve_norm: true }]) {
    for (const factor of [1, 2]) assert.equal(scaled(spec, factor), spec);
    const ofPreset = { preset: "p", ...spec };
    for (const factor of [1, 2]) assert.equal(scaled(ofPreset, factor, { p: preset }), ofPreset);
  }
});

test("probes with their stop rules go through their forms and back", () => {
  const spec = {
    probes: [
      { name: "a", vector: "v", blocks: "8-10", site: "mlp", measure: "dot", scope: { after: "<think>" }, after: true },
      { name: "b.c", vector: "w", measure: "probability", scope: "all", return: "none" }, { name: "d", vector: "w", measure: "cosine", return: "summary" },
    ],
    stop: [{ probe: "a", block: 9, above: -1, below: 2, for: 3 }, { probe: "b.c", below: 0.5 }],
  };
  const { forms, rest } = takeProbes({ ...spec, preset: "p" });
  assert.deepEqual(rest, { preset: "p" });
  assert.deepEqual(withProbes({}, forms.map(probeOf)), spec);
  assert.deepEqual(scaled(withProbes({ edits: [{ vector: "v" }] }, forms.map(probeOf)), 0), spec);
  assert.equal(withProbes(false, []), false);
});

test("what the form of a probe cannot show stays", () => {
  const odd = { name: "x", vector: { data: "AA" } };
  const second = { probe: "a", above: 7 };
  const { forms, rest } = takeProbes({ probes: [{ name: "a", vector: "v", measure: "cosine" }, odd], stop: [{ probe: "a", below: 1 }, second, { probe: "own", above: 0 }] });
  assert.deepEqual(rest, { probes: [odd], stop: [second, { probe: "own", above: 0 }] });
  const whole = withProbes(rest, forms.map(probeOf));
  assert.deepEqual(whole.probes.map((probe) => probe.name), ["a", "x"]);
  assert.deepEqual(whole.stop, [{ probe: "a", below: 1 }, second, { probe: "own", above: 0 }]);
  assert.equal(probeFields({ name: "a", vector: "v", scope: { odd: 1 } }), null);
  for (const [fields, field] of [[{}, "vector"], [{ vector: "v", name: "a b" }, "name"], [{ vector: "v", rule: "between", above: "1" }, "below"]]) {
    assert.throws(() => probeOf({ ...EMPTY_PROBE, ...fields }), (error) => error instanceof FieldError && error.field === field);
  }
});

test("what numbers mean", () => {
  const probes = [{ name: "a:b", vector: "v", site: "mlp", measure: "dot" }];
  assert.deepEqual(factsOf("a:b:14", probes, (...asked) => asked.join()), { measure: "dot", title: "v, block 14, mlp, dot", threshold: "v,14,dot" });
  assert.deepEqual(factsOf("other:3", probes, () => 1), { measure: "cosine", title: "other, block 3", threshold: null });
});

test("a server's limits become reasons", () => {
  const reasons = (choices) => Object.fromEntries(choices.filter(([, , reason]) => reason).map(([value, , reason]) => [value, reason]));
  const all = offersOf();
  assert.deepEqual([all.operations, all.sites, all.scopes, all.excepts].map(reasons), [{}, {}, {}, {}]);
  assert.deepEqual(Object.values(all.why), ["", "", "", ""]);
  const few = offersOf({
    operations: ["add"], sites: ["block", "mlp"], scopes: ["all", "prompt", "generation", "last_prompt_token", { start: "integer or null" }],
    limits: { max_triggers: 0, max_probes: 2, max_edits: 3, max_abs_scale: 5 },
  });
  assert.deepEqual(Object.keys(reasons(few.operations)), ["add_relative", "ablate", "clamp", "set", "feature", "low_rank", "rotate"]);
  assert.deepEqual(reasons(few.sites), { attn: "not armed: --steering-sites" });
  assert.deepEqual(Object.keys(reasons(few.scopes)), ["thinking", "answer", "tool_calls", "window"]);
  assert.match(reasons(few.excepts).tool_calls, /--tool-call-parser/);
  for (const reason of Object.values(few.why)) assert.match(reason, /only op add armed \(--steering-ops\)/);
  assert.deepEqual([few.maxEdits, few.maxProbes, few.maxRank, few.maxScale], [3, 2, Infinity, 5]);
  assert.match(offersOf({ operations: ["add", "set"], limits: { max_probes: 0, max_conditions: 0 } }).why.probes, /max_probes/);
  assert.deepEqual(offersOf({ operations: ["add", "newer"] }).operations.at(-1), ["newer", "newer", ""]);
});

test("an error's path leads to a control", () => {
  const edits = [{ op: "feature" }, { op: "rotate" }, { op: "set" }];
  const paths = {
    "steering.edits[1].blocks": { list: "edits", index: 1, field: "blocks" }, "steering.edits[1].to_degrees": { list: "edits", index: 1, field: "degrees" },
    "steering.edits[0].target": { list: "edits", index: 0, field: "amount" }, "steering.edits[2].target": { list: "edits", index: 2, field: "target" },
    "steering.edits[0].gate.vector": { list: "edits", index: 0, field: "gate_vector" }, "steering.edits[0].gate.min_dot": { list: "edits", index: 0, field: "gate_low" },
    "steering.edits[0].schedule.over": { list: "edits", index: 0, field: "over" },
    "steering.edits[0].scope": { list: "edits", index: 0, part: "scope", field: "scope" },
    "steering.edits[0].scope.except.after": { list: "edits", index: 0, part: "scope", field: "except_after" },
    "steering.edits[0].when.any[1].above": { list: "edits", index: 0, part: "when", at: 1, field: "above" },
    "steering.when.blocks": { list: "when", at: 0, field: "blocks" }, "steering.when": { list: "when", at: undefined, field: "mode" },
    "steering.probes[1].scope.until": { list: "probes", index: 1, part: "scope", field: "until" }, "steering.probes[0].name": { list: "probes", index: 0, field: "name" },
    "steering.stop[0].block": { list: "stop", index: 0, field: "stop_block" }, "steering.stop[0].above": { list: "stop", index: 0, field: "above" },
    "steering.preset": { list: "page", field: "preset" },
  };
  for (const [path, place] of Object.entries(paths)) assert.deepEqual(placeOf(path, edits), place, path);
  for (const path of ["", undefined, "model", "steering.capture.blocks", "steering"]) assert.equal(placeOf(path), null);
});

test("a file of rows is described for its operation, and its features are listed", () => {
  const features = { kind: "features", blocks: [8, 9], rows: { 8: [7, 4099], 9: [3] }, labels: { 8: { 7: "praise" } } };
  const said = (edit, vector, maxRank) => { const { text, warning } = describeDose(edit, vector, maxRank); return warning ? `! ${text}` : text; };
  const edit = { op: "feature", feature: [7, 4099], blocks: [8] };
  assert.equal(said({ ...edit, target: 2 }, features), "Sets features 7 (praise), 4099 to 2.");
  assert.equal(said({ ...edit, feature: 4099, add: 2 }, features), "Adds 2 to feature 4099.");
  assert.equal(said({ ...edit, feature: 7, scale: 0 }, features), "Removes feature 7 (praise).");
  assert.match(said({ ...edit, feature: 5, target: 2 }, features), /^! The file has no feature 5 at block 8/);
  assert.match(said({ ...edit, blocks: undefined, target: 2 }, features), /^! .*at blocks 8-9: enter one/);
  assert.match(said({ ...edit, target: 2 }, features, 1), /^! These are 2 features; the server takes at most 1/);
  assert.match(said({ op: "add", isPart: true }, features), /^! This is a set of features: choose/);
  assert.match(said({ op: "feature", isPart: true }, { kind: "directions", blocks: [8] }), /^! This is a control vector/);
  const lowRank = { kind: "low_rank", blocks: [3], rows: { 3: [0, 1, 2] } };
  assert.match(said({ op: "low_rank", scale: 1 }, lowRank), /^A low-rank edit of rank 3/);
  assert.match(said({ op: "low_rank", scale: 1 }, lowRank, 2), /^! This edit has rank 3/);
  assert.match(said({ op: "rotate", toward: "w", degrees: 20 }, { blocks: [3] }), /^Turns each token by 20°, toward w/);
  assert.deepEqual(rowsOf("8", features), [{ row: 7, label: "praise" }, { row: 4099, label: "" }]);
  assert.deepEqual(rowsOf("", features).map(({ row }) => row), [3, 7, 4099]);
  assert.deepEqual(rowsOf("8-", features).map(({ row }) => row), [3, 7, 4099]);
  assert.deepEqual(rowsOf("", { kind: "directions" }), []);
});
