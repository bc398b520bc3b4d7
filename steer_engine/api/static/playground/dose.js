// How strong an edit is, in norms of the residual stream: where a strength starts, how far its slider goes, and when
// to warn. Pure functions.

import { SCALED } from "./spec.js";

/** Added over all blocks, in residual norms. More than this breaks the text of small models. */
export const WARN_ABOVE = 0.5;

/** The slider's range where a vector's file has no residual norms: the vector's own unit is all that is known. */
const UNKNOWN_RANGE = 4;

/** The blocks of a request's `blocks`, of those that the vector has. blocks: undefined means all of them. */
export function chosenBlocks(blocks, vector) {
  const known = vector?.blocks ?? [];
  if (blocks === undefined || blocks === "all") return known;
  if (typeof blocks === "string") {
    const [first, last = first] = blocks.split("-").map(Number);
    return known.filter((block) => first <= block && block <= last);
  }
  return known.filter((block) => [blocks].flat().includes(block));
}

/** Whether an entry of the registry is a set of rows, such as features, instead of one direction per block. */
export const isRowSet = (vector) => (vector?.kind ?? "directions") !== "directions";

/** Residual norms that scale 1 adds at each block: block -> share. null if the file has no residual norms. */
export function sharesOfOne(edit, vector) {
  const op = edit.op ?? "add";
  const blocks = chosenBlocks(edit.blocks, vector);
  if (isRowSet(vector) || !blocks.length || !["add", "add_relative"].includes(op)) return null;
  const relative = op === "add_relative" || edit.unit === "residual";
  const shares = new Map();
  for (const block of blocks) {
    const norm = vector.residual_norms?.[block];
    if (relative) shares.set(block, 1);
    else if (norm) shares.set(block, vector.norms[block] / norm);
  }
  return shares.size ? shares : null;
}

/** { total, largest, block, blocks } of an edit: summed over its blocks, and at its strongest one. null if unknown. */
export function doseOf(edit, vector) {
  const shares = sharesOfOne(edit, vector);
  if (!shares) return null;
  const scale = Math.abs(edit.scale ?? 1);
  let [total, largest, block] = [0, -1, null];
  for (const [each, share] of shares) {
    total += share * scale;
    if (share * scale > largest) [largest, block] = [share * scale, each];
  }
  return { total, largest, block, blocks: shares.size };
}

/** One sentence about the size of an edit, and whether it is a warning. */
export function describeDose(edit, vector) {
  if (!vector) return { text: "", warning: false };
  if (isRowSet(vector)) return { text: `This is a set of ${vector.kind}, not a control vector.`, warning: true };
  const op = edit.op ?? "add";
  if (op === "ablate") {
    return { text: `Removes ${percent(edit.scale ?? 1)} of what the stream has along this direction.`, warning: false };
  }
  if (!SCALED.includes(op)) return { text: "The size of the change depends on each token.", warning: false };
  const dose = doseOf(edit, vector);
  if (!dose) {
    const text = "The file has no residual norms, so the size of this edit is unknown. Start low.";
    return { text, warning: false };
  }
  const where = dose.blocks > 1 ? ` over ${dose.blocks} blocks; at most ${percent(dose.largest)}, at block ${dose.block}` : "";
  const text = `Adds ${percent(dose.total)} of the residual norm${where}.`;
  if (dose.total <= WARN_ABOVE + 1e-9) return { text, warning: false };
  return { text: `${text} That is more than half of it: the text may break.`, warning: true };
}

export function percent(share) {
  const value = 100 * share;
  return `${Math.abs(value) >= 9.95 || value === 0 ? value.toFixed(0) : value.toPrecision(2)} %`;
}

/**
 * Where an edit with this vector begins: its strength, blocks and unit.
 * armed: blocks that the server can steer. The vector's own suggestion comes first.
 */
export function startOf(vector, armed = null) {
  const isArmed = (block) => !armed || armed.includes(block);
  const found = vector?.suggested;
  const blocks = chosenBlocks(found?.blocks, vector).filter(isArmed);
  const isWhole = blocks.length === (vector?.blocks ?? []).length;
  const chosen = { blocks: isWhole || !blocks.length ? "" : ranges(blocks), unit: found?.unit ?? "vector" };
  return { ...chosen, scale: scaleFor({ unit: chosen.unit, blocks: chosen.blocks || undefined }, vector), scope: found?.scope ?? "all" };
}

/** The strength, as text, that an operation begins with: an edit's other fields are given. 1 if nothing is known. */
export function scaleFor(edit, vector) {
  const [op, unit, found] = [edit.op ?? "add", edit.unit ?? "vector", vector?.suggested];
  if (op === "ablate") return "1";
  if (op === "add" && found?.unit === unit && Number.isFinite(found.scale)) return String(nice(found.scale));
  const dose = doseOf({ ...edit, scale: 1 }, vector);
  return String(dose?.total ? nice((0.75 * WARN_ABOVE) / dose.total) : 1);
}

/** { limit, step } of the slider: twice the strength that is warned about, and never less than the present value. */
export function rangeOf(edit, vector, maxScale = Infinity) {
  const op = edit.op ?? "add";
  let limit = op === "ablate" ? 2 : UNKNOWN_RANGE;
  const dose = doseOf({ ...edit, scale: 1 }, vector);
  if (dose?.total) limit = (2 * WARN_ABOVE) / dose.total;
  limit = Math.min(Math.max(nice(limit), Math.abs(edit.scale ?? 0)), maxScale);
  return { limit, step: nice(limit / 100) };
}

/** Two digits. */
export function nice(value) {
  return value ? Number(value.toPrecision(2)) : 0;
}

/** Ascending block numbers as text: `8-14, 20` becomes `8, 9, ...` only where they are not one range. */
export function ranges(blocks) {
  const sorted = [...blocks].sort((a, b) => a - b);
  const isRange = sorted.at(-1) - sorted[0] === sorted.length - 1;
  return isRange && sorted.length > 1 ? `${sorted[0]}-${sorted.at(-1)}` : sorted.join(", ");
}

/**
 * Where a probe with this vector begins: { block, measure, threshold }. A trained probe: its best block by held-out
 * AUROC, as a probability if it is calibrated. Another vector: the middle of its suggested blocks.
 */
export function probeStart(vector, armed = null) {
  const usable = (vector?.blocks ?? []).filter((block) => !armed || armed.includes(block));
  const trained = Object.entries(vector?.probe?.blocks ?? {}).filter(([block]) => usable.includes(Number(block)));
  if (trained.length) {
    const [block, best] = trained.reduce((a, b) => ((b[1].auroc ?? 0) > (a[1].auroc ?? 0) ? b : a));
    return { block: Number(block), measure: best.platt ? "probability" : "dot" };
  }
  const suggested = chosenBlocks(vector?.suggested?.blocks, vector).filter((block) => usable.includes(block));
  const among = suggested.length ? suggested : usable;
  return { block: among.length ? among[Math.floor((among.length - 1) / 2)] : null, measure: "cosine" };
}

/** The number above which a trained probe fires, in the units of `measure`; null if there is none. */
export function thresholdOf(vector, block, measure) {
  const stored = vector?.probe?.blocks?.[block];
  if (!stored || !Number.isFinite(stored.threshold ?? NaN)) return null;
  if (measure === "dot") return stored.threshold;
  if (measure !== "probability" || !stored.platt) return null;
  return 1 / (1 + Math.exp(-(stored.platt.a * stored.threshold + stored.platt.b)));
}
