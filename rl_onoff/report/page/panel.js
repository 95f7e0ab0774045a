// The chosen token: moving between tokens, and the panel with both top-k lists side by side.

let chosen = null; // {response, t}

function clickToken(event) {
  const span = event.target.closest(".token");
  if (span) chooseSpan(span);
}

function keyToken(event) {
  const span = event.target.closest(".token");
  if (!span || event.ctrlKey || event.metaKey || event.altKey) return;
  const spans = [...span.parentElement.children];
  const at = spans.indexOf(span);
  const goals = {
    ArrowRight: at + 1,
    ArrowLeft: at - 1,
    Home: 0,
    End: spans.length - 1,
    ArrowDown: lineAway(spans, at, 1),
    ArrowUp: lineAway(spans, at, -1),
  };
  if (event.key in goals) {
    event.preventDefault();
    moveTo(spans[Math.min(Math.max(goals[event.key], 0), spans.length - 1)]);
  } else if (event.key === "Enter" || event.key === " ") {
    event.preventDefault();
    chooseSpan(span);
  } else if (event.key === "Escape") closePanel();
}

// The token nearest in x on the next line up or down.
function lineAway(spans, at, step) {
  const here = spans[at].getBoundingClientRect();
  let best = at;
  for (let i = at + step; i >= 0 && i < spans.length; i += step) {
    const rect = spans[i].getBoundingClientRect();
    const lines = Math.abs(rect.top - here.top) / (here.height || 1);
    if (lines < 0.5) continue;
    const bestRect = spans[best].getBoundingClientRect();
    if (best !== at && Math.abs(rect.top - bestRect.top) > 2) break;
    if (best === at || Math.abs(rect.left - here.left) < Math.abs(bestRect.left - here.left)) best = i;
  }
  return best;
}

function moveTo(span) {
  for (const other of span.parentElement.querySelectorAll('[tabindex="0"]')) other.tabIndex = -1;
  span.tabIndex = 0;
  span.focus();
  if (chosen) chooseSpan(span);
}

function chooseSpan(span) {
  const r = Number(span.closest(".response").dataset.r);
  for (const other of document.querySelectorAll('.token[aria-selected="true"]')) other.setAttribute("aria-selected", "false");
  for (const other of span.parentElement.querySelectorAll('[tabindex="0"]')) other.tabIndex = -1;
  span.tabIndex = 0;
  span.setAttribute("aria-selected", "true");
  chosen = { response: shownResponses.get(r), t: Number(span.dataset.t) };
  showPanel();
  span.scrollIntoView({ block: "nearest" });
  history.replaceState(null, "", `#token-${r}-${chosen.t}`);
}

function chosenSpan() {
  return chosen && document.querySelector(`.response[data-r="${chosen.response.r}"] .token[data-t="${chosen.t}"]`);
}

function closePanel() {
  const span = chosenSpan();
  chosen = null;
  showPanel();
  if (span) {
    span.setAttribute("aria-selected", "false");
    span.focus();
  }
}

function stepToken(step) {
  const span = chosenSpan();
  const next = span && span.parentElement.children[[...span.parentElement.children].indexOf(span) + step];
  if (!next) return;
  chooseSpan(next);
}

function showPanel() {
  const panel = byId("panel");
  panel.classList.toggle("open", Boolean(chosen));
  if (!chosen)
    return panel.replaceChildren(
      el("p", { class: "empty" }, "Choose a token to see what each policy thought of it. Arrow keys move, Enter opens, Escape closes."),
    );
  const { response, t } = chosen;
  announce(panelSentence(response, t));
  if (isContext(response, t)) return panel.replaceChildren(panelHeader(response, t), el("p", { class: "note" }, CONTEXT_ONLY));
  const views = [index.hasBehaviour && 0, index.hasTargets && targetView()].filter((v) => v !== false);
  const facts = [numbersTable(response, t, views), ratioLine(response, t)];
  const lists = [listsOf(response, t, views), limitNote(response, views)];
  panel.replaceChildren(
    panelHeader(response, t),
    el("div", { class: "halves" }, el("div", {}, facts), el("div", { class: "both-lists" }, lists), otherTargets(response, t)),
  );
}

function panelSentence(response, t) {
  const parts = [`Token ${t + 1}, ${quoted(tokenTextAt(response, t))}`];
  if (isContext(response, t)) return `${parts[0]}, ${CONTEXT_ONLY}`;
  if (index.hasBehaviour) parts.push(`behaviour ${percent(Math.exp(logprobAt(response, 0, t)))}`);
  if (index.hasTargets) parts.push(`target ${percent(Math.exp(logprobAt(response, targetView(), t)))}`);
  if (index.compared) parts.push(`\u2113 ${fmt(ratioAt(response, targetView(), t))}`);
  return parts.join(", ");
}

function panelHeader(response, t) {
  const button = (label, text, action, disabled) =>
    el("button", { type: "button", "aria-label": label, title: label, onclick: action, disabled }, text);
  return el(
    "header",
    {},
    el("h2", {}, el("code", {}, quoted(tokenTextAt(response, t)))),
    el(
      "span",
      { class: "buttons" },
      button("Previous token", "\u2039", () => stepToken(-1), t === 0),
      button("Next token", "\u203a", () => stepToken(1), t + 1 === response.length),
      button("Close", "\u00d7", closePanel),
    ),
    el(
      "p",
      { class: "note" },
      `token ${t + 1} of ${response.length} \u00b7 id ${tokenIdAt(response, t)} \u00b7 ${inked(String(index.id[response.r]))} sample ${index.sample[response.r] ?? 0}`,
    ),
  );
}

function viewHead(v) {
  return el("span", { class: `role s${v ? 1 : 0}` }, v ? "target p" : "behaviour q");
}

function numbersTable(response, t, views) {
  const row = (name, key, get) => {
    const values = views.map((v) => get(v));
    if (values.every((x) => Number.isNaN(x))) return null;
    const show = key === "probability" ? percent : (x) => fmt(x, 4);
    return el(
      "tr",
      {},
      el("th", { scope: "row" }, name),
      values.map((x, i) => el("td", { class: "number", "data-is": `${key}${views[i] ? 1 : 0}`, title: String(x) }, show(x))),
    );
  };
  const body = [
    row("probability", "probability", (v) => Math.exp(logprobAt(response, v, t))),
    row("logprob", "logprob", (v) => logprobAt(response, v, t)),
    row("rank", "rank", (v) => rankAt(response, v, t)),
    row("entropy", "entropy", (v) => entropyAt(response, v, t)),
  ].filter(Boolean);
  return table(null, ["", ...views.map(viewHead)], body, {
    class: "numbers-of-token",
    "aria-label": "The sampled token under each policy",
  });
}

function ratioLine(response, t) {
  if (!index.compared) return null;
  const ratio = ratioAt(response, targetView(), t);
  const css = ratio < 0 ? "minus" : ratio > 0 ? "plus" : "";
  const says = Number.isNaN(ratio)
    ? "cannot be compared"
    : !Number.isFinite(ratio)
      ? "one policy finds it impossible; the metrics count \u00b120"
      : ratio < 0
        ? "the target finds it less likely"
        : ratio > 0
          ? "the target finds it more likely"
          : "no difference";
  return el(
    "p",
    { class: "ratio" },
    el("span", {}, "\u2113 ", el("strong", { class: css, "data-is": "l", title: String(ratio) }, signed(ratio))),
    el("span", {}, "\u03c1 ", el("strong", { "data-is": "rho", title: String(Math.exp(ratio)) }, fmt(Math.exp(ratio), 4))),
    el("span", { class: "note" }, says),
  );
}

function listsOf(response, t, views) {
  const token = tokenIdAt(response, t);
  const lists = views.map((v) => [v, topListAt(response, v, t)]).filter(([, list]) => list);
  if (!lists.length) return response.chunk.header.k ? el("p", { class: "note" }, "No top tokens were stored for this response.") : null;
  if (response.chunk.header.share < 1 && lists.every(([, list]) => !list.length)) return null;
  return el(
    "div",
    { class: "lists" },
    lists.map(([v, list]) => topTable(response, t, v, list, token)),
  );
}

function topTable(response, t, v, list, token) {
  const line = ({ id, probability, exact }, place) => {
    const isChosen = id === token;
    return el(
      "tr",
      {
        class: isChosen ? "sampled" : null,
        "data-id": id,
        "aria-current": isChosen ? "true" : null,
        onmouseenter: () => markSame(id),
        onmouseleave: () => markSame(null),
      },
      el("td", { class: "place" }, place),
      el(
        "th",
        { scope: "row", title: `id ${id}` },
        el("code", { dir: "auto" }, quoted(isChosen ? tokenTextAt(response, t) : textOfId(id))),
        isChosen && el("span", { class: "visually-hidden" }, " (sampled)"),
      ),
      el("td", { class: "number share", "--share": `${(probability * 100).toFixed(2)}%` }, percent(probability, exact)),
    );
  };
  const lines = list.map((entry, i) => line(entry, i + 1));
  if (!list.some((entry) => entry.id === token)) {
    const probability = Math.exp(logprobAt(response, v, t));
    const rank = rankAt(response, v, t);
    if (list.length) lines.push(el("tr", { class: "gap", "aria-hidden": "true" }, el("td", { colspan: 3 }, "\u22ee")));
    lines.push(line({ id: token, probability, exact: true }, Number.isNaN(rank) ? "" : rank));
  }
  const caption = v ? "target p" : "behaviour q";
  return el(
    "table",
    { class: `top-list s${v ? 1 : 0}` },
    el("caption", {}, caption),
    el("colgroup", {}, el("col", { class: "place-column" }), el("col"), el("col", { class: "share-column" })),
    el(
      "thead",
      { class: "visually-hidden" },
      el(
        "tr",
        {},
        ["place", "token", "probability"].map((h) => el("th", { scope: "col" }, h)),
      ),
    ),
    el("tbody", {}, lines),
  );
}

function markSame(id) {
  for (const row of byId("panel").querySelectorAll(".top-list tr"))
    row.classList.toggle("same", id !== null && row.dataset.id === String(id));
}

function otherTargets(response, t) {
  if (index.mean.length < 2 || !index.hasTargets) return null;
  const rows_ = index.mean.map((_, i) =>
    el(
      "tr",
      { class: i === state.target ? "current" : null },
      el("th", { scope: "row" }, targetName(i)),
      el("td", { class: "number" }, percent(Math.exp(logprobAt(response, 1 + i, t)))),
      index.compared && el("td", { class: "number" }, signed(ratioAt(response, 1 + i, t))),
    ),
  );
  return table("All targets", ["", "p", ...(index.compared ? ["\u2113"] : [])], rows_, { class: "others" });
}

function limitNote(response, views) {
  const { k, min_probability: least, share } = response.chunk.header;
  if (!views.some((v) => response.chunk.lists[v]) && k) return null;
  if (!k) return el("p", { class: "note" }, "Top tokens are left out for this response to keep the file small.");
  if (!least) return null;
  const which = share < 1 ? `only the ${percent(share)} of tokens that differ most have lists; they` : "lists";
  return el("p", { class: "note" }, `To keep the file small, ${which} hold at most ${k} tokens of ${percent(least)} or more.`);
}
