// The list of responses: its order, its pages, and a response's tokens as spans.

const PAGE_SIZE = 10;
const FIRST_TOKENS = 400; // shown of a response before "show all"
const SORTS = {
  worst: ["worst |\u2113| first", (a, b) => largest(index.worst, a, b)],
  mean: ["mean |\u2113|, largest first", (a, b) => largest(index.mean, a, b)],
  id: ["id", (a, b) => collator.compare(index.id[a], index.id[b]) || index.sample[a] - index.sample[b]],
  longest: ["longest first", (a, b) => sampledLength(b) - sampledLength(a) || a - b],
  shortest: ["shortest first", (a, b) => sampledLength(a) - sampledLength(b) || a - b],
  low: ["reward, lowest first", (a, b) => orderly(index.reward[a]) - orderly(index.reward[b]) || a - b],
  high: ["reward, highest first", (a, b) => orderly(index.reward[b]) - orderly(index.reward[a]) || a - b],
};
const collator = new Intl.Collator("en", { numeric: true });
const contextLength = (r) => index.context?.[r] ?? 0;
const sampledLength = (r) => index.length[r] - contextLength(r);
const orderly = (x) => (Number.isNaN(num(x)) ? 0 : num(x));
const rows = [];
let shownResponses = new Map();
let listTurn = 0;

function statistic(columns, r) {
  const size = Math.abs(statAt(columns, r));
  return Number.isNaN(size) ? -1 : size;
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
  if (!rows.length)
    byId("list").append(el("p", { class: "empty" }, index.id.length ? "No response passes the filters." : "The run has no responses."));
  showPager("pager", last);
  showPager("pager-bottom", last);
  showLegend();
  announce(pagerText(last));
  document.documentElement.dataset.turn = turn;
}

const pagerText = (last) =>
  `${rows.length.toLocaleString("en-US")} of ${plural(index.id.length, "response")}, page ${state.page + 1} of ${last + 1}`;

function showPager(id, last) {
  const go = (label, page, text) =>
    el(
      "button",
      {
        type: "button",
        "aria-label": label,
        disabled: page < 0 || page > last || page === state.page,
        onclick: () => turnPage(page, id),
      },
      text,
    );
  byId(id).replaceChildren(
    el("span", { class: "count" }, pagerText(last)),
    el(
      "span",
      { class: "buttons" },
      go("First page", 0, "\u00ab"),
      go("Previous page", state.page - 1, "\u2039 Previous"),
      go("Next page", state.page + 1, "Next \u203a"),
      go("Last page", last, "\u00bb"),
    ),
  );
}

async function turnPage(page, id) {
  state.page = page;
  await showPage();
  const button = byId(id).querySelector("button:not([disabled])");
  if (id === "pager-bottom") byId("tools").scrollIntoView();
  if (button) button.focus({ preventScroll: true });
}

const numbersOf = (r) => [
  index.compared ? `worst |\u2113| ${fmt(statAt(index.worst, r))}` : `lowest logprob ${fmt(-statAt(index.worst, r))}`,
  `mean ${statName()} ${fmt(statAt(index.mean, r))}`,
];

function responseCard(response) {
  const { r } = response;
  const heading = `response-${r}`;
  const facts = [
    plural(sampledLength(r), contextLength(r) ? "sampled token" : "token"),
    contextLength(r) > 0 && `${contextLength(r).toLocaleString("en-US")} of context`,
    ...(isSetAside(r) ? ["set aside, in no metric"] : numbersOf(r)),
    index.reward[r] === null ? null : `reward ${fmt(index.reward[r])}`,
    index.finish[r] && `finish ${index.finish[r]}`,
    ...Object.entries(index.groups).map(
      ([name, { values, codes }]) => codes[r] >= 0 && !isReward(name) && `${words(name)} ${values[codes[r]]}`,
    ),
  ].filter(Boolean);
  return el(
    "article",
    { class: "response", "aria-labelledby": heading, "data-r": r },
    el(
      "header",
      {},
      el(
        "h3",
        { id: heading },
        inked(index.id[r]),
        index.sample[r] !== null && el("span", { class: "note" }, ` sample ${index.sample[r]}`),
      ),
      el(
        "ul",
        { class: "chips" },
        facts.map((fact) => el("li", {}, inked(fact))),
      ),
    ),
    response.prompt &&
      el("details", { class: "prompt" }, el("summary", {}, "Prompt"), el("pre", { dir: "auto" }, inkedLines(response.prompt))),
    tokenBox(response, FIRST_TOKENS),
  );
}

const statAt = (columns, r) => num((columns[state.target] || [])[r]);
const inkedLines = (text) => text.split("\n").map(inked).join("\n");

function tokenBox(response, most) {
  if (!response.length) return el("p", { class: "empty" }, "An empty response.");
  const shown = Math.min(response.length, most);
  const box = el("div", {
    class: "tokens",
    role: "listbox",
    "aria-orientation": "horizontal",
    dir: "auto",
    "aria-label": `Tokens of ${index.id[response.r]}: arrow keys move, Enter opens`,
    onclick: clickToken,
    onkeydown: keyToken,
  });
  for (let t = 0; t < shown; t++) box.append(tokenSpan(response, t));
  if (shown === response.length) return box;
  const button = el(
    "button",
    { type: "button", class: "link", onclick: () => expand(response) },
    `Show all ${plural(response.length, "token")}`,
  );
  return el("div", {}, box, button);
}

function expand(response) {
  const card = document.querySelector(`.response[data-r="${response.r}"]`);
  card.lastElementChild.replaceWith(tokenBox(response, Infinity));
}

function tokenSpan(response, t) {
  const span = el(
    "span",
    { class: "token", role: "option", "aria-selected": "false", tabindex: t ? -1 : 0, "data-t": t },
    running(tokenTextAt(response, t)),
  );
  paint(span, response, t);
  return span;
}

function announce(text) {
  byId("announce").textContent = text;
}
