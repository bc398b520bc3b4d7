// The cards of edits: one form for each edit, with a strength that fits its vector.

import { VectorBox, fillFields, firstInvalid, make, readFields, setChoices, showFields, $ } from "./dom.js";
import { describeDose, nice, rangeOf, scaleFor, startOf } from "./dose.js";
import { EMPTY, FieldError, OPERATIONS, SCOPE_FORMS, SCOPE_WORDS, blocksOf, editOf, fieldsOf } from "./spec.js";

class EditCard {
  /** catalog: what the server has. onChange: called after every change. onRemove: called with this card. */
  constructor(catalog, onChange, onRemove) {
    this.catalog = catalog;
    this.onChange = onChange;
    this.root = $("edit").content.cloneNode(true).firstElementChild;
    this.vector = null;
    this.ready = null; // a promise while a chosen vector is looked up
    this.slider = this.part(".slider");
    this.boxes = ["vector", "when_vector", "gate_vector"].map((field) => this.#box(field));
    this.offer();
    this.root.addEventListener("input", (event) => this.#changed(event.target));
    this.part(".remove").addEventListener("click", () => onRemove(this));
  }

  part(selector) {
    return this.root.querySelector(selector);
  }

  control(field) {
    return this.part(`[data-field="${field}"]`);
  }

  get fields() {
    return readFields(this.root);
  }

  /** Show fields, without changing their strength. */
  fill(fields) {
    fillFields(this.root, { ...EMPTY, ...fields });
    for (const box of this.boxes) box.settled = box.input.value;
    return this.describe();
  }

  /** Choose a vector, with the strength and blocks that fit it. */
  choose(name) {
    this.ready = this.#begin(name);
    return this.ready;
  }

  async #begin(name) {
    this.boxes[0].set(name);
    await this.#look();
    if (!this.vector || this.fields.vector !== name) return;
    const { scale, blocks, unit, scope } = startOf(this.vector, this.catalog.armed);
    fillFields(this.root, { scale, blocks, unit, ...(typeof scope === "string" ? { scope } : {}) });
    if (this.fields.op !== "add") this.#fit();
    this.#draw();
    this.onChange();
  }

  /** Look up the vector and say how large the edit is. */
  async describe() {
    await this.#look();
    this.#draw();
  }

  /** The choices that this server offers. */
  offer() {
    const { operations, scopes } = this.catalog;
    setChoices(this.control("op"), operations.map((op) => [op, OPERATIONS[op] ?? op]));
    const words = scopes.map((word) => [word, SCOPE_WORDS[word] ?? word]);
    setChoices(this.control("scope"), [...words, ...SCOPE_FORMS.map(([value, label]) => [value, label])]);
    const windows = scopes.filter((word) => ["thinking", "answer", "tool_calls"].includes(word));
    setChoices(this.control("except"), [["", "nothing"], ...windows.map((word) => [word, SCOPE_WORDS[word]])]);
    this.control("blocks").placeholder = "all of the vector";
    showFields(this.root);
  }

  /** The edit of a request. Raises FieldError; `control` of it is the control that is wrong. */
  edit() {
    const wrong = firstInvalid(this.root);
    try {
      if (wrong) throw new FieldError(wrong.dataset.field ?? "scale", wrong.validationMessage);
      return editOf(this.fields);
    } catch (error) {
      error.control = wrong ?? this.control(error.field);
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

  /** A strength means something else in another operation or unit. */
  #fit() {
    const { op, unit, blocks } = this.fields;
    try {
      fillFields(this.root, { scale: scaleFor({ op, unit, ...(blocks ? { blocks: blocksOf(blocks) } : {}) }, this.vector) });
    } catch { /* the blocks are not finished; the strength stays */ }
  }

  async #look() {
    const name = this.fields.vector;
    const found = name ? await this.catalog.vector(name) : null;
    if (this.fields.vector === name) this.vector = found;
  }

  /** isSliding: the slider keeps its range while it is moved. */
  #draw(isSliding = false) {
    let edit = null;
    try {
      edit = editOf(this.fields);
    } catch { /* not complete yet; the run says what is missing */ }
    const usable = edit ?? { op: this.fields.op, scale: Number(this.fields.scale) || 0 };
    const { limit, step } = rangeOf(usable, this.vector, this.catalog.maxScale);
    if (!isSliding) Object.assign(this.slider, { min: -limit, max: limit, step, value: usable.scale ?? 0 });
    this.control("scale").max = this.catalog.maxScale;
    this.control("scale").min = -this.catalog.maxScale;
    const about = edit ? describeDose(edit, this.vector) : { text: "", warning: false };
    this.part(".dose").textContent = about.text;
    this.part(".dose").classList.toggle("warning", about.warning);
    this.part(".summary").textContent = summaryOf(this.fields, this.vector);
  }
}

/** What the closed part of a card says. */
function summaryOf(fields, vector) {
  const parts = [];
  if (fields.op !== "add") parts.push(OPERATIONS[fields.op] ?? fields.op);
  parts.push(fields.blocks ? `blocks ${fields.blocks}` : vector ? `all ${vector.blocks.length} blocks` : "all blocks");
  const form = SCOPE_FORMS.find(([value]) => value === fields.scope);
  parts.push(form ? form[1] : SCOPE_WORDS[fields.scope] ?? fields.scope);
  if (fields.schedule) parts.push(`${fields.schedule} schedule`);
  if (fields.when) parts.push("a condition");
  if (fields.gate_vector) parts.push("a gate");
  return parts.join(" · ");
}

/** The list of cards. */
export class Edits {
  constructor(catalog, onChange) {
    this.catalog = catalog;
    this.onChange = onChange;
    this.cards = [];
  }

  /** A new card with the first vector that no card has. */
  async add() {
    const used = this.cards.map((each) => each.fields.vector);
    const card = this.#append();
    card.ready = this.catalog.firstVector(used).then((name) => name && card.choose(name));
    await card.ready;
    return card;
  }

  /** Replace all cards. edits: as in a request. */
  fill(edits) {
    for (const card of [...this.cards]) this.#remove(card);
    return Promise.all(edits.map((edit) => {
      const card = this.#append();
      if ("vector" in edit) return card.fill(fieldsOf(edit));
      return card.fill(fieldsOf(edit)).then(() => card.control("vector").focus());
    }));
  }

  /** The server's vectors or choices have changed. Nothing that was typed changes. */
  refresh() {
    for (const card of this.cards) {
      card.offer();
      card.describe();
    }
  }

  /** Until every chosen vector has its strength. */
  ready() {
    return Promise.all(this.cards.map((card) => card.ready));
  }

  /** The edits of a request. Raises FieldError. */
  edits() {
    return this.cards.map((card) => card.edit());
  }

  #append() {
    const card = new EditCard(this.catalog, this.onChange, (each) => {
      const next = this.cards[this.cards.indexOf(each) + 1] ?? this.cards.at(-2);
      this.#remove(each);
      this.onChange();
      // The focus must not fall back to the beginning of the page.
      (next?.control("vector") ?? $("add")).focus();
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
      card.part(".remove").textContent = this.cards.length > 1 ? `Remove ${title.toLowerCase()}` : "Remove this edit";
    });
  }
}
