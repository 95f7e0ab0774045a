// Metrics over training steps, and by how stale the sampler's weights were; a chosen step lists its worst responses.

const OVER = [
  { name: "kl_k3", label: "k3 KL", unit: "nats a token", floor: 0 },
  { name: "ess_token", label: "Effective sample size", unit: "share of the tokens" },
  { name: "logprob_diff_mean", label: "Mean |\u2113|", unit: "nats", floor: 0 },
  {
    name: "entropy",
    label: "Entropy",
    unit: "nats",
    parts: [
      ["entropy_behaviour", "behaviour", "s0"],
      ["entropy_target", "target", "s1"],
    ],
  },
  { name: "reward", label: "Reward", unit: "mean" },
  { name: "fraction_outside", label: "Share outside the PPO bounds", unit: "share of the tokens", floor: 0 },
];
const partsOf = ({ name, label, parts }) => parts || [[name, label, "s1"]];
const metricAt = (entry, name) => (entry.metrics || {})[name];
const measuredOf = (metric, entries) => partsOf(metric).filter(([name]) => entries.some((e) => Number.isFinite(num(metricAt(e, name)))));

function showSteps() {
  const { steps, staleness, departure } = comparison();
  const offered = OVER.filter((metric) => measuredOf(metric, steps || []).length);
  if ((steps || []).length < 2 || !offered.length || !isComparable(comparison())) return byId("steps").replaceChildren();
  const charts = el("div", { class: "over" });
  const choice = el(
    "select",
    {
      onchange: (event) => {
        state.over = event.target.value;
        draw();
      },
    },
    offered.map(({ name, label }) => option(name, label, name === state.over)),
  );
  let shown = ["step", firstChoice(steps, departure)];
  const draw = () => {
    const metric = offered.find(({ name }) => name === state.over) || offered[0];
    const list = el("div", { class: "step-worst" });
    const kinds = [["step", steps], ["staleness", staleness || []]].filter(([, entries]) => entries.length > 1 && measuredOf(metric, entries).length);
    const move = {};
    const choose = (kind, at) => {
      shown = [kind, at];
      for (const [other] of kinds) move[other](other === kind ? at : null);
      showWorstOfStep(list, kind, (kind === "step" ? steps : staleness)[at]);
    };
    const figures = kinds.map(([kind, entries]) => {
      const [drawing, moveTo] = stepChart(kind, entries, metric, kind === "step" ? departure : null, (at) => choose(kind, at));
      move[kind] = moveTo;
      return stepFigure(kind, entries, metric, drawing);
    });
    charts.replaceChildren(...figures, list);
    choose(...(move[shown[0]] ? shown : ["step", firstChoice(steps, departure)]));
  };
  draw();
  byId("steps").replaceChildren(
    el("h2", {}, "Over training steps"),
    departure && departure.sentence ? el("p", { class: "warning" }, inked(String(departure.sentence))) : "",
    el("label", {}, "Show ", choice),
    charts,
  );
}

// Where the numbers leave their band, or else where k3 is largest.
function firstChoice(steps, departure) {
  const left = departure ? steps.findIndex((entry) => num(entry.step) === num(departure.step)) : -1;
  if (left >= 0) return left;
  const sizes = steps.map((entry) => num(metricAt(entry, "kl_k3")) || 0);
  return sizes.indexOf(Math.max(...sizes));
}

function stepFigure(kind, entries, metric, drawing) {
  const parts = measuredOf(metric, entries);
  const says = kind === "step" ? "" : " Staleness: the training step minus the version of the weights that sampled.";
  return figure(
    `${metric.label} by ${kind}`,
    `Bands are 95\u00a0% intervals. Click a ${kind === "step" ? "step" : "point"}, or move with the arrow keys, to list its worst responses.${says}`,
    drawing,
    () =>
      table(
        null,
        [kind, "responses", "tokens", ...parts.map(([, label]) => label)],
        entries.map((entry) =>
          el(
            "tr",
            {},
            el("th", { scope: "row" }, fmt(entry[kind])),
            ["responses", "tokens"].map((name) => el("td", { class: "number" }, fmt((entry.counts || {})[name]))),
            parts.map(([name]) => numberCell(metricAt(entry, name))),
          ),
        ),
      ),
  );
}

// The chart as a slider over its entries, and how to move its cursor (null: away).
function stepChart(kind, entries, metric, departure, choose) {
  const xs = entries.map((entry) => num(entry[kind]));
  const parts = measuredOf(metric, entries);
  const end = (name, key) => entries.map((entry) => num((metricAt(entry, name) || {})[key]));
  const series = parts.map(([name, label, css]) => ({
    name: label,
    css,
    values: entries.map((entry) => num(metricAt(entry, name))),
    lows: end(name, "lo"),
    highs: end(name, "hi"),
  }));
  const band = departure && metric.name === "kl_k3" ? (departure.band || []).map(num).filter(Number.isFinite) : [];
  const cursor = svg("line", { class: "cursor", y1: toY(0), y2: toY(1) });
  let xShare;
  const marks = (x, y) => {
    xShare = x;
    return [band.length === 2 && usualBand(band.map(y)), departure && departureMark(x(num(departure.step))), cursor];
  };
  const settings = { xs, linear: true, noun: kind, series, xTitle: kind, yTitle: metric.unit, floor: metric.floor, seen: band, marks };
  const drawing = lineChart({ label: `${metric.label} by ${kind}`, ...settings });
  let now = 0;
  const moveTo = (at) => {
    now = at ?? now;
    cursor.setAttribute("visibility", at === null ? "hidden" : "visible");
    fill(cursor, { x1: toX(xShare(xs[now])), x2: toX(xShare(xs[now])) }, []);
    const said = parts.map(([name, label]) => [label, fmt(metricAt(entries[now], name)), interval(metricAt(entries[now], name))]);
    const text = `${kind} ${fmt(xs[now])}: ${said.map((words_) => words_.filter(Boolean).join(" ")).join(", ")}`;
    fill(drawing, { "aria-valuenow": String(now), "aria-valuetext": text }, []);
  };
  const keys = (event) => {
    const last = xs.length - 1;
    const goals = { ArrowRight: now + 1, ArrowUp: now + 1, ArrowLeft: now - 1, ArrowDown: now - 1, Home: 0, End: last };
    if (event.key in goals) choose(Math.min(Math.max(goals[event.key], 0), last));
    else if (event.key === "Enter") drawing.closest(".over").querySelector(".step-worst button")?.focus();
    else return;
    event.preventDefault();
  };
  const click = (event) => {
    const { left, width } = drawing.getBoundingClientRect();
    const at = ((event.clientX - left) / width) * FRAME.width;
    const away = xs.map((x) => Math.abs(toX(xShare(x)) - at));
    choose(away.indexOf(Math.min(...away)));
  };
  fill(drawing, { role: "slider", tabindex: 0, "aria-valuemin": "0", "aria-valuemax": String(xs.length - 1), onkeydown: keys, onclick: click }, []);
  return [drawing, moveTo];
}

// The k3 of the steps before the departure.
function usualBand([low, high]) {
  const text = svg("title", {}, "the band of the steps before");
  return svg("rect", { class: "usual", x: toX(0), width: INNER_WIDTH, y: toY(high), height: Math.max((high - low) * INNER_HEIGHT, 1) }, text);
}

function departureMark(share) {
  if (!(share >= 0 && share <= 1)) return null;
  const x = toX(share);
  return [
    svg("line", { class: "departure", x1: x, x2: x, y1: toY(0), y2: toY(1) }),
    svg("text", { class: "departure-text", x: share > 0.7 ? x - 4 : x + 4, y: toY(1) + 10, "text-anchor": share > 0.7 ? "end" : "start" }, "departs here"),
  ];
}

function showWorstOfStep(list, kind, entry) {
  const { counts = {}, worst = [] } = entry;
  const facts = ["responses", "tokens"].filter((name) => num(counts[name]) >= 0).map((name) => plural(num(counts[name]), name.slice(0, -1)));
  const rows_ = worst.map(({ request_id: id, sample, mean_abs_l: size }) => {
    const key = `${id}/${sample ?? 0}`;
    return el("tr", {}, el("td", {}, responseLink(key, key)), el("td", { class: "number" }, fmt(size)));
  });
  list.replaceChildren(
    el("h3", {}, `Worst responses of ${kind} ${fmt(entry[kind])}`),
    el("p", { class: "note" }, facts.join(" \u00b7 ")),
    rows_.length ? table(null, ["response", "mean |\u2113|"], rows_) : el("p", { class: "empty" }, "None is known."),
  );
}
