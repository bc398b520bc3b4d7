// Small helpers for controls, and the box in which a vector is searched by name.

export const $ = (id) => document.getElementById(id);

/** A new element. Properties are set as such; children are elements or text. */
export function make(tag, properties = {}, ...children) {
  const { className, ...others } = properties;
  const element = document.createElement(tag);
  if (className) element.className = className;
  for (const [name, value] of Object.entries(others)) {
    if (name.includes("-") || name === "role") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** Replace the choices of a select and keep what was chosen, offered or not. choices: [value, label] pairs. */
export function setChoices(select, choices) {
  const before = select.value;
  select.replaceChildren(...choices.map(([value, label]) => new Option(label, value)));
  if (before && !choices.some(([value]) => value === before)) select.append(new Option(`${before} (not offered here)`, before));
  if (before) select.value = before;
}

const fieldsIn = (root) => [...root.querySelectorAll("[data-field]")];

/** The values of all `data-field` controls inside of an element: text, and true or false for checkboxes. */
export function readFields(root) {
  return Object.fromEntries(fieldsIn(root).map((each) => [each.dataset.field, each.type === "checkbox" ? each.checked : each.value]));
}

export function fillFields(root, values) {
  for (const control of fieldsIn(root)) {
    const value = values[control.dataset.field];
    if (value === undefined) continue;
    if (control.type === "checkbox") control.checked = value === true;
    else {
      // A value that is no choice here still has to be shown and sent: the server says what is wrong with it.
      if (control.tagName === "SELECT" && ![...control.options].some((option) => option.value === value)) {
        control.append(new Option(value, value));
      }
      control.value = value;
    }
  }
  showFields(root);
}

/** Show each part of a form only where it has a meaning: `data-when="op=clamp,set"`, or `data-when="rule"` (not empty). */
export function showFields(root) {
  const values = readFields(root);
  for (const part of root.querySelectorAll("[data-when]")) {
    const [field, list] = part.dataset.when.split("=");
    part.hidden = list ? !list.split(",").includes(values[field]) : !values[field];
  }
}

/** The first control inside of an element whose content is not valid, or null. Hidden ones are not looked at. */
export function firstInvalid(root) {
  const controls = [...root.querySelectorAll("input, textarea, select")];
  return controls.find((each) => !each.closest("[hidden]") && !each.checkValidity()) ?? null;
}

/** Mark a control as wrong until it changes, open what hides it, and move there. */
export function pointOut(control) {
  for (let details = control.closest("details"); details; details = details.parentElement.closest("details")) details.open = true;
  control.setAttribute("aria-invalid", "true");
  control.addEventListener("input", () => control.removeAttribute("aria-invalid"), { once: true });
  control.focus();
}

/** At most so many names are listed at once. */
const LISTED = 100;
let number = 0;

/**
 * A text field with a list of vectors below it, filtered by what is typed (the combobox pattern of ARIA).
 * Arrow keys move, Enter or a click chooses, Escape closes. It stands in an element of class `box`.
 */
export class VectorBox {
  /** options: returns [{ name, hint }]. onChoose: called after a choice, or when another text was typed and left. */
  constructor(input, options, onChoose) {
    Object.assign(this, { input, options, onChoose, active: -1, typed: false, settled: input.value });
    this.list = make("ul", { role: "listbox", id: `vectors-${(number += 1)}`, hidden: true, "aria-label": "Vectors" });
    input.closest(".box").append(this.list);
    const attributes = { role: "combobox", autocomplete: "off", spellcheck: "false", "aria-autocomplete": "list",
      "aria-expanded": "false", "aria-controls": this.list.id };
    for (const [name, value] of Object.entries(attributes)) input.setAttribute(name, value);
    input.addEventListener("input", () => { this.typed = true; this.open(); });
    input.addEventListener("click", () => this.open());
    input.addEventListener("keydown", (event) => this.#key(event));
    input.addEventListener("focus", () => input.select());
    input.addEventListener("blur", () => { this.close(); this.#settle(); });
  }

  open() {
    const words = this.typed ? this.input.value.toLowerCase().split(/\s+/).filter(Boolean) : [];
    const found = this.options().filter(({ name }) => words.every((word) => name.toLowerCase().includes(word)));
    this.active = -1;
    this.list.replaceChildren(...found.slice(0, LISTED).map(({ name, hint }, at) => this.#item(name, hint, at)));
    if (found.length > LISTED) this.list.append(this.#note(`${found.length - LISTED} more: type a part of the name`));
    if (!found.length) this.list.append(this.#note("no vector has that name"));
    this.list.hidden = false;
    this.input.setAttribute("aria-expanded", "true");
  }

  close() {
    this.list.hidden = true;
    this.typed = false;
    this.input.setAttribute("aria-expanded", "false");
    this.input.removeAttribute("aria-activedescendant");
  }

  /** Fill in a name without telling anybody. */
  set(name) {
    this.input.value = this.settled = name;
  }

  #item(name, hint, at) {
    const selected = name === this.input.value ? "true" : "false";
    const item = make("li", { role: "option", id: `${this.list.id}-${at}`, "aria-selected": selected }, make("span", {}, name));
    item.dataset.name = name;
    if (hint) item.append(make("span", { className: "hint" }, hint));
    // Before the field loses the focus.
    item.addEventListener("pointerdown", (event) => { event.preventDefault(); this.#choose(name); });
    return item;
  }

  #note(text) {
    return make("li", { role: "option", "aria-disabled": "true", "aria-selected": "false", className: "hint" }, text);
  }

  #choose(name) {
    this.input.value = name;
    this.close();
    this.input.dispatchEvent(new Event("input", { bubbles: true }));
    this.close();
    this.#settle();
  }

  #settle() {
    if (this.input.value === this.settled) return;
    this.settled = this.input.value;
    this.onChoose(this.input.value);
  }

  #key(event) {
    const items = [...this.list.querySelectorAll("[data-name]")];
    if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      event.preventDefault();
      if (this.list.hidden) this.open();
      else this.#move(items, event.key === "ArrowDown" ? 1 : -1);
    } else if (event.key === "Enter" && !event.ctrlKey && !event.metaKey && !this.list.hidden) {
      event.preventDefault();
      if (items[this.active]) this.#choose(items[this.active].dataset.name);
      else if (items.length === 1) this.#choose(items[0].dataset.name);
      else this.close();
    } else if (event.key === "Escape" && !this.list.hidden) {
      event.preventDefault();
      this.close();
    }
  }

  #move(items, step) {
    if (!items.length) return;
    items[this.active]?.classList.remove("active");
    this.active = this.active < 0 && step < 0 ? items.length - 1 : (this.active + step + items.length) % items.length;
    const item = items[this.active];
    item.classList.add("active");
    item.scrollIntoView({ block: "nearest" });
    this.input.setAttribute("aria-activedescendant", item.id);
  }
}
