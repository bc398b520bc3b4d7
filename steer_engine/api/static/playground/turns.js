// A turn of a conversation: its text, piece by piece, with the numbers of the probes. Pure functions.

import { shown } from "./chart.js";
import { seriesText } from "./probe_spec.js";

/**
 * An empty turn. label: of its steering, where that is not what the column's heading says.
 * state: "running", "done", "half" (cut off or stopped) or "failed" (nothing came).
 * segments: [{ text, thinking, numbers }], numbers: series -> those of the segment's tokens, or null.
 * summaries, promptNumbers: by series, of probes that give a summary, and of tokens of the prompt.
 */
export const newTurn = (prompt, label = "") => ({
  prompt, label, segments: [], state: "running", note: "", finish: null, report: null, summaries: {}, promptNumbers: {},
});

export const textOf = (turn) => turn.segments.filter((each) => !each.thinking).map((each) => each.text).join("");

/** Numbers of a series by token, in order. */
export const numbersOf = (turn, key) => turn.segments.flatMap((each) => each.numbers?.[key] ?? []);

/** The series of some turns, each once. */
export const seriesOf = (turns) => [...new Set(turns.flatMap((turn) => turn.segments.flatMap((each) => Object.keys(each.numbers ?? {}))))];

/** The number of a piece of text: that of its last token. null if there is none. */
export const valueOf = (segment, key) => segment.numbers?.[key]?.findLast((value) => value !== null) ?? null;

/** Add what a chunk brought. A token without text (a part of a character, the end) keeps its number with its neighbour. */
export function addPart(turn, part) {
  const { numbers } = part;
  const thinking = part.thinking !== "" && part.text === "";
  if (part.thinking && part.text) turn.segments.push({ text: part.thinking, thinking: true, numbers: null });
  const text = thinking ? part.thinking : part.text;
  const last = turn.segments.at(-1);
  if (numbers || text) {
    if (last && last.text === "") Object.assign(last, { text, thinking, numbers: joined(last.numbers, numbers) });
    else turn.segments.push({ text, thinking, numbers });
  }
  turn.finish = part.finish ?? turn.finish;
  turn.stopReason = part.stopReason ?? turn.stopReason;
  turn.report = part.report ?? turn.report;
  turn.summaries = { ...turn.summaries, ...part.summaries };
  turn.promptNumbers = joined(turn.promptNumbers, part.promptNumbers) ?? {};
}

/** The numbers of two parts, one after the other, by series. */
function joined(before, after) {
  if (!before || !after) return before || after || null;
  const keys = new Set([...Object.keys(before), ...Object.keys(after)]);
  return Object.fromEntries([...keys].map((key) => [key, [...(before[key] ?? []), ...(after[key] ?? [])]]));
}

/** Why an answer ended, where that is worth a word. */
export function endOf(turn) {
  if (turn.finish === "length") return "Ended at the limit of tokens.";
  const [, probe] = /^probe:(.*)$/s.exec(turn.stopReason ?? "") ?? [];
  return probe === undefined ? "" : `Ended by the rule of the probe ${probe}.`;
}

/** What the server applied, in words. */
export function appliedText(report) {
  if (!report?.edits?.length) return "";
  const tokens = report.edits.map((edit) => `${edit.name ?? edit.vector.slice(0, 14)}: ${edit.applied_tokens ?? "?"} tokens`);
  const decided = (report.conditions ?? []).map((each) => {
    const value = [each.value].flat()[0];
    return `condition ${[each.held].flat()[0] ? "held" : "did not hold"} (${shown(value ?? null)})`;
  });
  return `Steered ${[...tokens, ...decided].join("; ")}`;
}

/** Lines about probes that gave a summary. */
export const summaryLines = (turn) => Object.entries(turn.summaries ?? {}).map(([key, { mean, max, tokens }]) =>
  `${seriesText(key)}: mean ${shown(mean)}, highest ${shown(max)} of ${tokens} tokens`);

/** A segment in words, with its numbers of a series. */
export function describe(segment, key) {
  const text = segment.text ? `“${segment.text}”` : "end of the answer";
  const numbers = (segment.numbers?.[key] ?? []).map(shown);
  if (!numbers.length) return `${text}, no number`;
  return `${text} ${numbers.at(-1)}${numbers.length > 1 ? ` (${numbers.join(", ")})` : ""}`;
}
