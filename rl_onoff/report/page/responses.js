// The list of responses: filters, order, pages, and tokens as coloured spans.

const PAGE_SIZE = 10;
const FIRST_TOKENS = 400; // shown of a response before "show all"
const SORTS = {
  worst: ["worst |\u2113| first", (a, b) => largest(index.worst, a, b)],
  mean: ["mean |\u2113|, largest first", (a, b) => Math.abs(statistic(index.mean, b)) - Math.abs(statistic(index.mean, a)) || a - b],
  id: ["id", (a, b) => collator.compare(index.id[a], index.id[b]) || index.sample[a] - index.sample[b]],
  longest: ["longest first", (a, b) => index.length[b] - index.length[a] || a - b],
  shortest: ["shortest first", (a, b) => index.length[a] - index.length[b] || a - b],
  low: ["reward, lowest first", (a, b) => orderly(index.reward[a]) - orderly(index.reward[b]) || a - b],
  high: ["reward, highest first", (a, b) => orderly(index.reward[b]) - orderly(index.reward[a]) || a - b],
};
const collator = new Intl.Collator("en", { numeric: true });
const orderly = (x) => (Number.isNaN(num(x)) ? 0 : num(x));
const rows = [];
let shownResponses = new Map();
let listTurn = 0;

function statistic(columns, r) {
  const value = num((columns[state.target] || [])[r]);
  return Number.isNaN(value) ? -1 : value;
}

function largest(columns, a, b) {
  const [x, y] = [statistic(columns, a), statistic(columns, b)];
  return x === y ? a - b : y - x;
}

// A group column that only repeats the reward.
const isReward = (name) => name === "reward" && index.hasReward;

const statName = () => (index.compared ? "\u2113" : "logprob");

// Behaviour is view 0 and target i is view 1 + i.
const targetView = () => 1 + state.target;

function colourings() {
  const list = [];
  if (index.compared) list.push(["l", "\u2113 = log p \u2212 log q"]);
  if (index.hasBehaviour) list.push(["logprob0", "logprob, behaviour"]);
  if (index.hasTargets) list.push(["logprob1", "logprob, target"]);
  if (index.hasBehaviour) list.push(["entropy0", "entropy, behaviour"]);
  if (index.hasTargets) list.push(["entropy1", "entropy, target"]);
  if (index.hasBehaviour) list.push(["rank0", "rank, behaviour"]);
  if (index.hasTargets) list.push(["rank1", "rank, target"]);
  return list;
}

function showTools() {
  const tool = (label, control) => el("label", {}, el("span", {}, label), control);
  const select = (name, options) => el("select", { name }, options.map(([value, label]) => option(value, label, String(state[name]) === value)));
  const any = ["", "any"];
  const sorts = Object.entries(SORTS).filter(([name]) => !/^(low|high)$/.test(name) || index.hasReward);
  const finishes = [...new Set(index.finish)].filter(Boolean).sort();
  const scales = [["auto", "this run"], ["0.01", "0.01"], ["0.1", "0.1"], ["1", "1"], ["5", "5"]];
  const groups = Object.entries(index.groups).filter(([name]) => !isReward(name));
  const controls = [
    tool("Search", el("input", { type: "search", name: "search", placeholder: "prompt, response or id", autocomplete: "off" })),
    tool("Sort", select("sort", sorts.map(([name, [label]]) => [name, index.compared ? label : label.replace("|\u2113|", "logprob")]))),
    tool("Colour by", select("colour", colourings())),
    index.compared && tool("Full colour at |\u2113|", select("scale", scales)),
    index.hasReward && tool("Reward", select("reward", [any, ["right", "right (> 0)"], ["wrong", "wrong (\u2264 0)"], ["none", "none"]])),
    finishes.length > 1 && tool("Finish", select("finish", [any, ...finishes.map((f) => [f, f])])),
    index.compared && tool("Worst |\u2113| at least", el("input", { type: "number", name: "least", min: 0, step: "any", placeholder: "0" })),
    ...groups.map(([name, { values }]) => tool(words(name), select(`group:${name}`, [any, ...values.map((v, i) => [String(i), v])]))),
  ];
  byId("tools").replaceChildren(...controls.filter(Boolean));
  byId("tools").addEventListener("submit", (event) => event.preventDefault());
  byId("tools").addEventListener("input", (event) => changeTool(event.target));
}

let searchTimer = 0;
function changeTool(control) {
  state[control.name] = control.value;
  if (control.name === "colour" || control.name === "scale") return recolour();
  state.page = 0;
  clearTimeout(searchTimer);
  searchTimer = setTimeout(updateList, control.type === "search" ? 200 : 0);
}

let corpus = null; // lower-case id, prompt and text of every response; made at the first search

async function loadCorpus() {
  if (corpus) return corpus;
  const found = [];
  for (let c = 0; c < index.firstOfChunk.length; c++) {
    for (const row of await inflateJson(`texts-${c}`)) found.push(`${row.prompt}\n${row.text}`.toLowerCase());
  }
  corpus = found.map((text, r) => `${index.id[r]}\n${text}`.toLowerCase());
  return corpus;
}

function passesFilters(r) {
  const reward = num(index.reward[r]);
  if (state.reward === "right" && !(reward > 0)) return false;
  if (state.reward === "wrong" && !(reward <= 0)) return false;
  if (state.reward === "none" && !Number.isNaN(reward)) return false;
  if (state.finish && index.finish[r] !== state.finish) return false;
  if (Number(state.least) > 0 && !(statistic(index.worst, r) >= Number(state.least))) return false;
  return Object.entries(index.groups).every(([name, { codes }]) => !state[`group:${name}`] || codes[r] === Number(state[`group:${name}`]));
}

async function updateList() {
  const turn = ++listTurn;
  const needle = (state.search || "").trim().toLowerCase();
  const texts = needle ? await loadCorpus() : null;
  if (turn !== listTurn) return;
  const found = [];
  for (let r = 0; r < index.id.length; r++) if (passesFilters(r) && (!texts || texts[r].includes(needle))) found.push(r);
  rows.splice(0, rows.length);
  for (const r of found.sort(SORTS[state.sort][1])) rows.push(r);
  await showPage();
}

async function showPage() {
  const turn = ++listTurn;
  const last = Math.max(0, Math.ceil(rows.length / PAGE_SIZE) - 1);
  state.page = Math.min(Math.max(state.page, 0), last);
  const onPage = rows.slice(state.page * PAGE_SIZE, (state.page + 1) * PAGE_SIZE);
  const responses = await Promise.all(onPage.map(loadResponse));
  if (turn !== listTurn) return;
  shownResponses = new Map(responses.map((response) => [response.r, response]));
  byId("list").replaceChildren(...responses.map(responseCard));
  if (!rows.length) byId("list").append(el("p", { class: "empty" }, index.id.length ? "No response passes the filters." : "The run has no responses."));
  showPager("pager", last);
  showPager("pager-bottom", last);
  showLegend();
  announce(pagerText(last));
  document.documentElement.dataset.turn = turn;
}

const pagerText = (last) => `${rows.length.toLocaleString("en-US")} of ${plural(index.id.length, "response")}, page ${state.page + 1} of ${last + 1}`;

function showPager(id, last) {
  const go = (label, page, text) => el("button", {
    type: "button", "aria-label": label, disabled: page < 0 || page > last || page === state.page,
    onclick: () => turnPage(page, id),
  }, text);
  byId(id).replaceChildren(el("span", { class: "count" }, pagerText(last)),
    el("span", { class: "buttons" }, go("First page", 0, "\u00ab"), go("Previous page", state.page - 1, "\u2039 Previous"), go("Next page", state.page + 1, "Next \u203a"), go("Last page", last, "\u00bb")));
}

async function turnPage(page, id) {
  state.page = page;
  await showPage();
  const button = byId(id).querySelector("button:not([disabled])");
  if (id === "pager-bottom") byId("tools").scrollIntoView();
  if (button) button.focus({ preventScroll: true });
}

function responseCard(response) {
  const { r } = response;
  const heading = `response-${r}`;
  const facts = [
    plural(index.length[r], "token"),
    index.compared ? `worst |\u2113| ${fmt(statAt(index.worst, r))}` : `lowest logprob ${fmt(-statAt(index.worst, r))}`,
    `mean ${statName()} ${fmt(statAt(index.mean, r))}`,
    index.reward[r] === null ? null : `reward ${fmt(index.reward[r])}`,
    index.finish[r] && `finish ${index.finish[r]}`,
    ...Object.entries(index.groups).map(([name, { values, codes }]) => codes[r] >= 0 && !isReward(name) && `${words(name)} ${values[codes[r]]}`),
  ].filter(Boolean);
  return el("article", { class: "response", "aria-labelledby": heading, "data-r": r },
    el("header", {},
      el("h3", { id: heading }, inked(index.id[r]), index.sample[r] !== null && el("span", { class: "note" }, ` sample ${index.sample[r]}`)),
      el("ul", { class: "chips" }, facts.map((fact) => el("li", {}, inked(fact))))),
    response.prompt && el("details", { class: "prompt" }, el("summary", {}, "Prompt"), el("pre", { dir: "auto" }, inkedLines(response.prompt))),
    tokenBox(response, FIRST_TOKENS));
}

const statAt = (columns, r) => num((columns[state.target] || [])[r]);
const inkedLines = (text) => text.split("\n").map(inked).join("\n");

function tokenBox(response, most) {
  if (!response.length) return el("p", { class: "empty" }, "An empty response.");
  const shown = Math.min(response.length, most);
  const box = el("div", { class: "tokens", role: "listbox", "aria-orientation": "horizontal", dir: "auto", "aria-label": `Tokens of ${index.id[response.r]}: arrow keys move, Enter opens`, onclick: clickToken, onkeydown: keyToken });
  for (let t = 0; t < shown; t++) box.append(tokenSpan(response, t));
  if (shown === response.length) return box;
  const button = el("button", { type: "button", class: "link", onclick: () => expand(response) }, `Show all ${plural(response.length, "token")}`);
  return el("div", {}, box, button);
}

function expand(response) {
  const card = document.querySelector(`.response[data-r="${response.r}"]`);
  card.lastElementChild.replaceWith(tokenBox(response, Infinity));
}

function tokenSpan(response, t) {
  const span = el("span", { class: "token", role: "option", "aria-selected": "false", tabindex: t ? -1 : 0, "data-t": t }, running(tokenTextAt(response, t)));
  paint(span, response, t);
  return span;
}

// What a colouring says of a token: its number, and a strength from -1 (red) to 1 (blue).
function colourOf(response, t) {
  const v = state.colour.endsWith("0") ? 0 : targetView();
  if (state.colour === "l") {
    const ratio = ratioAt(response, v, t);
    return { value: ratio, strength: Math.max(-1, Math.min(1, ratio / ratioScale())) };
  }
  if (state.colour.startsWith("logprob")) return { value: logprobAt(response, v, t), strength: Math.max(-1, logprobAt(response, v, t) / 8) };
  if (state.colour.startsWith("entropy")) return { value: entropyAt(response, v, t), strength: Math.min(1, entropyAt(response, v, t) / 4) };
  const rank = rankAt(response, v, t);
  return { value: rank, strength: -Math.min(1, Math.log2(rank) / 8) };
}

// "This run": the median over responses of their worst |\u2113|, so that a typical worst token has full colour.
function ratioScale() {
  return state.scale === "auto" ? index.scales[state.target] || 1 : Number(state.scale);
}

function paint(span, response, t) {
  const { value, strength } = colourOf(response, t);
  const share = Math.sqrt(Math.abs(strength)) * 62;
  span.classList.toggle("minus", strength < 0);
  span.classList.toggle("plus", strength > 0);
  span.style.setProperty("--share", `${Number.isNaN(share) ? 0 : share.toFixed(1)}%`);
  span.setAttribute("aria-label", `${quoted(tokenTextAt(response, t))}, ${colourName() === "l" ? "\u2113" : colourName()} ${fmt(value)}`);
}

const colourName = () => (state.colour === "l" ? "l" : state.colour.replace(/\d$/, ""));

function recolour() {
  for (const card of document.querySelectorAll(".response")) {
    const response = shownResponses.get(Number(card.dataset.r));
    for (const span of card.querySelectorAll(".token")) paint(span, response, Number(span.dataset.t));
  }
  showLegend();
}

function showLegend() {
  const legends = {
    l: [MINUS + fmt(ratioScale()), "0", "+" + fmt(ratioScale()), "red: the target finds it less likely than who sampled it; blue: more likely", "both"],
    logprob: ["0", MINUS + "4", MINUS + "8 nats", "the redder, the less likely", "minus"],
    entropy: ["0", "2", "4 nats", "the bluer, the less certain", "plus"],
    rank: ["1", "16", "256", "the redder, the further from the likeliest token", "minus"],
  };
  const [a, b, c, says, css] = legends[colourName()];
  byId("legend").replaceChildren(
    el("span", { class: "scale" }, el("span", {}, a), el("span", { class: `ramp ${css}`, "aria-hidden": "true" }), el("span", {}, c)),
    el("span", { class: "note" }, says, colourName() === "l" ? "" : ` (middle: ${b})`));
}

function announce(text) {
  byId("announce").textContent = text;
}
