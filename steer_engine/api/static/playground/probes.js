// The cards of probes: a trained probe, or any vector at some blocks, with the rule that ends the answer.

import { $, allow, busyUntil, fieldIn, fillFields, firstInvalid, make, readFields, setChoices, showFields } from "./dom.js";
import { shown } from "./chart.js";
import { chosenBlocks, isRowSet, probeStart, thresholdOf } from "./dose.js";
import { EMPTY_PROBE, PROBE, probeOf } from "./probe_spec.js";
import { ScopeForm } from "./scope_form.js";
import { FieldError, blocksOf } from "./values.js";
import { VectorBox } from "./vector_box.js";

class ProbeCard {
  constructor(catalog, onChange, onRemove) {
    Object.assign(this, { catalog, onChange, vector: null, ready: null });
    this.root = $("probe-form").content.cloneNode(true).firstElementChild;
    this.scope = new ScopeForm(this.root.querySelector("[data-part=scope]"), catalog);
    this.box = new VectorBox(this.control("vector"), () => catalog.probeOptions(), (name) => this.choose(name));
    this.root.addEventListener("input", () => { showFields(this.root); this.#describe(); onChange(); });
    this.root.querySelector(".remove-probe").addEventListener("click", () => onRemove(this));
    this.offer();
  }

  /** The control of a field, or of one that a request calls otherwise. part: "scope" for the form of the tokens. */
  control(field, part) {
    return part === "scope" ? this.scope.control(field) : fieldIn(this.root, field);
  }

  get fields() {
    return { ...readFields(this.root), scope: this.scope.fields };
  }

  /** Whether nothing was entered: such a card is not sent. */
  get isEmpty() {
    const { scope, name: _, ...fields } = this.fields;
    const { scope: emptyScope, ...empty } = EMPTY_PROBE;
    return [[fields, empty], [scope, emptyScope]].every(([now, before]) => Object.entries(now).every(([field, value]) => value === before[field]));
  }

  /** { probe, stop } of a request. Raises FieldError; `control` of it is the control that is wrong. */
  read() {
    const wrong = firstInvalid(this.root);
    try {
      if (wrong) throw new FieldError(wrong.dataset.field ?? "vector", wrong.validationMessage);
      return probeOf(this.fields);
    } catch (error) {
      error.control = wrong ?? this.control(error.field, error.part);
      throw error;
    }
  }

  async fill(fields) {
    const all = { ...EMPTY_PROBE, ...fields };
    fillFields(this.root, { ...all, scope: undefined });
    this.scope.fill(all.scope);
    this.box.settled = this.box.input.value;
    await this.refresh();
  }

  /** Choose a vector, with the block and the kind of number that fit it. */
  choose(name) {
    this.ready = busyUntil(this.root, this.#begin(name));
    return this.ready;
  }

  async #begin(name) {
    this.box.set(name);
    await this.#look();
    if (this.vector) {
      const { block, measure } = probeStart(this.vector, this.catalog.armed);
      this.offer();
      fillFields(this.root, { blocks: String(block ?? ""), measure });
    }
    showFields(this.root);
    this.#describe();
    this.onChange();
  }

  async refresh() {
    await this.#look();
    this.offer();
    this.#describe();
  }

  /** What the server and the vector's file allow. */
  offer() {
    setChoices(this.control("site"), this.catalog.offers.sites);
    allow(this.control("vector"), this.catalog.offers.why.probes);
    const calibrated = Object.values(this.vector?.probe?.blocks ?? {}).some((each) => each.platt);
    const missing = this.vector && !calibrated ? "the file has no calibration" : "";
    setChoices(this.control("measure"), [["cosine", "cosine"], ["dot", "dot product"], ["probability", "probability", missing]]);
    this.scope.offer();
    showFields(this.root);
  }

  async #look() {
    const name = this.control("vector").value.trim();
    const found = name ? await this.catalog.vector(name) : null;
    if (this.control("vector").value.trim() === name) this.vector = found;
  }

  #describe() {
    const fields = this.fields;
    let text = "Colours each token by how far the stream points along a vector.";
    let warning = false;
    if (fields.vector.trim() && !this.vector) text = `No facts about ${fields.vector} are known yet.`;
    else if (this.vector) [text, warning] = describe(fields, this.vector);
    const about = this.root.querySelector(".about");
    about.textContent = text;
    about.classList.toggle("warning", warning);
  }
}

/** [one or two sentences about a probe, whether they are a warning]. fields: of its form. */
function describe(fields, vector) {
  if (isRowSet(vector)) return ["This is a set of rows; a probe needs a control vector.", true];
  let blocks = vector.blocks;
  try {
    if (fields.blocks.trim()) blocks = chosenBlocks(blocksOf(fields.blocks), vector);
  } catch { /* not finished */ }
  if (fields.rule && blocks.length > 1 && !fields.stop_block.trim()) {
    return [`The probe has ${blocks.length} blocks: enter the one whose number ends the answer.`, true];
  }
  const trained = vector.probe;
  if (!trained) return ["Not a trained probe: the numbers have no threshold.", false];
  const parts = [`A trained probe (${trained.at.replaceAll("_", " ")}).`];
  const quality = trained.blocks?.[blocks[0]]?.auroc;
  if (blocks.length === 1 && quality) parts.push(`AUROC ${quality.toFixed(3)} at block ${blocks[0]}.`);
  const threshold = blocks.length === 1 ? thresholdOf(vector, blocks[0], fields.measure) : null;
  if (threshold !== null) parts.push(`It fires above ${shown(threshold)}.`);
  return [parts.join(" "), false];
}

/** The list of cards, in the element #probe. */
export class Probes {
  constructor(catalog, onChange) {
    Object.assign(this, { catalog, onChange, cards: [], root: $("probe"), addButton: $("add-probe") });
    this.addButton.addEventListener("click", () => { this.add().control("vector").focus(); onChange(); });
  }

  /** A new card without a vector, with a name of its own. */
  add() {
    const used = this.cards.map((each) => each.fields.name);
    let name = PROBE;
    for (let number = 2; used.includes(name); number += 1) name = `${PROBE}-${number}`;
    const card = this.#append();
    card.fill({ name });
    return card;
  }

  /** Replace all cards by forms with these fields; one that is empty without any. */
  async fill(forms) {
    for (const card of this.cards) card.root.remove();
    this.cards = [];
    if (forms.length) this.root.open = true;
    else this.add();
    await Promise.all(forms.map((fields) => this.#append().fill(fields)));
  }

  /** The cards that are sent, in the order of the request. */
  get used() {
    return this.cards.filter((card) => !card.isEmpty);
  }

  /** { probe, stop } of each card. Raises FieldError. */
  read() {
    return this.used.map((card) => card.read());
  }

  get fields() {
    return this.used.map((card) => card.fields);
  }

  async refresh() {
    await Promise.all(this.cards.map((card) => card.refresh()));
    this.#number();
  }

  ready() {
    return Promise.all(this.cards.map((card) => card.ready));
  }

  #append() {
    const card = new ProbeCard(this.catalog, this.onChange, (removed) => {
      const at = this.cards.indexOf(removed);
      this.cards = this.cards.filter((each) => each !== removed);
      removed.root.remove();
      if (!this.cards.length) this.add();
      this.#number();
      this.onChange();
      (this.cards[at] ?? this.cards.at(-1)).control("vector").focus();
    });
    this.cards.push(card);
    $("probes").append(card.root);
    this.#number();
    return card;
  }

  #number() {
    this.cards.forEach((card, at) => {
      const title = this.cards.length > 1 ? `Probe ${at + 1}` : "Probe";
      card.root.querySelector("legend").replaceChildren(make("span", {}, title));
      card.root.querySelector(".remove-probe").textContent = this.cards.length > 1 ? `Remove ${title.toLowerCase()}` : "Remove this probe";
    });
    const { why, maxProbes } = this.catalog.offers;
    allow(this.addButton, why.probes || (this.cards.length >= maxProbes ? `The server takes at most ${maxProbes} probes (max_probes).` : ""));
  }
}
