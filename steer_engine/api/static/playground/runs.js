// The history of this tab's runs, and copying: as curl, Python, Node, or as a link.

import { $, make } from "./dom.js";
import { curl, encodeLink, node, pathOf, python } from "./request.js";
import { textOf } from "./turns.js";

const KEPT = 30;
/** In this tab's session storage: runs and what is typed, never the key. It ends with the tab. */
const STORE = "steer-engine-playground-2";

/** What the tab had before it was loaded again: { typed, runs }. */
export function restoreTab() {
  try {
    const kept = JSON.parse(sessionStorage.getItem(STORE));
    return { typed: kept?.typed ?? null, runs: Array.isArray(kept?.runs) ? kept.runs : [] };
  } catch {
    return { typed: null, runs: [] };
  }
}

export class History {
  /** onOpen: called with the run that is to be shown again. */
  constructor(onOpen) {
    Object.assign(this, { onOpen, ...restoreTab() });
    this.draw();
  }

  /** run: { draft, columns, probes, facts }; kept as it is when the run ends. Adding a run that is known updates it. */
  add(run) {
    this.runs = [run, ...this.runs.filter((each) => each.at !== run.at)].slice(0, KEPT);
    this.draw();
    this.save();
  }

  /** Keep what is typed, finished or not, so that loading the page again loses nothing. */
  keepTyped(typed) {
    this.typed = typed;
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.save(), 400);
  }

  save() {
    for (let kept = this.runs.length; kept >= 0; kept = kept ? Math.floor(kept / 2) : -1) {
      try {
        sessionStorage.setItem(STORE, JSON.stringify({ typed: this.typed, runs: this.runs.slice(0, kept) }));
        return;
      } catch { /* full, or not allowed: keep fewer runs */ }
    }
  }

  draw() {
    $("no-history").hidden = this.runs.length > 0;
    $("history").replaceChildren(...this.runs.map((run) => {
      const time = new Date(run.at).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", second: "2-digit" });
      const last = run.columns.at(-1)?.turns.at(-1);
      const button = make("button", { type: "button", className: "run" },
        make("span", { className: "hint" }, `${time} · ${run.columns.map((each) => each.label).join(", ")}`),
        make("span", {}, last?.prompt ?? ""), make("span", { className: "hint" }, last ? textOf(last).slice(0, 120) : ""));
      button.addEventListener("click", () => this.onOpen(run));
      return make("li", {}, button);
    }));
  }
}

/** The buttons that copy. page: { draft(), request() -> { settings, body }, columns(), hasKey(), fail(error) }. */
export class Copying {
  constructor(page) {
    this.page = page;
    const base = new URL(".", location.href.split("#")[0]).href;
    const code = (make) => () => {
      const { settings, body } = page.request();
      return make(base, pathOf(settings), body, page.hasKey());
    };
    this.#offer("copy-curl", "curl command", code(curl));
    this.#offer("copy-python", "Python program", code(python));
    this.#offer("copy-node", "Node program", code(node));
    this.#offer("copy-link", "link", () => this.link());
  }

  link() {
    const columns = $("with-answers").checked ? this.page.columns() : null;
    return `${location.href.split("#")[0]}#${encodeLink(this.page.draft(), columns)}`;
  }

  #offer(id, what, makeText) {
    $(id).addEventListener("click", async () => {
      let text = "";
      try {
        text = makeText();
      } catch (error) {
        this.page.fail(error);
        return;
      }
      $("code").hidden = false;
      $("code").textContent = text;
      try {
        await navigator.clipboard.writeText(text);
        $("copied").textContent = `The ${what} is copied.`;
      } catch {
        // Browsers allow it on https and localhost only.
        $("copied").textContent = `The browser does not allow copying here. Select the ${what} below.`;
        getSelection().selectAllChildren($("code"));
      }
    });
  }
}
