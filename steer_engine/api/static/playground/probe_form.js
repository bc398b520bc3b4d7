// The form of the probe: a trained probe, or any vector at a block.

import { VectorBox, $, fillFields, firstInvalid, readFields, setChoices, showFields } from "./dom.js";
import { shown } from "./chart.js";
import { probeStart, thresholdOf } from "./dose.js";
import { FieldError } from "./spec.js";

const EMPTY = { vector: "", block: "", measure: "cosine", after: false, rule: "", bound: "", tokens: "1" };

export class ProbeForm {
  constructor(catalog, onChange) {
    Object.assign(this, { catalog, onChange, vector: null, ready: null, root: $("probe") });
    this.box = new VectorBox(this.control("vector"), () => catalog.probeOptions(), (name) => this.choose(name));
    this.root.addEventListener("input", () => { showFields(this.root); this.#describe(); onChange(); });
    showFields(this.root);
  }

  control(field) {
    return this.root.querySelector(`[data-field="${field}"]`);
  }

  /** The probe of a request: its fields, or null without a vector. Raises FieldError. */
  read() {
    const fields = readFields(this.root);
    if (!fields.vector.trim()) return null;
    const wrong = firstInvalid(this.root);
    if (wrong) throw Object.assign(new FieldError(wrong.dataset.field, wrong.validationMessage), { control: wrong });
    return { ...fields, vector: fields.vector.trim() };
  }

  /** Show the probe of a link or of an earlier run; null clears the form. */
  async fill(probe) {
    fillFields(this.root, { ...EMPTY, ...probe });
    this.box.settled = this.control("vector").value;
    if (probe) this.root.open = true;
    await this.#look();
    this.#offer();
    this.#describe();
  }

  /** Choose a vector, with the block and the kind of number that fit it. */
  choose(name) {
    this.ready = this.#begin(name);
    return this.ready;
  }

  async #begin(name) {
    this.box.set(name);
    await this.#look();
    if (this.vector) {
      const { block, measure } = probeStart(this.vector, this.catalog.armed);
      this.#offer();
      fillFields(this.root, { block: String(block ?? ""), measure });
    }
    showFields(this.root);
    this.#describe();
    this.onChange();
  }

  async refresh() {
    await this.#look();
    this.#offer();
    this.#describe();
  }

  /** What the colours mean: { threshold, measure, title }. */
  facts() {
    const { vector, block, measure } = readFields(this.root);
    return { threshold: thresholdOf(this.vector, block, measure), measure, title: `${vector}, block ${block}, ${measure}` };
  }

  async #look() {
    const name = this.control("vector").value.trim();
    const found = name ? await this.catalog.vector(name) : null;
    if (this.control("vector").value.trim() === name) this.vector = found;
  }

  /** The blocks that can be measured, with the quality of a trained probe. */
  #offer() {
    if (!this.vector) return;
    const usable = this.vector.blocks.filter((block) => !this.catalog.armed || this.catalog.armed.includes(block));
    const quality = (block) => this.vector.probe?.blocks?.[block]?.auroc;
    const label = (block) => `${block}${quality(block) ? ` (AUROC ${quality(block).toFixed(3)})` : ""}`;
    setChoices(this.control("block"), usable.map((block) => [String(block), label(block)]));
    const calibrated = Object.values(this.vector.probe?.blocks ?? {}).some((each) => each.platt);
    const measures = [["cosine", "cosine"], ["dot", "dot product"], ...(calibrated ? [["probability", "probability"]] : [])];
    setChoices(this.control("measure"), measures);
  }

  #describe() {
    const { vector, block, measure } = readFields(this.root);
    let text = "Colours each token by how far the stream points along a vector.";
    if (vector && !this.vector) text = `No facts about ${vector} are known yet.`;
    else if (vector) {
      const trained = this.vector.probe;
      const threshold = thresholdOf(this.vector, block, measure);
      text = trained ? `A trained probe (${trained.at.replaceAll("_", " ")}). ` : "Not a trained probe: the numbers have no threshold. ";
      if (threshold !== null) text += `It fires above ${shown(threshold)}.`;
    }
    $("probe-about").textContent = text;
  }
}
