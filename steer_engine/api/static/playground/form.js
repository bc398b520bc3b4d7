// All that is typed on the page: settings, edits, conditions, probes. As a request, as it stands, and back.

import { $, allow, setChoices } from "./dom.js";
import { Edits } from "./edits.js";
import { placeOf } from "./params.js";
import { takeProbes, withProbes } from "./probe_spec.js";
import { Probes } from "./probes.js";
import { DEFAULTS } from "./request.js";
import { NO_CONDITION, whenFields, whenOf } from "./scope.js";
import { WhenForm } from "./scope_form.js";
import { moreFields } from "./values.js";

const presetChoices = (names) => [["", "none: the edits below"], ...names.map((name) => [name, name])];

/** Do work; an error gets the control that is wrong. controlOf: error -> control. */
function pointing(controlOf, work) {
  try {
    return work();
  } catch (error) {
    throw Object.assign(error, { control: controlOf(error) });
  }
}

export class Form {
  /** catalog: what the server has. onChange: called after every change of a part that is not an input. */
  constructor(catalog, onChange) {
    this.catalog = catalog;
    this.edits = new Edits(catalog, onChange);
    this.when = new WhenForm($("when-all"), catalog, onChange);
    this.probes = new Probes(catalog, onChange);
    this.wantsFirstEdit = true;
  }

  get settings() {
    return Object.fromEntries(Object.keys(DEFAULTS).map((name) => [name, $(name).value]));
  }

  get preset() {
    return $("preset").value;
  }

  /** What is sent and shared: { settings, steering }. Raises an error that says which control is wrong. */
  draft() {
    return { settings: this.settings, steering: this.#steering() };
  }

  /** What is in all controls, finished or not. */
  typed() {
    return {
      settings: this.settings, preset: this.preset, preserve_norm: $("preserve_norm").checked, extra: $("extra").value,
      edits: this.edits.fields, when: this.when.fields, probes: this.probes.fields,
    };
  }

  /** false for none. */
  #steering() {
    const extra = pointing(() => $("extra"), () => moreFields($("extra").value));
    const spec = withProbes({ ...this.#ofEdits(), ...extra }, this.probes.read());
    return Object.keys(spec).length ? spec : false;
  }

  #ofEdits() {
    if (this.preset) return { preset: this.preset };
    const edits = this.edits.edits();
    if (!edits.length) return {};
    const when = pointing((error) => this.when.control(error.field, error.at), () => whenOf(this.when.fields));
    return { edits, ...($("preserve_norm").checked ? { preserve_norm: true } : {}), ...(when ? { when } : {}) };
  }

  /** Show a draft: of a link or of an earlier run. */
  fill({ settings, steering }) {
    const { forms, rest } = takeProbes(steering);
    const { edits = [], preset = "", preserve_norm: keepsNorm = false, when = null, ...extra } = rest;
    const condition = when === null ? NO_CONDITION : whenFields(when);
    if (!condition) extra.when = when;
    this.wantsFirstEdit = !steering;
    this.#fillPage({ settings, preset, preserve_norm: keepsNorm === true, extra: Object.keys(extra).length ? JSON.stringify(extra) : "" });
    return Promise.all([this.edits.fill(edits), this.#fillForms(condition ?? NO_CONDITION, forms)]);
  }

  /** Show what was in this tab before it was loaded again. */
  fillTyped(typed) {
    this.wantsFirstEdit = !typed.edits.length && !typed.preset && !typed.probes.length;
    this.#fillPage(typed);
    return Promise.all([this.edits.fillFields(typed.edits), this.#fillForms(typed.when, typed.probes)]);
  }

  #fillPage({ settings, preset, preserve_norm: keepsNorm, extra }) {
    for (const [name, value] of Object.entries({ ...DEFAULTS, ...settings })) $(name).value = value;
    if (preset) setChoices($("preset"), presetChoices([preset]));
    $("preset").value = preset;
    $("preserve_norm").checked = keepsNorm;
    $("extra").value = extra;
    $("more-part").open = extra !== "";
  }

  #fillForms(condition, forms) {
    $("when-part").open = condition.mode !== "";
    return Promise.all([this.when.fill(condition), this.probes.fill(forms)]);
  }

  /** The server has answered: offer what it allows. Nothing that was typed changes. */
  async refresh() {
    const { catalog } = this;
    setChoices($("preset"), presetChoices(Object.keys(catalog.presets)));
    $("empty").hidden = catalog.names.length > 0;
    allow($("preserve_norm"), catalog.offers.why.preserve_norm);
    this.edits.refresh();
    this.when.offer();
    await this.probes.refresh();
    if (this.wantsFirstEdit && !this.edits.cards.length && catalog.names.length) await this.edits.add();
    this.wantsFirstEdit = false;
  }

  /** Until every chosen vector has its strength. */
  ready() {
    return Promise.all([this.edits.ready(), this.probes.ready()]);
  }

  /** The control that has the field of a server's error; null if none does. param: path of the field. */
  controlOf(param) {
    const place = placeOf(param, this.edits.cards.map((card) => card.fields));
    if (!place) return null;
    if (place.list === "page") return $(place.field);
    if (place.list === "probes") return this.probes.used[place.index]?.control(place.field, place.part) ?? null;
    if (place.list === "stop") return this.probes.used.filter((card) => card.fields.rule)[place.index]?.control(place.field) ?? null;
    if (this.preset) return null; // the path is one of the preset's
    if (place.list === "when") return this.when.control(place.field, place.at);
    return this.edits.cards[place.index]?.control(place.field, place.part, place.at) ?? null;
  }
}
