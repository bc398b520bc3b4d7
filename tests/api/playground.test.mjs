// The playground's modules that need no page: sizes, numbers, answers, links, Markdown. `test_playground_modules.py` runs it.

import assert from "node:assert/strict";
import { test } from "node:test";

import { levelOf, linesOf, scaleOf, shown, summaryOf } from "./chart.js";
import { chosenBlocks, describeDose, doseOf, probeStart, ranges, rangeOf, scaleFor, startOf, thresholdOf } from "./dose.js";
import { inline, parse } from "./markdown.js";
import { PROBE } from "./probe_spec.js";
import { DEFAULTS, bodyOf, curl, decodeLink, encodeLink, factorsOf, literal, node, python } from "./request.js";
import { eventsOf, explain, partOf } from "./server.js";
import { addPart, appliedText, endOf, newTurn, seriesOf, textOf, valueOf } from "./turns.js";

const VECTOR = {
  blocks: [8, 9, 10, 11], norms: { 8: 10, 9: 10, 10: 20, 11: 10 }, residual_norms: { 8: 100, 9: 100, 10: 100, 11: 100 },
  suggested: { blocks: "8-10", scale: 0.25, unit: "vector", scope: "all" }, probe: null,
};

test("the size of an edit in residual norms", () => {
  assert.deepEqual(doseOf({ scale: -0.5 }, VECTOR), { total: 0.25, largest: 0.1, block: 10, blocks: 4 });
  assert.deepEqual(doseOf({ scale: 0.2, unit: "residual", blocks: [8] }, VECTOR), { total: 0.2, largest: 0.2, block: 8, blocks: 1 });
  assert.equal(doseOf({ scale: 1 }, { ...VECTOR, residual_norms: {} }), null);
  assert.equal(describeDose({ scale: 1 }, VECTOR).text, "Adds 50 % of the residual norm over 4 blocks; at most 20 %, at block 10.");
  assert.deepEqual([1, -1, 1.1, -1.1].map((scale) => describeDose({ scale }, VECTOR).warning), [false, false, true, true]);
  assert.match(describeDose({ scale: 1.1 }, VECTOR).text, /more than half/);
  assert.match(describeDose({ scale: 1 }, { ...VECTOR, residual_norms: {} }).text, /unknown/);
});

test("strength and slider begin where the vector suggests", () => {
  assert.deepEqual(startOf(VECTOR), { blocks: "8-10", unit: "vector", scale: "0.25", scope: "all" });
  assert.equal(startOf(VECTOR, [9, 10, 11]).blocks, "9-10");
  const bare = { ...VECTOR, suggested: null };
  assert.deepEqual(startOf(bare), { blocks: "", unit: "vector", scale: "0.75", scope: "all" });
  assert.equal(startOf({ ...bare, residual_norms: {} }).scale, "1");
  assert.deepEqual(rangeOf({ scale: 0.25 }, VECTOR), { limit: 2, step: 0.02 });
  assert.equal(rangeOf({ scale: 60 }, VECTOR).limit, 60);
  assert.equal(rangeOf({ scale: 1 }, { ...VECTOR, residual_norms: {} }, 3).limit, 3);
  assert.equal(rangeOf({ op: "ablate", scale: 1 }, VECTOR).limit, 2);
  assert.deepEqual(chosenBlocks("9-30", VECTOR), [9, 10, 11]);
  assert.deepEqual([ranges([8, 9, 10]), ranges([8, 10]), ranges([8])], ["8-10", "8, 10", "8"]);
});

test("a set of rows is told apart from a vector", () => {
  const rows = { kind: "features", blocks: [8], rows: { 8: [7] }, residual_norms: { 8: 100 } };
  assert.deepEqual(describeDose({ scale: 1 }, rows), { text: 'This is a set of features: choose the operation "change features".', warning: true });
  assert.equal(startOf(rows).scale, "1");
  assert.equal(rangeOf({ scale: 1 }, rows).limit, 4);
  assert.equal(probeStart(rows).block, 8);
  assert.equal(describeDose({ scale: 1 }, { ...VECTOR, kind: "directions" }).warning, false);
});

test("another operation or unit begins with a strength of its own", () => {
  assert.equal(scaleFor({ op: "ablate" }, VECTOR), "1");
  assert.equal(scaleFor({ op: "add" }, VECTOR), "0.25");
  assert.equal(scaleFor({ op: "add", unit: "residual", blocks: [8, 9, 10] }, VECTOR), "0.13");
  assert.equal(scaleFor({ op: "add_relative" }, VECTOR), "0.094");
  assert.equal(scaleFor({ op: "add" }, null), "1");
});

test("a probe begins at the best block of a trained one", () => {
  const probe = { blocks: { 9: { auroc: 0.8, threshold: 2, platt: { a: 1, b: -2 } }, 10: { auroc: 0.9, threshold: 3 } }, at: "x" };
  const trained = { ...VECTOR, probe };
  assert.deepEqual(probeStart(trained), { block: 10, measure: "dot" });
  assert.deepEqual(probeStart(trained, [9]), { block: 9, measure: "probability" });
  assert.deepEqual(probeStart(VECTOR), { block: 9, measure: "cosine" });
  assert.equal(thresholdOf(trained, 10, "dot"), 3);
  assert.equal(thresholdOf(trained, 9, "probability"), 0.5);
  assert.equal(thresholdOf(trained, 9, "cosine"), null);
  assert.equal(thresholdOf(VECTOR, 9, "dot"), null);
});

test("colours have one scale, and its middle is the threshold", () => {
  const scale = scaleOf([0, 1, null, 3]);
  assert.deepEqual(scale, { low: 0, middle: 1.5, high: 3 });
  assert.deepEqual([0, 1.5, 3, null, 99].map((value) => levelOf(value, scale)), [-4, 0, 4, null, 4]);
  assert.deepEqual(scaleOf([1, 2], { threshold: 5 }), { low: 1, middle: 5, high: 5 });
  assert.deepEqual(scaleOf([0.2], { measure: "probability" }), { low: 0, middle: 0.5, high: 1 });
  assert.equal(scaleOf([null]), null);
  assert.equal(levelOf(5, scaleOf([5, 5])), 0);
});

test("a chart has a gap where a token has no number", () => {
  const box = { width: 100, height: 10 };
  const lines = linesOf([0, 1, null, 3], { low: 0, middle: 1, high: 3 }, box);
  assert.deepEqual(lines.map((line) => line.map(([x]) => Math.round(x))), [[0, 33], [100]]);
  assert.equal(lines[1][0][1], 0);
  assert.equal(valueOf({ numbers: { "p:3": [1, null], "q:3": [2] } }, "p:3"), 1);
  assert.equal(summaryOf([1, null, 3]), "Mean 2.00, lowest 1.00, highest 3.00 of 2 tokens.");
  assert.deepEqual([shown(-0.0391), shown(null), shown(1e-9)], ["−0.0391", "–", "1.0e-9"]);
});

test("a scale and a summary take more numbers than a call takes arguments", () => {
  const many = Array.from({ length: 500_000 }, (_, number) => number % 100);
  assert.deepEqual(scaleOf(many), { low: 0, middle: 49.5, high: 99 });
  assert.equal(summaryOf(many), "Mean 49.5, lowest 0.00, highest 99.0 of 500000 tokens.");
});

test("numbers stay beside the text of their tokens", () => {
  const turn = newTurn("p");
  const part = (text, numbers, more = {}) => ({ text, thinking: "", numbers: numbers && { "p:14": numbers, "q:3": numbers.map((value) => -value) }, finish: null, stopReason: null, report: null, ...more });
  addPart(turn, part("", null));
  addPart(turn, part("Good", [1]));
  addPart(turn, part("", [2])); // the first bytes of a character
  addPart(turn, part("é", [3]));
  addPart(turn, part(" and more", [4, 5]));
  addPart(turn, part("", [6], { finish: "stop", stopReason: "probe:mood", summaries: { "s:1": { mean: 1, max: 2, tokens: 3 } }, promptNumbers: { "p:14": [9] }, report: { digest: "d", edits: [] } }));
  assert.deepEqual(turn.segments.map((each) => [each.text, each.numbers["p:14"]]), [["Good", [1]], ["é", [2, 3]], [" and more", [4, 5]], ["", [6]]]);
  assert.deepEqual(turn.segments[1].numbers["q:3"], [-2, -3]);
  assert.deepEqual([seriesOf([turn]), turn.summaries["s:1"].max, turn.promptNumbers], [["p:14", "q:3"], 2, { "p:14": [9] }]);
  assert.equal(textOf(turn), "Goodé and more");
  assert.equal(endOf(turn), "Ended by the rule of the probe mood.");
  assert.equal(endOf({ finish: "length" }), "Ended at the limit of tokens.");
  const report = { edits: [{ name: "v", applied_tokens: 7 }], conditions: [{ value: [0.5], held: [true] }] };
  assert.equal(appliedText(report), "Steered v: 7 tokens; condition held (0.500)");
});

test("reasoning is kept apart from the answer", () => {
  const turn = newTurn("p");
  for (const [thinking, text] of [["hm", ""], ["!", "So"], ["", " yes"]]) addPart(turn, { text, thinking, numbers: null });
  assert.equal(textOf(turn), "So yes");
  assert.equal(turn.segments.filter((each) => each.thinking).map((each) => each.text).join(""), "hm!");
});

test("events of a stream, cut anywhere", () => {
  const whole = 'data: {"a": "x\\n\\ny"}\r\n\r\n: ping\n\ndata: [DONE]\n\n';
  for (let cut = 0; cut <= whole.length; cut += 1) {
    const [first, rest] = eventsOf(whole.slice(0, cut));
    const [second, left] = eventsOf(rest + whole.slice(cut));
    assert.deepEqual([...first, ...second], [{ a: "x\n\ny" }, null]);
    assert.equal(left, "");
  }
});

test("what a chunk brings", () => {
  const chunk = { choices: [{ delta: { content: "hi" }, finish_reason: "stop", stop_reason: "probe:x", steering: { probes: { p: { 14: [1] } } } }], steering: { digest: "d" } };
  const told = { text: "hi", thinking: "", numbers: { "p:14": [1] }, finish: "stop", stopReason: "probe:x", report: { digest: "d" } };
  assert.deepEqual(partOf(chunk), { ...told, summaries: {}, promptNumbers: null });
  assert.equal(partOf({ choices: [{ text: "t" }] }).text, "t");
  assert.equal(partOf({ choices: [], usage: {} }).text, "");
  const several = { probes: { "a:b": { 3: [1], 4: [2] }, s: { 5: { mean: 1, max: 2, tokens: 3 } } }, prompt_probes: { "a:b": { 3: [7, 8] } } };
  const part = partOf({ choices: [{ text: "t", steering: several }] });
  assert.deepEqual([part.numbers, part.summaries, part.promptNumbers],
    [{ "a:b:3": [1], "a:b:4": [2] }, { "s:5": { mean: 1, max: 2, tokens: 3 } }, { "a:b:3": [7, 8] }]);
});

test("errors say what happened", () => {
  assert.equal(explain(401, {}, { hasKey: true }).kind, "key-wrong");
  assert.equal(explain(401, { error: "Unauthorized" }).kind, "key-missing");
  assert.match(explain(503, { error: { message: "Full." } }, { retryAfter: "2" }).message, /Full\. Try again in 2 s\./);
  const refused = explain(400, { error: { message: "No.", param: "steering.edits[0].scale" } });
  assert.deepEqual([refused.kind, refused.message, refused.param], ["refused", "No.", "steering.edits[0].scale"]);
  assert.match(explain(500, {}).message, /status 500/);
});

test("markdown becomes a tree", () => {
  assert.deepEqual(inline("a **b _c_** `d*`"), ["a ", { tag: "strong", children: ["b ", { tag: "em", children: ["c"] }] }, " ", { tag: "code", text: "d*" }]);
  assert.deepEqual(inline("snake_case_name, 2*3*4, \\*kept\\*, * alone"), ["snake_case_name, 2*3*4, *kept*, * alone"]);
  assert.deepEqual(parse("# T\n\none\ntwo").map((block) => block.tag), ["h4", "p"]);
  const [list] = parse("1. a\n   - b\n2. c");
  assert.equal(list.tag, "ol");
  assert.equal(list.children[0].children.at(-1).tag, "ul");
  assert.equal(list.children.length, 2);
  assert.deepEqual(parse("```js\na < b\n").map((block) => block.children[0].text), ["a < b\n"]);
  assert.deepEqual(parse("| a | b |\n|---|---|\n| 1 | 2 |")[0].children.map((part) => part.tag), ["thead", "tbody"]);
  assert.deepEqual(parse("> q\n\n---").map((block) => block.tag), ["blockquote", "hr"]);
});

test("markup and dangerous links stay text", () => {
  const hostile = ["<img src=x onerror=alert(1)>", "<script>alert(1)</script>", "[x](javascript:alert(1))", "[x](data:text/html,y)"];
  for (const text of hostile) assert.deepEqual(inline(text), [text]);
  assert.deepEqual(inline("[x](https://e.org/a)"), [{ tag: "a", href: "https://e.org/a", children: ["x"] }]);
});

test("long and unbalanced text is parsed in little time", () => {
  const began = process.cpuUsage();
  for (const text of ["*".repeat(3000), "[".repeat(20000), "`".repeat(3000), "_a".repeat(3000), "_a ".repeat(10000), "word ".repeat(20000),
    "- a\n".repeat(3000), `a|b\n--|${" ".repeat(3000)}x`, ">".repeat(20000)]) parse(text);
  // Of this process: other programs may need the processor too.
  assert.ok(process.cpuUsage(began).user < 5_000_000);
  let [quote, depth] = [parse(">".repeat(100))[0], 0];
  for (; quote.tag === "blockquote"; [quote] = quote.children) depth += 1;
  assert.deepEqual([depth, quote], [20, { tag: "p", children: [">".repeat(80)] }]);
});

test("a request has what differs from the server's defaults", () => {
  const settings = { ...DEFAULTS, system: "Be brief.", prompt: "Hi", seed: "7", frequency: "0.5" };
  assert.deepEqual(bodyOf(settings, "m", [{ prompt: "a", answer: "b" }]), {
    model: "m", max_tokens: 80, temperature: 0, seed: 7, repetition_penalty: 1.1, frequency_penalty: 0.5,
    messages: [{ role: "system", content: "Be brief." }, { role: "user", content: "a" }, { role: "assistant", content: "b" }, { role: "user", content: "Hi" }],
  });
  assert.deepEqual(bodyOf({ ...settings, mode: "text" }, "m").prompt, "Hi");
  assert.throws(() => bodyOf({ ...settings, seed: "1.5" }, "m"), /whole number/);
  assert.deepEqual(factorsOf("0.5, 1 2,2"), [0.5, 1, 2]);
  assert.throws(() => factorsOf("much"), /1 to 8 numbers/);
});

test("a link carries everything, and the answers on wish", () => {
  const steering = { edits: [{ vector: "v", op: "rotate", toward: "w", degrees: 20, site: "mlp" }], probes: [{ name: "p", vector: "w", scope: "all" }], stop: [{ probe: "p", above: 1 }] };
  const state = { settings: { ...DEFAULTS, prompt: "50 % & #?", seed: "3" }, steering };
  const opened = decodeLink(`#${encodeLink(state)}`);
  assert.deepEqual(opened, { ...state, columns: null });
  const segments = [{ text: "a", numbers: { "p:1": [0.123456], "q:2": [null, 1] }, thinking: false }, { text: "b", numbers: null, thinking: true }, { text: "c", numbers: { "p:1": [2] }, thinking: false }];
  const columns = [{ factor: 0, label: "Plain", turns: [{ prompt: "p", note: "", segments }] }];
  const carried = decodeLink(encodeLink(state, columns)).columns[0].turns[0];
  assert.deepEqual(carried.segments, [
    { text: "a", numbers: { "p:1": [0.1235], "q:2": [null, 1] }, thinking: false }, { text: "b", numbers: null, thinking: true },
    { text: "c", numbers: { "p:1": [2], "q:2": [] }, thinking: false },
  ]);
});

test("links of before are read, and damaged ones are not", () => {
  const before = decodeLink(encodeURIComponent(JSON.stringify({ prompt: "x", tokens: 6, temperature: 0, steering: { preset: "calm" } })));
  assert.deepEqual([before.settings.tokens, before.steering.preset], ["6", "calm"]);
  const probe = { vector: "w", block: "14", measure: "dot", after: true, rule: "below", bound: "-0.1", tokens: "2" };
  const watched = decodeLink(encodeURIComponent(JSON.stringify({ probe, columns: [{ factor: 0, turns: [{ segments: [["a", [1, null]]] }] }] })));
  assert.deepEqual(watched.steering, {
    probes: [{ name: PROBE, vector: "w", blocks: [14], measure: "dot", after: true }], stop: [{ probe: PROBE, below: -0.1, for: 2 }],
  });
  assert.deepEqual(watched.columns[0].turns[0].segments[0].numbers, { "playground:14": [1, null] });
  for (const text of ["", "%", "null", "3", "[]", '"x"']) assert.equal(decodeLink(text), null, text);
  const odd = decodeLink('{"steering": {"edits": [null, 3, {"vector": "v"}]}, "probe": 3, "columns": [null, {"factor": 1, "turns": [{"segments": [["a", ["x"]], 3]}]}], "mode": "x"}');
  assert.deepEqual(odd.steering.edits, [{ vector: "v" }]);
  assert.equal(odd.settings.mode, "chat");
  assert.deepEqual(odd.columns[0].turns[0].segments, [{ text: "a", numbers: null, thinking: false }]);
});

test("copied code", () => {
  const body = { model: "m", messages: [{ role: "user", content: "it's\n\"x\"" }], max_tokens: 5, repetition_penalty: 1.1, steering: { edits: [{ vector: "v", scale: 1 }], preserve_norm: true } };
  assert.match(curl("http://h/", "v1/chat/completions", body, true), /it'\\''s/);
  assert.match(curl("http://h/", "v1/chat/completions", body, true), /\$API_KEY/);
  assert.doesNotMatch(curl("http://h/", "v1/chat/completions", body, false), /API_KEY/);
  assert.match(python("http://h/", "v1/chat/completions", body), /extra_body=\{"repetition_penalty": 1.1, "steering": .*"preserve_norm": True/);
  const watched = (probe) => python("http://h/", "v1/chat/completions", { ...body, steering: { probes: [probe] } });
  assert.match(watched({ name: "p" }), /print\(answer.choices\[0\].steering\)/);
  assert.doesNotMatch(watched({ name: "p", return: "none" }), /choices\[0\].steering/); // the answer has none
  assert.match(node("http://h/", "v1/chat/completions", body, false), /await fetch\("http:\/\/h\/v1\/chat\/completions"/);
  assert.equal(literal([null, true, "x", 1.5]), '[None, True, "x", 1.5]');
});
