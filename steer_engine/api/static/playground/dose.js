// How strong an edit is, in norms of the residual stream: where a strength starts, how far its slider goes, and when
// to warn. Pure functions.

import { CHANGES, KINDS, OPERATIONS, SCALED } from "./operations.js";
import { blocksOf } from "./values.js";

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

/**
 * One sentence about the size of an edit, and whether it is a warning.
 * edit: an incomplete one is { op, isPart: true }. maxRank: the server's limit of a rank and of the features of an edit.
 */
export function describeDose(edit, vector, maxRank = Infinity) {
  if (!vector) return { text: "", warning: false };
  const op = edit.op ?? "add";
  const misfit = describeMisfit(op, vector);
  if (misfit) return { text: misfit, warning: true };
  if (op === "low_rank") return describeLowRank(vector, maxRank);
  if (edit.isPart) return { text: "", warning: false };
  if (op === "feature") return describeFeatures(edit, vector, maxRank);
  if (op === "rotate") {
    const angle = edit.degrees === undefined ? `to the angle of ${edit.to_degrees}°, counted from this vector` : `by ${edit.degrees}°`;
    return { text: `Turns each token ${angle}, toward ${edit.toward}. Its length stays.`, warning: false };
  }
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

const FILES = { features: "a set of features", low_rank: "a low-rank edit" };

/** Why an operation cannot read a file; "" if it can. */
function describeMisfit(op, vector) {
  const kind = vector.kind ?? "directions";
  if (kind === (KINDS[op] ?? "directions")) return "";
  const [fitting] = Object.entries(KINDS).find(([, each]) => each === kind) ?? [];
  if (fitting) return `This is ${FILES[kind]}: choose the operation "${OPERATIONS[fitting]}".`;
  return `This is a control vector; the operation "${OPERATIONS[op]}" needs the file of ${FILES[KINDS[op]] ?? "another kind"}.`;
}

function describeLowRank(vector, maxRank) {
  const rank = Math.max(...Object.values(vector.rows ?? { 0: [] }).map((rows) => rows.length));
  if (rank > maxRank) return { text: `This edit has rank ${rank}; the server takes at most ${maxRank} (max_rank).`, warning: true };
  return { text: `A low-rank edit of rank ${rank}. At strength 1 it is as trained.`, warning: false };
}

function describeFeatures(edit, vector, maxRank) {
  const numbers = [edit.feature].flat();
  const blocks = chosenBlocks(edit.blocks, vector);
  if (numbers.length > maxRank) {
    return { text: `These are ${numbers.length} features; the server takes at most ${maxRank} in an edit (max_rank).`, warning: true };
  }
  if (edit.blocks === undefined && blocks.length > 1) {
    return { text: `The file has features at blocks ${ranges(blocks)}: enter one of them under Blocks.`, warning: true };
  }
  for (const block of blocks) {
    const missing = numbers.find((each) => !(vector.rows?.[block] ?? []).includes(each));
    if (missing !== undefined) return { text: `The file has no feature ${missing} at block ${block}.`, warning: true };
  }
  const change = Object.keys(CHANGES).find((name) => edit[name] !== undefined);
  const names = numbers.map((each) => { const label = vector.labels?.[blocks[0]]?.[each]; return label ? `${each} (${label})` : each; });
  const what = `feature${numbers.length > 1 ? "s" : ""} ${names.join(", ")}`;
  const text = {
    target: `Sets ${what} to ${edit.target}.`, add: `Adds ${edit.add} to ${what}.`,
    scale: edit.scale === 0 ? `Removes ${what}.` : `Multiplies ${what} by ${edit.scale}.`,
  }[change];
  return { text: text ?? "", warning: false };
}

/** The features of a file that the written blocks have: [{ row, label }], ascending. blocks: the text of the form. */
export function rowsOf(blocks, vector) {
  if (vector?.kind !== "features") return [];
  let chosen = vector.blocks;
  try {
    if (blocks.trim()) chosen = chosenBlocks(blocksOf(blocks), vector);
  } catch { /* not finished: those of all blocks */ }
  const found = new Map();
  for (const block of chosen) {
    for (const row of vector.rows?.[block] ?? []) found.set(row, found.get(row) ?? vector.labels?.[block]?.[row] ?? "");
  }
  return [...found].sort(([a], [b]) => a - b).map(([row, label]) => ({ row, label }));
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
  if (op === "ablate" || op === "low_rank") return "1";
  if (op === "add" && found?.unit === unit && Number.isFinite(found.scale)) return String(nice(found.scale));
  const dose = doseOf({ ...edit, scale: 1 }, vector);
  return String(dose?.total ? nice((0.75 * WARN_ABOVE) / dose.total) : 1);
}

/** { limit, step } of the slider: twice the strength that is warned about, and never less than the present value. */
export function rangeOf(edit, vector, maxScale = Infinity) {
  const op = edit.op ?? "add";
  let limit = op === "ablate" || op === "low_rank" ? 2 : UNKNOWN_RANGE;
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
