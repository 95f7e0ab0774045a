// The worst tokens of the run; choosing one opens it in its response.

const WORST_PAGE = 25;
const CONTEXT = 6;

function showWorst() {
  const refused = refusal();
  if (refused) return byId("worst").replaceChildren(el("h2", {}, "Worst tokens"), refused);
  const list = index.worst_tokens[state.target] || [];
  const what = index.compared ? "The tokens the two policies disagree on most (largest |\u2113|)." : "The tokens with the lowest logprob.";
  const head = [
    "",
    "token in context",
    ...(index.compared ? ["\u2113"] : []),
    ...(index.hasBehaviour ? ["q"] : []),
    ...(index.hasTargets ? ["p"] : []),
    "response",
  ];
  const body = el("tbody", {});
  const more = el("button", { type: "button", onclick: () => addWorst(list, body, more) }, "Show more");
  const heads = head.map((h, i) => el("th", { scope: "col", class: i > 1 && h !== "response" ? "number" : null }, h));
  byId("worst").replaceChildren(
    el("h2", {}, "Worst tokens"),
    el("p", { class: "note" }, `${what} At most 100 are listed. Choose one to open it in its response.`),
    list.length
      ? el("div", { class: "scroll" }, el("table", { class: "worst" }, el("thead", {}, el("tr", {}, heads)), body))
      : el("p", { class: "empty" }, "No token differs."),
    more,
  );
  addWorst(list, body, more);
}

function addWorst(list, body, more) {
  const from = body.children.length;
  for (let i = from; i < Math.min(from + WORST_PAGE, list.length); i++) body.append(worstRow(i, list[i]));
  more.hidden = body.children.length >= list.length;
}

function worstRow(i, [r, t, q, p]) {
  const button = el(
    "button",
    { type: "button", class: "link context", onclick: () => jumpTo(r, t), "aria-label": `Open token ${t + 1} of ${index.id[r]}` },
    `token ${t + 1}`,
  );
  loadResponse(r).then((response) => button.replaceChildren(...contextOf(response, t)));
  const ratio = num(p) - num(q);
  return el(
    "tr",
    {},
    el("td", { class: "number note" }, i + 1),
    el("td", {}, button),
    index.compared && el("td", { class: `number ${ratio < 0 ? "minus" : "plus"}` }, signed(ratio)),
    index.hasBehaviour && el("td", { class: "number" }, percent(Math.exp(num(q)))),
    index.hasTargets && el("td", { class: "number" }, percent(Math.exp(num(p)))),
    el("td", { class: "note" }, `${inked(String(index.id[r]))} #${index.sample[r] ?? 0}, token\u00a0${t + 1}`),
  );
}

function contextOf(response, t) {
  const text = (from, to) => {
    let joined = "";
    for (let i = Math.max(from, 0); i < Math.min(to, response.length); i++) joined += tokenTextAt(response, i);
    return inked(joined).replaceAll("\n", "\u21b5");
  };
  return [
    el("span", { class: "note" }, text(t - CONTEXT, t)),
    el("mark", {}, quoted(tokenTextAt(response, t))),
    el("span", { class: "note" }, text(t + 1, t + 1 + CONTEXT)),
  ];
}

// Clears the filters when they hide the response.
async function jumpTo(r, t) {
  selectTab("tokens");
  if (!rows.includes(r)) {
    clearFilters();
    await updateList();
  }
  state.page = Math.floor(rows.indexOf(r) / PAGE_SIZE);
  await showPage();
  const response = shownResponses.get(r);
  if (t >= FIRST_TOKENS) expand(response);
  const span = document.querySelector(`.response[data-r="${r}"] .token[data-t="${t}"]`);
  if (!span) return;
  chooseSpan(span);
  span.focus({ preventScroll: true });
  span.scrollIntoView({ block: "center" });
}

function clearFilters() {
  for (const control of byId("tools").elements) {
    if (["sort", "colour", "scale"].includes(control.name)) continue;
    control.value = "";
    state[control.name] = "";
  }
}
