// A small part of Markdown, as DOM nodes: fenced code, headings, lists, quotes, tables, rules; bold, italic, struck out,
// code, links to http and https. HTML in it is text. Time grows with the length of the text, whatever it holds.

import { copyButton, h } from "./dom.js";

// So deep lists and quotes are nested; what is deeper is a paragraph.
const DEEPEST = 8;

const FENCE = /^ {0,3}(`{3,}|~{3,})([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6}) +(.*)$/;
const RULE = /^ {0,3}(?:(?:\* *){3,}|(?:- *){3,}|(?:_ *){3,})$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])( +|$)/;
const underlines = (line) => cellsOf(line).every((cell) => /^:?-+:?$/.test(cell));

// Blocks of a text: {kind, source, ...}. A block with the same source looks the same.
export function parse(text, depth = 0) {
  const lines = text.split("\n");
  const blocks = [];
  let at = 0;
  const take = (kind, end, more) => {
    blocks.push({ kind, source: lines.slice(at, end).join("\n"), depth, ...more });
    at = end;
  };
  while (at < lines.length) {
    const line = lines[at];
    let end = at + 1;
    let found;
    if (!line.trim()) {
      at = end;
    } else if ((found = FENCE.exec(line))) {
      const closing = new RegExp(`^ {0,3}\\${found[1][0]}{${found[1].length},}\\s*$`);
      while (end < lines.length && !closing.test(lines[end])) end += 1;
      const code = lines.slice(at + 1, end).join("\n");
      take("code", Math.min(end + 1, lines.length), { language: found[2].trim().split(/\s/, 1)[0], text: code });
    } else if ((found = HEADING.exec(line))) {
      take("heading", end, { level: found[1].length, text: found[2] });
    } else if (RULE.test(line)) {
      take("rule", end);
    } else if (QUOTE.test(line) && depth < DEEPEST) {
      while (end < lines.length && QUOTE.test(lines[end])) end += 1;
      const inner = lines.slice(at, end).map((quoted) => quoted.replace(QUOTE, ""));
      take("quote", end, { text: inner.join("\n") });
    } else if (ITEM.test(line) && depth < DEEPEST) {
      end = endOfList(lines, at);
      take("list", end, listOf(lines.slice(at, end)));
    } else if (line.includes("|") && lines[end]?.includes("|") && underlines(lines[end])) {
      while (end < lines.length && lines[end].includes("|")) end += 1;
      take("table", end, { rows: [line, ...lines.slice(at + 2, end)].map(cellsOf) });
    } else {
      while (end < lines.length && !endsParagraph(lines[end], depth)) end += 1;
      take("paragraph", end, { text: lines.slice(at, end).join("\n") });
    }
  }
  return blocks;
}

function endsParagraph(line, depth) {
  if (!line.trim() || FENCE.test(line) || HEADING.test(line) || RULE.test(line)) return true;
  return depth < DEEPEST && (QUOTE.test(line) || ITEM.test(line));
}

const indentOf = (line) => line.length - line.trimStart().length;

// The first line after the list that begins at `start`: one that is neither item, nor indented, nor continues a line.
function endOfList(lines, start) {
  const outer = indentOf(lines[start]);
  const ordered = /\d/.test(ITEM.exec(lines[start])[2]);
  let end = start + 1;
  while (end < lines.length) {
    const line = lines[end];
    const item = ITEM.exec(line);
    if (!line.trim()) {
      const next = lines[end + 1] ?? "";
      if (!next.trim() || !(ITEM.test(next) || indentOf(next) > outer)) break;
    } else if (item && indentOf(line) <= outer) {
      if (/\d/.test(item[2]) !== ordered || RULE.test(line)) break;
    } else if (indentOf(line) <= outer && (!lines[end - 1].trim() || endsParagraph(line, 0))) {
      break;
    }
    end += 1;
  }
  return end;
}

function listOf(lines) {
  const outer = indentOf(lines[0]);
  const marker = ITEM.exec(lines[0])[2];
  const items = [];
  for (const line of lines) {
    const item = ITEM.exec(line);
    if (item && indentOf(line) <= outer) items.push([line.slice(item[0].length)]);
    else items.at(-1).push(line.slice(Math.min(indentOf(line), outer + marker.length + 1)));
  }
  return { ordered: /\d/.test(marker), first: parseInt(marker, 10), items: items.map((item) => item.join("\n")) };
}

function cellsOf(row) {
  const inner = row.trim().replace(/^\|/, "").replace(/\|$/, "");
  return inner.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

export function nodeOf(block) {
  switch (block.kind) {
    case "code":
      return codeBlock(block.text, block.language);
    case "heading":
      return h(`h${Math.min(6, block.level + 3)}`, {}, ...inline(block.text));
    case "rule":
      return h("hr");
    case "quote":
      return h("blockquote", {}, ...parse(block.text, block.depth + 1).map(nodeOf));
    case "list": {
      const items = block.items.map((item) => h("li", {}, ...itemNodes(parse(item, block.depth + 1))));
      return block.ordered ? h("ol", { start: block.first }, ...items) : h("ul", {}, ...items);
    }
    case "table": {
      const [head, ...body] = block.rows;
      const row = (cells, name) => h("tr", {}, ...cells.map((cell) => h(name, {}, ...inline(cell))));
      const table = h("table", {}, h("thead", {}, row(head, "th")), h("tbody", {}, ...body.map((c) => row(c, "td"))));
      return h("div", { class: "wide" }, table);
    }
    default:
      return h("p", {}, ...inline(block.text));
  }
}

// A paragraph at the start of an item stands on the line of its marker.
function itemNodes(blocks) {
  return blocks.flatMap((block, index) =>
    block.kind === "paragraph" && index === 0 ? inline(block.text) : [nodeOf(block)],
  );
}

export function codeBlock(text, language = "") {
  const head = h("figcaption", {}, h("span", {}, language || "text"), copyButton(() => text));
  return h("figure", { class: "block" }, head, h("pre", { tabindex: 0 }, h("code", {}, text)));
}

const MARKS = [
  ["**", "strong"],
  ["__", "strong"],
  ["~~", "s"],
  ["*", "em"],
  ["_", "em"],
];
const SPECIAL = /[`*_~[\\]/g;
const LINK = /\[([^\][\n]{1,500})\]\((https?:\/\/[^\s()<>]{1,2000})\)/y;
const wordlike = (character) => character !== undefined && /[\p{L}\p{N}_]/u.test(character);

// The nodes of a line of text.
export function inline(text, depth = 0) {
  const nodes = [];
  // Marks that have no end behind some place have none behind a later one.
  const endless = new Set();
  let plain = 0;
  let at = 0;
  const emit = (node, end) => {
    if (at > plain) nodes.push(text.slice(plain, at));
    if (node !== null) nodes.push(node);
    plain = at = end;
  };
  const find = (mark, from) => {
    if (endless.has(mark)) return -1;
    const found = text.indexOf(mark, from);
    if (found < 0) endless.add(mark);
    return found;
  };
  for (;;) {
    SPECIAL.lastIndex = at;
    const special = SPECIAL.exec(text);
    if (!special) break;
    at = special.index;
    if (text[at] === "\\" && /[\\`*_~[\]#|>.!()+-]/.test(text[at + 1] ?? "")) {
      emit(null, at + 1);
      at += 1;
      continue;
    }
    if (text[at] === "`") {
      let ticks = 1;
      while (text[at + ticks] === "`") ticks += 1;
      const end = find("`".repeat(ticks), at + ticks);
      if (end > at + ticks) emit(h("code", {}, text.slice(at + ticks, end)), end + ticks);
      else at += ticks;
      continue;
    }
    if (text[at] === "[") {
      LINK.lastIndex = at;
      const link = LINK.exec(text);
      // Who clicks sees where it goes, and the server's address is told to nobody.
      if (link) {
        const [whole, label, href] = link;
        emit(h("a", { href, title: href, target: "_blank", rel: "noopener noreferrer" }, label), at + whole.length);
      } else at += 1;
      continue;
    }
    const [mark, name] = MARKS.find(([candidate]) => text.startsWith(candidate, at)) ?? ["", ""];
    const begin = at + mark.length;
    const opens = mark && depth < DEEPEST && /\S/.test(text[begin] ?? " ");
    // snake_case_names are no emphasis, nor is 2 * 3.
    const end = opens && !(mark[0] === "_" && wordlike(text[at - 1])) ? find(mark, begin + 1) : -1;
    const closes = end > 0 && /\S/.test(text[end - 1]) && !(mark[0] === "_" && wordlike(text[end + mark.length]));
    if (closes) emit(h(name, {}, ...inline(text.slice(begin, end), depth + 1)), end + mark.length);
    else at = Math.max(begin, at + 1);
  }
  at = text.length;
  emit(null, at);
  return nodes;
}

// Text that grows: what has not changed stays as it is, so that a selection in it does, too.
export class Prose {
  constructor() {
    this.element = h("div", { class: "prose" });
    this.sources = [];
  }

  show(text) {
    const blocks = parse(text);
    let same = 0;
    while (same < blocks.length && blocks[same].source === this.sources[same]) same += 1;
    while (this.element.childNodes.length > same) this.element.lastChild.remove();
    this.element.append(...blocks.slice(same).map(nodeOf));
    this.sources = blocks.map((block) => block.source);
  }
}
