// The answers, side by side: their turns, as formatted text or as tokens with the probe's numbers and a chart.

import { draw, levelOf, LEVELS, scaleOf, shown, summaryOf, valueOf } from "./chart.js";
import { $, make } from "./dom.js";
import { parse, render } from "./markdown.js";

/**
 * An empty turn. label: of its steering, where that is not what the column's heading says.
 * state: "running", "done", "half" (cut off or stopped) or "failed" (nothing came).
 */
export const newTurn = (prompt, label = "") => ({ prompt, label, segments: [], state: "running", note: "", finish: null, report: null });

export const textOf = (turn) => turn.segments.filter((each) => !each.thinking).map((each) => each.text).join("");

/** Numbers by token, in order. */
const numbersOf = (turn) => turn.segments.flatMap((each) => each.numbers ?? []);

/** Add what a chunk brought. A token without text (a part of a character, the end) keeps its number with its neighbour. */
export function addPart(turn, part) {
  const numbers = part.numbers ? Object.values(part.numbers)[0] : null;
  const thinking = part.thinking !== "" && part.text === "";
  if (part.thinking && part.text) turn.segments.push({ text: part.thinking, thinking: true, numbers: null });
  const text = thinking ? part.thinking : part.text;
  const last = turn.segments.at(-1);
  if (numbers || text) {
    if (last && last.text === "") {
      Object.assign(last, { text, thinking, numbers: [...(last.numbers ?? []), ...(numbers ?? [])] });
    } else turn.segments.push({ text, thinking, numbers });
  }
  turn.finish = part.finish ?? turn.finish;
  turn.stopReason = part.stopReason ?? turn.stopReason;
  turn.report = part.report ?? turn.report;
}

/** Why an answer ended, where that is worth a word. */
export function endOf(turn) {
  if (turn.finish === "length") return "Ended at the limit of tokens.";
  if (String(turn.stopReason ?? "").startsWith("probe:")) return "Ended by the probe's rule.";
  return "";
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

class TurnView {
  constructor(turn) {
    this.turn = turn;
    this.marked = null;
    this.body = make("div", { className: "body" });
    this.readout = make("p", { className: "readout", hidden: true, role: "status" });
    this.chart = make("div", { className: "chart-box" });
    this.note = make("p", { className: "note", hidden: true });
    this.applied = make("details", { className: "applied hint", hidden: true });
    const asked = make("p", { className: "asked" }, make("span", { className: "hidden" }, "Prompt: "), turn.prompt);
    const changed = turn.label ? [make("p", { className: "hint" }, `From here: ${turn.label}`)] : [];
    this.root = make("div", { className: "turn" }, asked, ...changed, this.body, this.note, this.readout, this.chart, this.applied);
    this.drawn = "";
  }

  draw(view, scale, beside, isThreshold) {
    const { turn } = this;
    this.shared = { scale, beside, isThreshold };
    const asTokens = view === "tokens" && turn.segments.some((each) => each.numbers);
    // Formatting a long answer again for each token costs more than its text.
    const state = `${view} ${asTokens} ${turn.segments.length} ${turn.segments.at(-1)?.text.length}`;
    if (asTokens) this.#drawTokens(scale);
    else if (state !== this.drawn) this.#drawText(view);
    this.drawn = state;
    this.#drawChart();
    const end = turn.state === "running" ? "" : turn.note || endOf(turn);
    this.note.textContent = end;
    this.note.hidden = !end;
    this.root.dataset.state = turn.state;
    this.note.classList.toggle("half", turn.state === "half" || turn.state === "failed");
    if (turn.report && this.applied.hidden) {
      this.applied.hidden = false;
      this.applied.append(make("summary", {}, appliedText(turn.report) || "Not steered; watched by the probe"), make("code", {}, turn.report.digest));
    }
  }

  #drawText(view) {
    const thinking = this.turn.segments.filter((each) => each.thinking).map((each) => each.text).join("");
    const text = textOf(this.turn);
    const parts = thinking ? [make("details", { className: "thinking" }, make("summary", {}, "Reasoning"), make("p", {}, thinking))] : [];
    if (view === "markdown") parts.push(...render(parse(text), document));
    else parts.push(make("p", { className: "written" }, text));
    this.body.className = `body ${view === "markdown" ? "formatted" : ""}`;
    this.body.removeAttribute("tabindex");
    this.body.removeAttribute("role");
    this.body.removeAttribute("aria-label");
    const opened = this.body.querySelector(".thinking")?.open;
    this.body.replaceChildren(...parts);
    if (opened) this.body.querySelector(".thinking").open = true;
  }

  #drawTokens(scale) {
    const { segments } = this.turn;
    if (!this.body.classList.contains("tokens")) {
      this.body.className = "body tokens";
      this.body.tabIndex = 0;
      this.body.setAttribute("role", "group");
      this.body.setAttribute("aria-label", "Tokens with the probe's numbers. The arrow keys move between tokens.");
      this.body.replaceChildren();
      this.body.onkeydown = (event) => this.#key(event);
      this.body.onpointerover = (event) => { if (event.target.dataset.at) this.mark(Number(event.target.dataset.at)); };
      this.body.onfocus = () => this.mark(this.marked ?? 0);
    }
    while (this.body.children.length < segments.length) {
      const token = make("span", { className: "token" });
      token.dataset.at = this.body.children.length;
      this.body.append(token);
    }
    segments.forEach((segment, at) => {
      const token = this.body.children[at];
      const text = segment.text || " end";
      if (token.textContent !== text) token.textContent = text;
      const value = valueOf(segment);
      const level = levelOf(value, scale);
      const marked = at === this.marked ? " marked" : "";
      token.className = `token ${level === null ? "none" : `level${level}`}${segment.thinking ? " thought" : ""}${segment.text ? "" : " end"}${marked}`;
      token.title = describe(segment);
    });
  }

  #drawChart() {
    const { scale, beside, isThreshold } = this.shared;
    const numbers = numbersOf(this.turn);
    if (!scale || !numbers.length) {
      this.chart.replaceChildren();
      return;
    }
    const before = this.turn.segments.slice(0, (this.marked ?? -1) + 1).flatMap((each) => each.numbers ?? []).length;
    const marked = this.marked === null || !before ? null : before - 1;
    const width = Math.max(160, Math.min(480, this.chart.clientWidth || 320));
    this.chart.replaceChildren(draw(numbers, scale, { beside, isThreshold, marked, width }), make("p", { className: "hint" }, summaryOf(numbers)));
  }

  /** Show the number of one token, in words and in the chart. */
  mark(at) {
    this.body.children[this.marked]?.classList.remove("marked");
    this.marked = at;
    this.body.children[at]?.classList.add("marked");
    this.readout.hidden = false;
    this.readout.textContent = `Token ${at + 1}: ${describe(this.turn.segments[at])}`;
    this.#drawChart();
  }

  #key(event) {
    const last = this.turn.segments.length - 1;
    const to = { ArrowRight: (this.marked ?? -1) + 1, ArrowLeft: (this.marked ?? 1) - 1, Home: 0, End: last }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    this.mark(Math.max(0, Math.min(last, to)));
  }
}

function describe(segment) {
  const text = segment.text ? `“${segment.text}”` : "end of the answer";
  const numbers = (segment.numbers ?? []).map(shown);
  if (!numbers.length) return `${text}, no number`;
  return `${text} ${numbers.at(-1)}${numbers.length > 1 ? ` (${numbers.join(", ")})` : ""}`;
}

/** All columns of a run. */
export class Columns {
  constructor() {
    this.columns = [];
    this.probe = { threshold: null, measure: "cosine", title: "" };
    this.waiting = false;
  }

  /** columns: [{ factor, label, turns }]. probe: { threshold, measure, title } of their numbers. */
  show(columns, probe) {
    this.columns = columns;
    this.probe = probe;
    this.views = columns.map((column) => {
      const turns = make("div", { className: "turns" });
      const root = make("article", { className: column.factor === 0 ? "plain" : "steered" },
        make("h3", {}, column.label), turns);
      return { root, turns, turnViews: [] };
    });
    $("columns").replaceChildren(...this.views.map((view) => view.root));
    $("columns").dataset.count = columns.length;
    $("welcome").hidden = columns.length > 0;
    this.draw();
  }

  /** Draw at the next frame, however often this is called before. */
  drawSoon() {
    if (this.waiting) return;
    this.waiting = true;
    // A tab in the background gets no frames.
    const later = document.hidden ? (run) => setTimeout(run, 250) : requestAnimationFrame;
    later(() => { this.waiting = false; this.draw(); });
  }

  draw() {
    const view = $("view").value;
    const values = this.columns.flatMap((column) => column.turns.flatMap(numbersOf));
    const scale = scaleOf(values, this.probe);
    const plain = this.columns.find((column) => column.factor === 0);
    this.columns.forEach((column, at) => {
      const { turns, turnViews } = this.views[at];
      column.turns.forEach((turn, number) => {
        if (!turnViews[number]) {
          turnViews[number] = new TurnView(turn);
          turns.append(turnViews[number].root);
        }
        const beside = plain && plain !== column && plain.turns[number] ? numbersOf(plain.turns[number]) : null;
        turnViews[number].draw(view, scale, beside, this.probe.threshold !== null);
      });
    });
    this.#drawLegend(view === "tokens" ? scale : null);
  }

  #drawLegend(scale) {
    $("legend").hidden = !scale;
    if (!scale) return;
    const swatches = Array.from({ length: 2 * LEVELS + 1 }, (_, at) => make("span", { className: `token level${at - LEVELS}`, "aria-hidden": "true" }));
    $("legend").replaceChildren(
      make("span", {}, this.probe.title), make("span", {}, shown(scale.low)), make("span", { className: "swatches" }, ...swatches),
      make("span", {}, shown(scale.high)),
      make("span", { className: "hint" }, `middle ${shown(scale.middle)}${this.probe.threshold === null ? "" : ", the probe's threshold"}; point at a token for its number`));
  }
}
