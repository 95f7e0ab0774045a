// Small helpers: elements, numbers, visible text. Model text only ever reaches the page through text nodes.

const SVG_NS = "http://www.w3.org/2000/svg";
const MINUS = "\u2212";
const byId = (id) => document.getElementById(id);

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name.startsWith("--")) node.style.setProperty(name, value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  for (const child of children.flat(Infinity)) if (child !== null && child !== undefined && child !== false) node.append(child);
  return node;
}

const el = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes, ...children) => fill(document.createElementNS(SVG_NS, tag), attributes, children);
const readJson = (id) => JSON.parse(byId(id).textContent);

// Python writes NaN and infinities as strings; a value with an interval is {value, lo, hi}.
function num(x) {
  if (x !== null && typeof x === "object") return num(x.value);
  return x === null || x === undefined || x === "" ? NaN : Number(x);
}

function fmt(x, digits = 3) {
  const value = num(x);
  if (Number.isNaN(value)) return "\u2013";
  if (!Number.isFinite(value)) return (value < 0 ? MINUS : "") + "\u221e";
  const size = Math.abs(value);
  let text;
  if (size === 0) text = "0";
  else if (size < 1e-3 || size >= 1e6)
    text = size
      .toExponential(digits - 1)
      .replace("e+", "e")
      .replace("e-", "e" + MINUS);
  else if (Number.isInteger(size)) text = size.toLocaleString("en-US");
  else text = size >= 1000 ? size.toLocaleString("en-US", { maximumFractionDigits: 1 }) : String(Number(size.toPrecision(digits + 1)));
  return (value < 0 ? MINUS : "") + text;
}

const signed = (x) => (num(x) > 0 ? "+" : "") + fmt(x);

// Exact numbers keep what sets them apart from certainty; rounded ones (the top lists) do not claim it.
function percent(probability, exact = true) {
  if (Number.isNaN(probability)) return "\u2013";
  const value = probability * 100;
  if (value === 0) return "0\u00a0%";
  if (value < 1e-4) return "<0.0001\u00a0%";
  if (value < 1) return `${Number(value.toPrecision(2))}\u00a0%`;
  const near = exact && value >= 99 && value < 100;
  return `${near ? Math.min(Number(value.toFixed(3)), 99.999) : value.toFixed(value < 10 ? 2 : 1)}\u00a0%`;
}

const interval = (x) => (Number.isNaN(num(x && x.lo)) ? "" : `[${fmt(x.lo)}, ${fmt(x.hi)}]`);
const words = (name) => String(name).replaceAll("_", " ");
const plural = (count, noun) => `${count.toLocaleString("en-US")} ${noun}${count === 1 ? "" : "s"}`;

// Characters that have no ink or that reorder the line are written out, joiners only where they stand alone; a newline keeps its break in running text.
const UNSEEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]/gu;
const codePoint = (c) => "\u27e8" + c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0") + "\u27e9";
const inked = (text) => text.replace(/^[\u200c\u200d]+$/, (joiners) => [...joiners].map(codePoint).join("")).replace(UNSEEN, codePoint);
const running = (text) => (text === "" ? "\u2205" : inked(text).replaceAll("\t", "\u2192\t").replaceAll("\n", "\u21b5\n"));
const quoted = (text) => {
  if (text === "") return "\u2205";
  return inked(text).replaceAll("\n", "\u21b5").replaceAll("\t", "\u2192").replaceAll(" ", "\u00b7");
};

function table(caption, head, rows, attributes) {
  const cells = head.map((h, i) => el("th", { scope: "col", class: i ? "number" : null }, h));
  return el(
    "div",
    { class: "scroll" },
    el("table", attributes, caption && el("caption", {}, caption), el("thead", {}, el("tr", {}, cells)), el("tbody", {}, rows)),
  );
}

function option(value, label, chosen) {
  return el("option", { value, selected: chosen }, label);
}
