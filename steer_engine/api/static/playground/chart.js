// Numbers of a probe as colours and as a small line chart. All but the last two functions are pure.

/** Colours on each side of the middle. */
export const LEVELS = 4;

/**
 * { low, middle, high } that all answers of a run share, so that their colours can be compared.
 * threshold: the middle if it is known. null: no numbers.
 */
export function scaleOf(values, { threshold = null, measure = "cosine" } = {}) {
  const known = values.filter((value) => Number.isFinite(value));
  if (!known.length) return null;
  let [low, high] = rangeOf(known);
  if (measure === "probability") [low, high] = [0, 1];
  if (low === high) [low, high] = [low - 0.5, high + 0.5];
  const middle = measure === "probability" ? threshold ?? 0.5 : threshold ?? (low + high) / 2;
  return { low: Math.min(low, middle), middle, high: Math.max(high, middle) };
}

/** [lowest, highest] of any number of values; Math.min(...values) fails for as many as a long conversation has. */
const rangeOf = (values) => values.reduce(([low, high], value) => [Math.min(low, value), Math.max(high, value)], [Infinity, -Infinity]);

/** -LEVELS (low) to LEVELS (high); 0 in the middle. null for a token without a number. */
export function levelOf(value, scale) {
  if (!scale || !Number.isFinite(value)) return null;
  const width = value < scale.middle ? scale.middle - scale.low : scale.high - scale.middle;
  const share = width > 0 ? (value - scale.middle) / width : 0;
  return Math.round(Math.max(-1, Math.min(1, share)) * LEVELS) + 0;
}

/** Three significant digits, without an exponent where that is short. */
export function shown(value) {
  if (value === null || value === undefined) return "–";
  const text = value.toPrecision(3);
  return text.includes("e") ? value.toExponential(1) : text.replace("-", "−");
}

/** Runs of points, split where there is no number: lists of [x, y] in a box of width x height. */
export function linesOf(values, scale, { width, height, length = values.length }) {
  const lines = [[]];
  values.forEach((value, number) => {
    if (value === null) {
      if (lines.at(-1).length) lines.push([]);
      return;
    }
    const x = length > 1 ? (number / (length - 1)) * width : width / 2;
    lines.at(-1).push([x, yOf(value, scale, height)]);
  });
  return lines.filter((line) => line.length);
}

function yOf(value, scale, height) {
  const share = (value - scale.low) / (scale.high - scale.low || 1);
  return height - Math.max(0, Math.min(1, share)) * height;
}

/** One sentence for those who do not see the chart. */
export function summaryOf(values) {
  const known = values.filter((value) => value !== null);
  if (!known.length) return "No numbers.";
  const mean = known.reduce((sum, value) => sum + value, 0) / known.length;
  const [low, high] = rangeOf(known);
  return `Mean ${shown(mean)}, lowest ${shown(low)}, highest ${shown(high)} of ${known.length} tokens.`;
}

const SVG = "http://www.w3.org/2000/svg";
const [HEIGHT, LEFT, EDGE] = [84, 44, 8];

function shape(tag, attributes, text) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

/**
 * A line chart of `values`. beside: the plain answer's numbers, drawn faintly, or null.
 * isThreshold: the middle of the scale is a threshold, and gets a line. marked: the token with a dot, or null.
 * width: of the chart in pixels, so that its text is as large as other text.
 */
export function draw(values, scale, { beside = null, isThreshold = false, marked = null, width = 320 } = {}) {
  const box = { width: width - LEFT - EDGE, height: HEIGHT - 2 * EDGE, length: Math.max(values.length, beside?.length ?? 0) };
  const label = `Line chart of the probe by token. ${summaryOf(values)}`;
  const chart = shape("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, role: "img", "aria-label": label, class: "chart" });
  const inner = shape("g", { transform: `translate(${LEFT} ${EDGE})` });
  inner.append(shape("path", { class: "axis", d: `M0 0V${box.height}H${box.width}` }));
  if (isThreshold) {
    const y = yOf(scale.middle, scale, box.height);
    inner.append(shape("path", { class: "threshold", d: `M0 ${y}H${box.width}` }));
  }
  for (const [name, numbers] of [["beside", beside], ["line", values]]) {
    for (const points of numbers ? linesOf(numbers, scale, box) : []) {
      inner.append(shape("polyline", { class: name, points: points.map(([x, y]) => `${x.toFixed(1)},${y.toFixed(1)}`).join(" ") }));
    }
  }
  const [point] = marked === null ? [] : linesOf(values.map((value, at) => (at === marked ? value : null)), scale, box);
  if (point) inner.append(shape("circle", { class: "dot", cx: point[0][0].toFixed(1), cy: point[0][1].toFixed(1), r: 4 }));
  chart.append(inner);
  for (const [value, y] of [[scale.high, EDGE + 4], [scale.low, HEIGHT - EDGE]]) {
    chart.append(shape("text", { x: LEFT - 6, y, "text-anchor": "end" }, shown(value)));
  }
  return chart;
}
