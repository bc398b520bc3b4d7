// The box in which a vector is searched by name.

import { make } from "./dom.js";

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
