// The answers, side by side: their turns, as formatted text or as tokens with the probe's numbers and a chart.

import { draw, levelOf, LEVELS, scaleOf, shown, summaryOf } from "./chart.js";
import { $, make, setChoices } from "./dom.js";
import { parse, render } from "./markdown.js";
import { seriesText } from "./probe_spec.js";
import { appliedText, describe, endOf, numbersOf, seriesOf, summaryLines, textOf, valueOf } from "./turns.js";

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

  /** key: of the series that is drawn; null if there is none. */
  draw(view, { key, scale, beside, isThreshold }) {
    const { turn } = this;
    const isOther = key !== this.shared?.key;
    this.shared = { key, scale, beside, isThreshold };
    const asTokens = view === "tokens" && turn.segments.some((each) => each.numbers?.[key]);
    // Formatting a long answer again for each token costs more than its text.
    const state = `${view} ${asTokens} ${turn.segments.length} ${turn.segments.at(-1)?.text.length}`;
    if (asTokens) this.#drawTokens(scale);
    else if (state !== this.drawn) this.#drawText(view);
    this.drawn = state;
    if (isOther && this.marked !== null) this.#read();
    this.#drawChart();
    const end = turn.state === "running" ? "" : turn.note || endOf(turn);
    this.note.textContent = end;
    this.note.hidden = !end;
    this.root.dataset.state = turn.state;
    this.note.classList.toggle("half", turn.state === "half" || turn.state === "failed");
    if (turn.report && this.applied.hidden) {
      this.applied.hidden = false;
      const lines = summaryLines(turn).map((line) => make("p", {}, line));
      this.applied.append(make("summary", {}, appliedText(turn.report) || "Not steered; watched by the probe"), ...lines, make("code", {}, turn.report.digest));
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
      const value = valueOf(segment, this.shared.key);
      const level = levelOf(value, scale);
      const marked = at === this.marked ? " marked" : "";
      token.className = `token ${level === null ? "none" : `level${level}`}${segment.thinking ? " thought" : ""}${segment.text ? "" : " end"}${marked}`;
      token.title = describe(segment, this.shared.key);
    });
  }

  #drawChart() {
    const { key, scale, beside, isThreshold } = this.shared;
    const numbers = numbersOf(this.turn, key);
    if (!scale || !numbers.length) {
      this.chart.replaceChildren();
      return;
    }
    const before = this.turn.segments.slice(0, (this.marked ?? -1) + 1).flatMap((each) => each.numbers?.[key] ?? []).length;
    const marked = this.marked === null || !before ? null : before - 1;
    const width = Math.max(160, Math.min(480, this.chart.clientWidth || 320));
    const ofPrompt = this.turn.promptNumbers?.[key];
    const lines = [summaryOf(numbers), ...(ofPrompt?.length ? [`On the prompt: ${summaryOf(ofPrompt)}`] : [])];
    this.chart.replaceChildren(draw(numbers, scale, { beside, isThreshold, marked, width }), ...lines.map((line) => make("p", { className: "hint" }, line)));
  }

  /** Show the number of one token, in words and in the chart. */
  mark(at) {
    this.body.children[this.marked]?.classList.remove("marked");
    this.marked = at;
    this.body.children[at]?.classList.add("marked");
    this.#read();
    this.#drawChart();
  }

  #read() {
    this.readout.hidden = false;
    this.readout.textContent = `Token ${this.marked + 1}: ${describe(this.turn.segments[this.marked], this.shared.key)}`;
  }

  #key(event) {
    const last = this.turn.segments.length - 1;
    const to = { ArrowRight: (this.marked ?? -1) + 1, ArrowLeft: (this.marked ?? 1) - 1, Home: 0, End: last }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    this.mark(Math.max(0, Math.min(last, to)));
  }
}

/** All columns of a run. */
export class Columns {
  constructor() {
    this.columns = [];
    this.factsOf = () => ({ threshold: null, measure: "cosine", title: "" });
    this.waiting = false;
    $("series").addEventListener("change", () => this.draw());
  }

  /** columns: [{ factor, label, turns }]. factsOf: series -> { threshold, measure, title } of its numbers. */
  show(columns, factsOf) {
    this.columns = columns;
    this.factsOf = factsOf;
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
    const key = this.#chosenSeries();
    const facts = key === null ? null : this.factsOf(key);
    const values = this.columns.flatMap((column) => column.turns.flatMap((turn) => numbersOf(turn, key)));
    const scale = facts && scaleOf(values, facts);
    const plain = this.columns.find((column) => column.factor === 0);
    this.columns.forEach((column, at) => {
      const { turns, turnViews } = this.views[at];
      column.turns.forEach((turn, number) => {
        if (!turnViews[number]) {
          turnViews[number] = new TurnView(turn);
          turns.append(turnViews[number].root);
        }
        const beside = plain && plain !== column && plain.turns[number] ? numbersOf(plain.turns[number], key) : null;
        turnViews[number].draw(view, { key, scale, beside, isThreshold: Boolean(facts) && facts.threshold !== null });
      });
    });
    this.#drawLegend(view === "tokens" ? scale : null, facts);
  }

  /** The series that is drawn, of those that the answers have: a choice if there are several. */
  #chosenSeries() {
    const known = seriesOf(this.columns.flatMap((column) => column.turns));
    const select = $("series");
    if (known.join("\n") !== this.known) {
      this.known = known.join("\n");
      if (!known.includes(select.value)) select.replaceChildren();
      setChoices(select, known.map((key) => [key, seriesText(key)]));
    }
    select.closest("label").hidden = known.length < 2;
    return known.length ? select.value : null;
  }

  #drawLegend(scale, facts) {
    $("legend").hidden = !scale;
    if (!scale) return;
    const swatches = Array.from({ length: 2 * LEVELS + 1 }, (_, at) => make("span", { className: `token level${at - LEVELS}`, "aria-hidden": "true" }));
    $("legend").replaceChildren(
      make("span", {}, facts.title), make("span", {}, shown(scale.low)), make("span", { className: "swatches" }, ...swatches),
      make("span", {}, shown(scale.high)),
      make("span", { className: "hint" }, `middle ${shown(scale.middle)}${facts.threshold === null ? "" : ", the probe's threshold"}; point at a token for its number`));
  }
}
