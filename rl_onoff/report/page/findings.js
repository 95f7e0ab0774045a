// What the checks of the data found: faults that leave no number to show, and responses that were set aside.

const findingsOf = (compared) => (compared && compared.findings) || [];
const isComparable = (compared) => (compared || {}).comparable !== false && !findingsOf(compared).some((found) => found.fatal);

// The sentence that stands where numbers would; null where there are numbers.
function refusal() {
  if (isComparable(comparison())) return null;
  const reasons = findingsOf(comparison()).filter((found) => found.fatal);
  const because = reasons.map(({ what }) => inked(String(what))).join("; ");
  return el("p", { class: "warning refused" }, `Not comparable, so no metric is shown${because && ": "}${because}.`);
}

function showFindings() {
  const found = [...findingsOf(comparison())].sort((a, b) => Boolean(b.fatal) - Boolean(a.fatal));
  const list = el("ul", { class: "findings", "aria-label": "What the checks of the data found" }, found.map(findingLine));
  byId("findings").replaceChildren(...(found.length ? [list] : []));
}

function findingLine({ what, fix, responses, tokens, example, fatal }) {
  const many = `${plural(num(tokens), "token")} of ${num(responses).toLocaleString("en-US")}`;
  const known = !String(what).includes(many) && num(responses) > 0;
  return el(
    "li",
    { class: fatal ? "fatal" : null },
    el("strong", {}, fatal ? "No number is headlined: " : "Set aside: "),
    inked(String(what)),
    known && `: ${plural(num(tokens), "token")} of ${plural(num(responses), "response")}`,
    example && [" (first in ", exampleLink(String(example)), ")"],
    fix && `. What to do: ${inked(String(fix))}.`,
  );
}

function exampleLink(example) {
  const [, key, t] = /^([^]*?\/\d+)(?: at token (\d+)|: [^]*)?$/.exec(example) || [];
  return responseLink(key, example, t && Number(t));
}

// A response's name, `request id/sample`: a link where the page holds the response. Without a token, the worst one is opened.
function responseLink(key, label, t) {
  const r = rowOfKey(key);
  if (r === undefined) return el("span", { title: "This response is not in the page." }, inked(label));
  return el("button", { type: "button", class: "link", onclick: () => openResponse(r, t) }, inked(label));
}

const responseKey = (r) => `${index.id[r]}/${index.sample[r] ?? 0}`;
const isSetAside = (r) => (comparison().set_aside || []).includes(responseKey(r));
let rowsByKey = null;

function rowOfKey(key) {
  rowsByKey ??= new Map(index.id.map((_, r) => [responseKey(r), r]));
  return rowsByKey.get(key);
}

async function openResponse(r, t) {
  await jumpTo(r, t ?? worstTokenOf(await loadResponse(r)));
}

function worstTokenOf(response) {
  let [worst, most] = [0, -1];
  for (let t = 0; t < response.length; t++) {
    const size = Math.abs(ratioAt(response, targetView(), t));
    if (size > most) [worst, most] = [t, size];
  }
  return worst;
}
