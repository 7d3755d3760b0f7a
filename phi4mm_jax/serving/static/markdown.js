/**
 * The little Markdown that models write, as DOM nodes: paragraphs, headings, lists, code, bold and italic text. What a
 * model writes becomes text nodes, never HTML; links stay the text they are.
 */

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^\s`]*)[^`]*$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)[\s#]*$/;
const RULE = /^ {0,3}([-*_])(\s*\1){2,}\s*$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])(?:\s+|$)/;
const INLINE = new RegExp(
  [
    /\\([\\`*_#])/, // 1: an escaped sign
    /(`+)(?!`)(.+?)(?<!`)\2(?!`)/, // 3: code
    /\*\*(?=\S)(.+?)(?<=\S)\*\*(?!\*)/, // 4: bold
    /(?<!\w)__(?=\S)(.+?)(?<=\S)__(?!\w)/, // 5: bold
    /\*(?=[^\s*])(.+?)(?<=[^\s*])\*(?!\*)/, // 6: italic
    /(?<!\w)_(?=[^\s_])(.+?)(?<=[^\s_])_(?!\w)/, // 7: italic
  ]
    .map((rule) => rule.source)
    .join("|"),
  "gs",
);

/**
 * Shows text in an element. Blocks that are the same as before keep their nodes, so a growing text costs little and
 * what is selected above its end stays selected.
 *
 * @param {Element} parent
 * @param {string} text
 */
export function render(parent, text) {
  const blocks = splitBlocks(text);
  blocks.forEach((source, i) => {
    const old = /** @type {Element & {source?: string}} */ (parent.children[i]);
    if (old?.source === source) return;
    const node = Object.assign(block(source), { source });
    old ? old.replaceWith(node) : parent.append(node);
  });
  while (parent.children.length > blocks.length) parent.lastChild.remove();
}

/** @param {string} text */
function splitBlocks(text) {
  const lines = text.split(/\r?\n/);
  const blocks = [];
  for (let i = 0, end; i < lines.length; i = end) {
    end = lines[i].trim() ? blockEnd(lines, i) : i + 1;
    if (lines[i].trim()) blocks.push(lines.slice(i, end).join("\n"));
  }
  return blocks;
}

const isItem = (/** @type {string} */ line) => ITEM.test(line) && !RULE.test(line);
const startsBlock = (/** @type {string} */ line) => [FENCE, HEADING, RULE, ITEM].some((rule) => rule.test(line));
const closing = (/** @type {RegExpMatchArray} */ fence) => new RegExp(`^ {0,3}${fence[1]}[${fence[1][0]}]*\\s*$`);

/** The line behind the block that begins at line `i`. @param {string[]} lines @param {number} i */
function blockEnd(lines, i) {
  const first = lines[i++];
  const fence = first.match(FENCE);
  if (fence) {
    while (i < lines.length && !closing(fence).test(lines[i])) i++;
    return i + 1;
  }
  if (isItem(first)) return listEnd(lines, i);
  if (HEADING.test(first) || RULE.test(first)) return i;
  while (i < lines.length && lines[i].trim() && !startsBlock(lines[i])) i++;
  return i;
}

/** The line behind a list whose first line is the one before `end`. @param {string[]} lines @param {number} end */
function listEnd(lines, end) {
  const [, indent, marker] = lines[end - 1].match(ITEM);
  for (let i = end; i < lines.length; i++) {
    if (!lines[i].trim()) continue;
    const item = isItem(lines[i]) && lines[i].match(ITEM);
    const sibling = item && /\d/.test(item[2]) === /\d/.test(marker);
    const inside = /^\s*/.exec(lines[i])[0].length >= indent.length + 2;
    const sameParagraph = i === end && !startsBlock(lines[i]);
    if (!sibling && !inside && !sameParagraph) break;
    end = i + 1;
  }
  return end;
}

/** @param {string} source */
function block(source) {
  const lines = source.split("\n");
  const fence = lines[0].match(FENCE);
  if (fence) {
    const closed = lines.length > 1 && closing(fence).test(lines.at(-1));
    return code(fence[2], lines.slice(1, closed ? -1 : undefined));
  }
  if (isItem(lines[0])) return list(lines);
  if (RULE.test(source)) return document.createElement("hr");
  const heading = source.match(HEADING);
  return heading ? inline(`h${Math.min(heading[1].length + 2, 6)}`, heading[2]) : inline("p", source.trim());
}

/** @param {string} language @param {string[]} lines */
function code(language, lines) {
  const template = /** @type {HTMLTemplateElement} */ (document.getElementById("code"));
  const node = /** @type {Element} */ (template.content.firstElementChild.cloneNode(true));
  node.querySelector("figcaption span").textContent = language || "code";
  node.querySelector("code").textContent = lines.join("\n");
  return node;
}

/** @param {string[]} lines */
function list(lines) {
  const [, indent, marker] = lines[0].match(ITEM);
  const node = document.createElement(/\d/.test(marker) ? "ol" : "ul");
  if (node instanceof HTMLOListElement) node.start = parseInt(marker);
  /** @type {string[][]} */
  const items = [];
  let width = 0;
  for (const line of lines) {
    const item = isItem(line) && line.match(ITEM);
    if (item && item[1].length < indent.length + 2) {
      width = item[0].length;
      items.push([line.slice(width)]);
    } else {
      items.at(-1).push(line.replace(new RegExp(`^ {0,${width}}`), ""));
    }
  }
  for (const item of items) {
    const child = node.appendChild(document.createElement("li"));
    render(child, item.join("\n"));
    const first = child.firstElementChild;
    if (first instanceof HTMLParagraphElement) first.replaceWith(...first.childNodes);
  }
  return node;
}

/** An element with the text's code, bold and italic parts. @param {string} tag @param {string} text */
function inline(tag, text) {
  const node = document.createElement(tag);
  let end = 0;
  for (const match of text.matchAll(INLINE)) {
    const [whole, escaped, , code, bold, bold2, italic, italic2] = match;
    node.append(text.slice(end, match.index));
    if (escaped) node.append(escaped);
    else if (code) node.appendChild(document.createElement("code")).textContent = code.trim() || code;
    else node.append(bold ?? bold2 ? inline("strong", bold ?? bold2) : inline("em", italic ?? italic2));
    end = match.index + whole.length;
  }
  node.append(text.slice(end));
  return node;
}
