// Small helpers for controls and forms. A form is an element with `data-form`; its fields are the controls with `data-field` in it, without
// those of forms inside of it.

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

/**
 * Replace the choices of a select and keep what was chosen, offered or not. choices: [value, label, reason]; one with a
 * reason cannot be chosen.
 */
export function setChoices(select, choices) {
  const before = select.value;
  select.replaceChildren(...choices.map(([value, label, reason = ""]) => {
    const option = new Option(reason ? `${label} (${reason})` : label, value);
    option.disabled = reason !== "";
    return option;
  }));
  if (before && !choices.some(([value]) => value === before)) select.append(new Option(`${before} (not offered here)`, before));
  if (before) select.value = before;
}

/**
 * Disable a control and say why below it; "" allows it. What has content stays usable, so that it can be removed, and
 * the server says what is wrong with it.
 */
export function allow(control, reason) {
  const place = control.closest("label") ?? control;
  let note = place.nextElementSibling?.matches(".reason") ? place.nextElementSibling : null;
  const isEmpty = control.type === "checkbox" ? !control.checked : control.tagName === "BUTTON" || !control.value;
  control.disabled = reason !== "" && isEmpty;
  if (!reason) {
    note?.remove();
    control.removeAttribute("aria-describedby");
    return;
  }
  if (!note) {
    note = make("p", { className: "hint reason", id: `reason-${(reasons += 1)}` });
    place.after(note);
  }
  note.textContent = reason;
  control.setAttribute("aria-describedby", note.id);
}
let reasons = 0;

const isIn = (root) => (part) => part.closest("[data-form]") === root;
const fieldsIn = (root) => [...root.querySelectorAll("[data-field]")].filter(isIn(root));

/** The control of a field in a form; null if there is none. */
export const fieldIn = (root, field) => fieldsIn(root).find((each) => each.dataset.field === field) ?? null;

/** The values of the fields of a form: text, and true or false for checkboxes. */
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

/**
 * Show each part of a form only where it has a meaning: `data-when="op=clamp,set"`, or `data-when="rule"` (not empty);
 * several of these, separated by `;`, where one of them is met. A field that is hidden itself counts as empty.
 */
export function showFields(root) {
  const values = readFields(root);
  for (const part of [...root.querySelectorAll("[data-when]")].filter(isIn(root))) {
    part.hidden = !part.dataset.when.split(";").some((when) => isMet(root, when, values));
  }
}

/** A control stands before the parts that depend on it, so it is already known whether it is hidden. */
function isMet(root, when, values) {
  const [field, list] = when.split("=");
  const part = fieldIn(root, field).closest("[data-when]");
  if (part?.hidden && isIn(root)(part)) return false;
  return list ? list.split(",").includes(values[field]) : Boolean(values[field]);
}

/** Mark a form as busy until a promise ends. Returns the promise. */
export function busyUntil(root, promise) {
  root.setAttribute("aria-busy", "true");
  return promise.finally(() => root.removeAttribute("aria-busy"));
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
