// A model's text as Markdown, without ever becoming HTML: `parse` makes a tree, `render` makes elements whose text is
// set by textContent. Links are shown only for http and https. A steered model may repeat one character without end, so
// what is inside of what, and how far a mark may be from its end, have bounds.

const FENCE = /^\s*(```|~~~)\s*([\w+-]*)/;
const HEADING = /^(#{1,6})\s+(.*?)\s*#*$/;
const BULLET = /^(\s*)([-*+])\s+(.*)$/;
const NUMBERED = /^(\s*)(\d{1,9})[.)]\s+(.*)$/;
const RULE = /^\s*([-*_])(\s*\1){2,}\s*$/;
const QUOTE = /^\s*>\s?(.*)$/;
/** Of a line without spaces around it. */
const TABLE_LINE = /^\|?(\s*:?-{2,}:?\s*\|)+(\s*:?-+:?)?(\s*\|)?$/;

/** Quotes inside of quotes. */
const DEEPEST = 20;

/** Blocks of a text: { tag, children } or { tag, text }. depth: of the quote that holds it. */
export function parse(source, depth = 0) {
  const lines = source.replaceAll("\r\n", "\n").split("\n");
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    const line = lines[at];
    const [fence, heading, bullet] = [line.match(FENCE), line.match(HEADING), itemOf(line)];
    if (!line.trim()) at += 1;
    else if (fence) {
      const end = lines.findIndex((each, number) => number > at && each.trim().startsWith(fence[1]));
      // A fence that is still being written has no end yet.
      const last = end < 0 ? lines.length : end;
      blocks.push({ tag: "pre", children: [{ tag: "code", text: lines.slice(at + 1, last).join("\n") }] });
      at = last + 1;
    } else if (heading) {
      // The page has headings of levels 1 and 2 of its own.
      blocks.push({ tag: `h${Math.min(6, heading[1].length + 3)}`, children: inline(heading[2]) });
      at += 1;
    } else if (RULE.test(line)) {
      blocks.push({ tag: "hr" });
      at += 1;
    } else if (bullet) {
      const [list, next] = listAt(lines, at);
      blocks.push(list);
      at = next;
    } else if (depth < DEEPEST && QUOTE.test(line)) {
      const quoted = takeWhile(lines, at, (each) => QUOTE.test(each));
      blocks.push({ tag: "blockquote", children: parse(quoted.map((each) => each.match(QUOTE)[1]).join("\n"), depth + 1) });
      at += quoted.length;
    } else if (line.includes("|") && TABLE_LINE.test((lines[at + 1] ?? "").trim())) {
      const rows = takeWhile(lines, at, (each) => each.includes("|"));
      blocks.push(table(rows));
      at += rows.length;
    } else {
      const text = takeWhile(lines, at, (each, number) => each.trim() && (number === at || !startsBlock(each)));
      blocks.push({ tag: "p", children: withBreaks(text) });
      at += text.length;
    }
  }
  return blocks;
}

const startsBlock = (line) => FENCE.test(line) || HEADING.test(line) || QUOTE.test(line) || RULE.test(line) || itemOf(line);

function takeWhile(lines, from, holds) {
  let to = from;
  while (to < lines.length && holds(lines[to], to)) to += 1;
  return lines.slice(from, to);
}

/** { indent, ordered, start, text } of a list's line; null for another line. */
function itemOf(line) {
  const found = RULE.test(line) ? null : line.match(BULLET) ?? line.match(NUMBERED);
  if (!found) return null;
  const ordered = /\d/.test(found[2]);
  return { indent: found[1].length, ordered, start: ordered ? Number(found[2]) : 1, text: found[3] };
}

/** The list that begins at a line, with the lists inside of its items; and the line after it. */
function listAt(lines, from) {
  const first = itemOf(lines[from]);
  const list = { tag: first.ordered ? "ol" : "ul", children: [] };
  if (first.ordered && first.start !== 1) list.start = first.start;
  let at = from;
  while (at < lines.length) {
    const item = itemOf(lines[at]);
    const text = lines[at].trim();
    if (item && item.indent > first.indent && list.children.length) {
      const [inner, next] = listAt(lines, at);
      list.children.at(-1).children.push(inner);
      at = next;
    } else if (item && item.indent >= first.indent && item.ordered === first.ordered) {
      list.children.push({ tag: "li", children: inline(item.text) });
      at += 1;
    } else if (!text && itemOf(lines[at + 1] ?? "")?.ordered === first.ordered) {
      at += 1; // an empty line between two items
    } else if (text && !item && /^\s/.test(lines[at])) {
      list.children.at(-1).children.push(" ", ...inline(text));
      at += 1;
    } else break;
  }
  return [list, at];
}

function table(rows) {
  const cells = (row) => row.trim().replace(/^\||\|$/g, "").split("|").map((cell) => inline(cell.trim()));
  const row = (line, tag) => ({ tag: "tr", children: cells(line).map((children) => ({ tag, children })) });
  const body = rows.slice(2).map((line) => row(line, "td"));
  return {
    tag: "table",
    children: [{ tag: "thead", children: [row(rows[0], "th")] }, { tag: "tbody", children: body }],
  };
}

function withBreaks(lines) {
  return lines.flatMap((line, number) => [...(number ? [{ tag: "br" }] : []), ...inline(line.trim())]);
}

const INLINE = [
  [/^(`+)(.{1,1000}?)\1(?!`)/s, (found) => ({ tag: "code", text: found[2] })],
  [/^\*\*(?=\S)(.{1,1000}?)\*\*/s, (found) => ({ tag: "strong", children: inline(found[1]) })],
  [/^__(?=\S)(.{1,1000}?)__(?!\w)/s, (found) => ({ tag: "strong", children: inline(found[1]) })],
  [/^\*(?=[^\s*])(.{1,1000}?)\*(?!\*)/s, (found) => ({ tag: "em", children: inline(found[1]) })],
  [/^_(?=[^\s_])(.{1,1000}?)_(?!\w)/s, (found) => ({ tag: "em", children: inline(found[1]) })],
  [/^~~(?=\S)(.{1,1000}?)~~/s, (found) => ({ tag: "del", children: inline(found[1]) })],
  [/^\[([^\]]{1,1000})\]\((https?:\/\/[^\s)]{1,2000})\)/, (found) => ({ tag: "a", href: found[2], children: inline(found[1]) })],
];

/** Text and marked parts of a line. */
export function inline(text) {
  const parts = [];
  let plain = "";
  for (let at = 0; at < text.length; ) {
    // Most characters begin nothing.
    const length = text.slice(at).search(/[\\`*_~[]/);
    if (length) {
      plain += length < 0 ? text.slice(at) : text.slice(at, at + length);
      at = length < 0 ? text.length : at + length;
      continue;
    }
    const rest = text.slice(at);
    // A mark inside of a word is none: snake_case, 2*3*4.
    const insideWord = /[\w]$/.test(plain) && /^[_*]/.test(rest) && !rest.startsWith("**");
    const [rule, found] = (insideWord ? [] : INLINE.map(([pattern, make]) => [make, rest.match(pattern)]))
      .find(([, match]) => match) ?? [null, null];
    if (found) {
      if (plain) parts.push(plain);
      plain = "";
      parts.push(rule(found));
      at += found[0].length;
    } else if (rest[0] === "\\" && /[\\`*_{}[\]()#+.!|~>-]/.test(rest[1] ?? "")) {
      plain += rest[1];
      at += 2;
    } else {
      plain += rest[0];
      at += 1;
    }
  }
  if (plain) parts.push(plain);
  return parts;
}

/** Elements of a tree. Text becomes text nodes only. */
export function render(nodes, document) {
  return nodes.map((node) => {
    if (typeof node === "string") return document.createTextNode(node);
    const element = document.createElement(node.tag);
    if (node.text !== undefined) element.textContent = node.text;
    if (node.tag === "a") Object.assign(element, { href: node.href, target: "_blank", rel: "noopener noreferrer nofollow" });
    if (node.start !== undefined) element.start = node.start;
    element.append(...render(node.children ?? [], document));
    return element;
  });
}
