// What a token's colour says, and the legend that explains it.

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

// What a colouring says of a token: its number, and a strength from -1 (red) to 1 (blue).
function colourOf(response, t) {
  const v = state.colour.endsWith("0") ? 0 : targetView();
  if (state.colour === "l") {
    const ratio = ratioAt(response, v, t);
    return { value: ratio, strength: Math.max(-1, Math.min(1, ratio / ratioScale())) };
  }
  if (state.colour.startsWith("logprob"))
    return { value: logprobAt(response, v, t), strength: Math.max(-1, logprobAt(response, v, t) / 8) };
  if (state.colour.startsWith("entropy")) return { value: entropyAt(response, v, t), strength: Math.min(1, entropyAt(response, v, t) / 4) };
  const rank = rankAt(response, v, t);
  return { value: rank, strength: -Math.min(1, Math.log2(rank) / 8) };
}

// "This run": the median over responses of their worst |\u2113|, so that a typical worst token has full colour.
function ratioScale() {
  return state.scale === "auto" ? index.scales[state.target] || 1 : Number(state.scale);
}

const CONTEXT_ONLY = "not sampled by the policy: context only";

function paint(span, response, t) {
  if (isContext(response, t)) {
    span.classList.add("unsampled");
    span.title = CONTEXT_ONLY;
    span.setAttribute("aria-label", `${quoted(tokenTextAt(response, t))}, ${CONTEXT_ONLY}`);
    return;
  }
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
    l: [
      MINUS + fmt(ratioScale()),
      "0",
      "+" + fmt(ratioScale()),
      "red: the target finds it less likely than who sampled it; blue: more likely",
      "both",
    ],
    logprob: ["0", MINUS + "4", MINUS + "8 nats", "the redder, the less likely", "minus"],
    entropy: ["0", "2", "4 nats", "the bluer, the less certain", "plus"],
    rank: ["1", "16", "256", "the redder, the further from the likeliest token", "minus"],
  };
  const [a, b, c, says, css] = legends[colourName()];
  byId("legend").replaceChildren(
    el("span", { class: "scale" }, el("span", {}, a), el("span", { class: `ramp ${css}`, "aria-hidden": "true" }), el("span", {}, c)),
    el("span", { class: "note" }, says, colourName() === "l" ? "" : ` (middle: ${b})`),
    index.context ? el("span", { class: "note" }, `grey: ${CONTEXT_ONLY}`) : "",
  );
}
