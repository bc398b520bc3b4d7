// What the server has: model, limits, vectors, presets. Facts about a vector are fetched when they are needed.

import { isRowSet } from "./dose.js";
import { offersOf } from "./offers.js";

/** Vectors whose facts are fetched at once, so that lists can tell which are probes. Others when they are chosen. */
const EAGER = 40;
const AT_ONCE = 4;

export class Catalog {
  /** Before the first answer of the server, everything is offered that any server has. */
  constructor(client) {
    Object.assign(this, {
      client, connected: false, model: "", names: [], presets: {}, armed: null, numBlocks: 0, offers: offersOf(),
    });
    this.facts = new Map();
    this.known = new Map();
  }

  /** Ask the server. Raises ServerError, and keeps what was known. */
  async connect() {
    this.connected = false;
    const about = await this.client.get("v1/steering");
    const [vectors, presets] = await Promise.all([
      this.client.list("v1/steering/vectors"), this.client.list("v1/steering/presets"),
    ]);
    Object.assign(this, {
      connected: true, model: about.model, armed: about.armed_blocks, numBlocks: about.num_blocks,
      offers: offersOf(about), names: vectors.map((each) => each.name),
      presets: Object.fromEntries(presets.map((each) => [each.name, each.spec])),
    });
    this.facts.clear();
    this.known.clear();
  }

  /** Facts about a vector: blocks, norms, suggestion, probe. null if the server does not tell. */
  vector(name) {
    if (!this.connected) return Promise.resolve(null);
    if (!this.facts.has(name)) {
      const path = `v1/steering/vectors/${encodeURIComponent(name)}`;
      const found = this.client.get(path).then((vector) => {
        this.known.set(name, vector);
        return vector;
      }, () => {
        this.facts.delete(name); // it may come back, or be added
        return null;
      });
      this.facts.set(name, found);
    }
    return this.facts.get(name);
  }

  /** Fetch the facts of the first vectors, a few at a time. */
  async lookAround() {
    const names = this.names.slice(0, EAGER);
    const worker = async () => {
      for (let name = names.shift(); name !== undefined && this.connected; name = names.shift()) await this.vector(name);
    };
    await Promise.all(Array.from({ length: AT_ONCE }, worker));
  }

  /** For a list: [{ name, hint }]. */
  options() {
    return this.names.map((name) => ({ name, hint: this.#hint(name) }));
  }

  /** As `options`, with trained probes first. */
  probeOptions() {
    const isProbe = (name) => (this.known.get(name)?.probe ? 0 : 1);
    return this.options().sort((a, b) => isProbe(a.name) - isProbe(b.name));
  }

  /** The first vector that is not in `used`; the first one if all are; undefined without any. Row sets are passed over. */
  async firstVector(used) {
    const names = this.names.filter((name) => !used.includes(name)).slice(0, EAGER);
    for (const name of names) if (!isRowSet(await this.vector(name))) return name;
    return this.names[0];
  }

  describe() {
    const count = (number, word) => `${number} ${word}${number === 1 ? "" : "s"}`;
    const counts = [count(this.names.length, "vector"), count(Object.keys(this.presets).length, "preset")];
    return `${this.model}: ${this.numBlocks} blocks, ${counts.join(", ")}`;
  }

  #hint(name) {
    const vector = this.known.get(name);
    if (!vector) return "";
    const blocks = vector.blocks.length === 1 ? `block ${vector.blocks[0]}` : `${vector.blocks.length} blocks`;
    if (isRowSet(vector)) return `${blocks} · ${vector.kind}`;
    return vector.probe ? `${blocks} · probe` : blocks;
  }
}
