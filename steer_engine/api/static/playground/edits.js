// The cards of edits: one form for each edit, with a strength that fits its vector.

import { $, allow, busyUntil, fieldIn, fillFields, firstInvalid, make, readFields, setChoices, showFields } from "./dom.js";
import { describeDose, isRowSet, nice, rangeOf, rowsOf, scaleFor, startOf } from "./dose.js";
import { KINDS, OPERATIONS } from "./operations.js";
import { scopeFields, scopeText } from "./scope.js";
import { ScopeForm, WhenForm } from "./scope_form.js";
import { EMPTY, SITES, editOf, fieldsOf } from "./spec.js";
import { FieldError, blocksOf } from "./values.js";
import { VectorBox } from "./vector_box.js";

/** At most so many features of a file are listed; others are entered by their number. */
const LISTED_FEATURES = 500;

class EditCard {
  /** catalog: what the server has. onChange: called after every change. onRemove: called with this card. */
  constructor(catalog, onChange, onRemove) {
    this.catalog = catalog;
    this.onChange = onChange;
    this.root = $("edit").content.cloneNode(true).firstElementChild;
    this.vector = null;
    this.ready = null; // a promise while a chosen vector is looked up
    this.slider = this.part(".slider");
    this.scope = new ScopeForm(this.part("[data-part=scope]"), catalog);
    this.when = new WhenForm(this.part("[data-part=when]"), catalog, () => this.#changed(this.root));
    this.boxes = ["vector", "gate_vector", "toward"].map((field) => this.#box(field));
    this.pick = this.part(".pick");
    this.pick.addEventListener("input", (event) => this.#picked(event));
    this.offer();
    this.root.addEventListener("input", (event) => this.#changed(event.target));
    this.part(".remove-edit").addEventListener("click", () => onRemove(this));
  }

  part(selector) {
    return this.root.querySelector(selector);
  }

  /** The control of a field, also of one that a request calls otherwise. part, at: of the form inside of this one. */
  control(field, part, at) {
    if (part === "scope") return this.scope.control(field);
    if (part === "when") return this.when.control(field, at);
    return fieldIn(this.root, field);
  }

  get fields() {
    return { ...readFields(this.root), scope: this.scope.fields, when: this.when.fields };
  }

  /** Show fields, without changing their strength. */
  fill(fields) {
    const all = { ...EMPTY, ...fields };
    fillFields(this.root, { ...all, scope: undefined, when: undefined });
    for (const box of this.boxes) box.settled = box.input.value;
    this.scope.fill(all.scope);
    return Promise.all([this.when.fill(all.when), this.describe()]);
  }

  /** Choose a vector, with the operation, strength and blocks that fit it. */
  choose(name) {
    this.ready = busyUntil(this.root, this.#begin(name));
    return this.ready;
  }

  async #begin(name) {
    this.boxes[0].set(name);
    await this.#look();
    if (!this.vector || this.fields.vector !== name) return;
    const { scale, blocks, unit, scope } = startOf(this.vector, this.catalog.armed);
    fillFields(this.root, { scale, blocks, unit });
    const fitting = this.#fittingOperation();
    if (fitting !== this.fields.op) fillFields(this.root, { op: fitting });
    if (isRowSet(this.vector)) this.#beginRows();
    const shown = scope === "all" ? null : scopeFields(scope);
    if (shown) this.scope.fill(shown);
    if (this.fields.op !== "add") this.#fit();
    this.#draw();
    this.onChange();
  }

  /** The chosen operation if it reads such a file, otherwise one that does. */
  #fittingOperation() {
    const { op } = this.fields;
    const kind = this.vector.kind ?? "directions";
    const allowed = this.catalog.offers.operations.filter(([value, , reason]) => !reason && (KINDS[value] ?? "directions") === kind);
    return allowed.some(([value]) => value === op) || !allowed.length ? op : allowed[0][0];
  }

  /** The first feature of a file, at its block. */
  #beginRows() {
    const usable = this.vector.blocks.filter((block) => !this.catalog.armed || this.catalog.armed.includes(block));
    const block = usable[0] ?? this.vector.blocks[0];
    if (this.vector.kind !== "features") return;
    fillFields(this.root, { blocks: this.vector.blocks.length > 1 ? String(block) : "", feature: String(this.vector.rows?.[block]?.[0] ?? "") });
  }

  /** Look up the vector and say how large the edit is. */
  async describe() {
    await this.#look();
    this.#draw();
  }

  /** What this server offers. */
  offer() {
    const { operations, sites, why, maxScale } = this.catalog.offers;
    setChoices(this.control("op"), operations);
    setChoices(this.control("site"), sites);
    this.control("blocks").placeholder = "all of the vector";
    Object.assign(this.control("scale"), { max: maxScale, min: -maxScale });
    allow(this.control("gate_vector"), why.gate);
    this.scope.offer();
    this.when.offer();
    showFields(this.root);
  }

  /** The edit of a request. Raises FieldError; `control` of it is the control that is wrong. */
  edit() {
    const wrong = firstInvalid(this.root);
    try {
      if (wrong) throw new FieldError(wrong.dataset.field ?? "scale", wrong.validationMessage);
      return editOf(this.fields);
    } catch (error) {
      error.control = wrong ?? this.control(error.field, error.part, error.at);
      throw error;
    }
  }

  #box(field) {
    const chosen = field === "vector" ? (name) => this.choose(name) : () => this.onChange();
    return new VectorBox(this.control(field), () => this.catalog.options(), chosen);
  }

  #changed(control) {
    const scale = this.control("scale");
    if (control === this.slider) scale.value = nice(Number(this.slider.value));
    if (["op", "unit"].includes(control.dataset.field)) this.#fit();
    showFields(this.root);
    this.#draw(control === this.slider);
    this.onChange();
  }

  /** A feature of the list is added to the numbers. */
  #picked(event) {
    event.stopPropagation();
    const control = this.control("feature");
    const before = control.value.split(/[,\s]+/).filter(Boolean);
    const chosen = this.pick.value;
    this.pick.value = "";
    if (chosen && !before.includes(chosen)) control.value = [...before, chosen].join(", ");
    this.#changed(control);
  }

  /** A strength means something else in another operation or unit. */
  #fit() {
    const { op, unit, blocks } = this.fields;
    try {
      fillFields(this.root, { scale: scaleFor({ op, unit, ...(blocks ? { blocks: blocksOf(blocks) } : {}) }, this.vector) });
    } catch { /* the blocks are not finished; the strength stays */ }
  }

  async #look() {
    const name = this.fields.vector.trim();
    const found = name ? await this.catalog.vector(name) : null;
    if (this.fields.vector.trim() === name) this.vector = found;
  }

  /** isSliding: the slider keeps its range while it is moved. */
  #draw(isSliding = false) {
    const fields = this.fields;
    let edit = null;
    try {
      edit = editOf(fields);
    } catch { /* not complete yet; the run says what is missing */ }
    const usable = edit ?? { op: fields.op, scale: Number(fields.scale) || 0 };
    const { limit, step } = rangeOf(usable, this.vector, this.catalog.offers.maxScale);
    if (!isSliding) Object.assign(this.slider, { min: -limit, max: limit, step, value: usable.scale ?? 0 });
    const about = describeDose(edit ?? { op: fields.op, isPart: true }, this.vector, this.catalog.offers.maxRank);
    this.part(".dose").textContent = about.text;
    this.part(".dose").classList.toggle("warning", about.warning);
    this.part(".summary").textContent = summaryOf(fields, this.vector);
    this.#drawFeatures(fields);
  }

  #drawFeatures({ op, blocks }) {
    const rows = op === "feature" ? rowsOf(blocks, this.vector) : [];
    const listed = rows.slice(0, LISTED_FEATURES);
    const more = rows.length - listed.length;
    const first = rows.length ? `choose${more ? `; ${more} more by their number` : ""}` : "no file of features is chosen";
    const state = JSON.stringify([listed, first]);
    if (state === this.listed) return;
    this.listed = state;
    this.pick.replaceChildren(new Option(first, ""), ...listed.map(({ row, label }) => new Option(label ? `${row}: ${label}` : String(row), row)));
    this.pick.disabled = !rows.length;
  }
}

/** What the closed part of a card says. */
function summaryOf(fields, vector) {
  const parts = [];
  if (fields.op !== "add") parts.push(OPERATIONS[fields.op] ?? fields.op);
  const all = vector?.blocks.length === 1 ? `block ${vector.blocks[0]}` : vector ? `all ${vector.blocks.length} blocks` : "all blocks";
  parts.push(fields.blocks ? `blocks ${fields.blocks}` : all);
  if (fields.site !== "block") parts.push(SITES[fields.site] ?? fields.site);
  parts.push(scopeText(fields.scope));
  if (fields.schedule) parts.push(`${fields.schedule} schedule`);
  if (fields.when.mode) parts.push("a condition");
  if (fields.gate_vector) parts.push("a gate");
  return parts.join(" · ");
}

/** The list of cards. */
export class Edits {
  constructor(catalog, onChange) {
    this.catalog = catalog;
    this.onChange = onChange;
    this.cards = [];
    this.addButton = $("add");
  }

  /** A new card with the first vector that no card has. */
  async add() {
    const used = this.cards.map((each) => each.fields.vector);
    const card = this.#append();
    card.ready = busyUntil(card.root, this.catalog.firstVector(used).then((name) => name && card.choose(name)));
    await card.ready;
    return card;
  }

  /** Replace all cards by those of a request's edits. */
  fill(edits) {
    return this.fillFields(edits.map(fieldsOf));
  }

  /** Replace all cards by forms with these fields. */
  fillFields(forms) {
    for (const card of [...this.cards]) this.#remove(card);
    return Promise.all(forms.map((fields) => this.#append().fill(fields)));
  }

  /** The server's vectors or what it offers have changed. Nothing that was typed changes. */
  refresh() {
    for (const card of this.cards) {
      card.offer();
      card.describe();
    }
    this.#number();
  }

  /** Until every chosen vector has its strength. */
  ready() {
    return Promise.all(this.cards.map((card) => card.ready));
  }

  /** The edits of a request. Raises FieldError. */
  edits() {
    return this.cards.map((card) => card.edit());
  }

  get fields() {
    return this.cards.map((card) => card.fields);
  }

  #append() {
    const card = new EditCard(this.catalog, this.onChange, (each) => {
      const next = this.cards[this.cards.indexOf(each) + 1] ?? this.cards.at(-2);
      this.#remove(each);
      this.onChange();
      // The focus must not fall back to the beginning of the page.
      (next?.control("vector") ?? this.addButton).focus();
    });
    this.cards.push(card);
    $("edits").append(card.root);
    this.#number();
    return card;
  }

  #remove(card) {
    this.cards = this.cards.filter((each) => each !== card);
    card.root.remove();
    this.#number();
  }

  #number() {
    this.cards.forEach((card, at) => {
      const title = this.cards.length > 1 ? `Edit ${at + 1}` : "Edit";
      card.part("legend").replaceChildren(make("span", {}, title));
      card.part(".remove-edit").textContent = this.cards.length > 1 ? `Remove ${title.toLowerCase()}` : "Remove this edit";
    });
    const { maxEdits } = this.catalog.offers;
    allow(this.addButton, this.cards.length >= maxEdits ? `The server takes at most ${maxEdits} edits (max_edits).` : "");
  }
}
