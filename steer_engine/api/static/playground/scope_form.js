// The forms inside of others: at which tokens (a scope), and on which conditions.

import { $, allow, fieldIn, fillFields, make, readFields, setChoices, showFields } from "./dom.js";
import { EMPTY_CONDITION, EMPTY_SCOPE, MAX_CONDITIONS } from "./scope.js";
import { VectorBox } from "./vector_box.js";

/** The tokens of an edit or a probe. It stands in an element with `data-part="scope"`. */
export class ScopeForm {
  constructor(place, catalog) {
    this.catalog = catalog;
    this.root = $("scope-form").content.cloneNode(true).firstElementChild;
    place.append(this.root);
    this.root.addEventListener("input", () => showFields(this.root));
    this.offer();
  }

  get fields() {
    return readFields(this.root);
  }

  fill(fields) {
    fillFields(this.root, { ...EMPTY_SCOPE, ...fields });
  }

  control(field) {
    return fieldIn(this.root, field) ?? fieldIn(this.root, "scope");
  }

  offer() {
    const { scopes, excepts } = this.catalog.offers;
    setChoices(this.control("scope"), scopes);
    setChoices(this.control("except"), excepts);
    showFields(this.root);
  }
}

/** One condition: a vector that the prompt is compared with, and bounds. */
class ConditionForm {
  constructor(catalog, onRemove) {
    this.catalog = catalog;
    this.root = $("condition").content.cloneNode(true).firstElementChild;
    const vector = fieldIn(this.root, "vector");
    this.box = new VectorBox(vector, () => catalog.options(), () => this.describe());
    this.root.addEventListener("input", () => showFields(this.root));
    this.root.querySelector(".remove").addEventListener("click", () => onRemove(this));
    showFields(this.root);
  }

  fill(fields) {
    fillFields(this.root, { ...EMPTY_CONDITION, ...fields });
    this.box.settled = this.box.input.value;
    return this.describe();
  }

  /** Whether the vector's file has a condition of its own. */
  async describe() {
    const name = this.box.input.value.trim();
    const vector = name ? await this.catalog.vector(name) : null;
    if (this.box.input.value.trim() !== name) return;
    const missing = vector && !vector.condition ? "the file has none" : "";
    setChoices(fieldIn(this.root, "bound"), [["bounds", "a bound"], ["stored", "as in the file", missing]]);
  }
}

/** The conditions of an edit, or of all edits. It stands in an element with `data-part="when"`. */
export class WhenForm {
  constructor(place, catalog, onChange) {
    Object.assign(this, { catalog, onChange, list: [] });
    this.root = $("when-form").content.cloneNode(true).firstElementChild;
    place.append(this.root);
    this.add = this.root.querySelector(".add-condition");
    this.add.addEventListener("click", () => { fieldIn(this.#append().root, "vector").focus(); onChange(); });
    this.root.addEventListener("input", (event) => {
      if (event.target === this.control("mode") && this.mode && !this.list.length) this.#append();
      this.#show();
    });
    this.offer();
  }

  get mode() {
    return this.control("mode").value;
  }

  get fields() {
    return { mode: this.mode, list: this.list.map((each) => readFields(each.root)) };
  }

  fill({ mode = "", list = [] }) {
    for (const each of this.list) each.root.remove();
    this.list = [];
    fillFields(this.root, { mode });
    return Promise.all(list.map((fields) => this.#append().fill(fields)));
  }

  /** at: the number of a condition; undefined for the form itself. */
  control(field, at) {
    return (at === undefined ? null : fieldIn(this.list[at]?.root ?? this.root, field)) ?? fieldIn(this.root, "mode");
  }

  offer() {
    allow(this.control("mode"), this.catalog.offers.why.when);
    this.#show();
  }

  #append() {
    const condition = new ConditionForm(this.catalog, (removed) => {
      this.list = this.list.filter((each) => each !== removed);
      removed.root.remove();
      if (!this.list.length) fillFields(this.root, { mode: "" });
      this.#show();
      this.control("mode").focus(); // it must not fall back to the beginning of the page
      this.onChange();
    });
    this.list.push(condition);
    this.root.querySelector(".conditions").append(condition.root);
    this.#show();
    return condition;
  }

  #show() {
    const several = this.mode === "any" || this.mode === "all";
    this.list.forEach(({ root }, at) => {
      root.hidden = !this.mode || (!several && at > 0);
      root.querySelector("legend").replaceChildren(make("span", {}, several ? `Condition ${at + 1}` : "Condition"));
    });
    this.add.hidden = !several || this.list.length >= MAX_CONDITIONS;
  }
}
