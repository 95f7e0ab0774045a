// Which plots a comparison has numbers for, and how to read each.

const DRAWN = new Set(["l", "abs_l", "probabilities", "pq", "cumulative_l", "entropy_behaviour", "entropy_target"]);
const LOG_COUNTS = "Counts are on a log axis.";

function showPlots() {
  if (!isComparable(comparison())) return byId("plots").replaceChildren(); // the sentence above stands for them
  const { histograms = {}, overall = {}, groups = {} } = comparison();
  const positions = (comparison().positions || []).map((p) => ({
    start: p.start,
    end: p.end,
    count: countOf(p) ?? p.count,
    ...metricsOf(p),
  }));
  const plots = [
    plotRatio(histograms.l),
    plotDensity(histograms.probabilities || histograms.pq),
    plotDrift(histograms.cumulative_l, positions),
    plotByPosition(positions),
    plotEss(overall, groups),
    plotEssByPosition(positions),
    plotEntropyByPosition(positions),
    plotEntropies(histograms.entropy_behaviour, histograms.entropy_target),
    plotSizes(histograms.abs_l),
    plotErrors(errorsOf(comparison())),
    ...Object.entries(histograms)
      .filter(([name]) => !DRAWN.has(name))
      .map(([name, h]) => plotOther(name, h)),
  ].filter(Boolean);
  byId("plots").replaceChildren(...(plots.length ? [el("h2", {}, "Plots"), ...plots] : []));
}

// {edges, counts, below, above} as numbers, or null where nothing was counted.
function readHistogram(h) {
  if (!h || !h.edges || !h.counts) return null;
  const counts = h.counts.map(num);
  const total = counts.reduce((a, b) => a + b, 0) + num(h.below || 0) + num(h.above || 0);
  return total > 0 ? { edges: h.edges.map(num), counts, below: num(h.below || 0), above: num(h.above || 0), total } : null;
}

function beyond({ edges, below, above }) {
  const parts = [
    below && `${plural(below, "token")} below ${fmt(edges[0])}`,
    above && `${plural(above, "token")} above ${fmt(edges.at(-1))}`,
  ].filter(Boolean);
  return parts.length ? ` Not drawn: ${parts.join(", ")}.` : "";
}

function plotRatio(given) {
  const h = readHistogram(given);
  if (!h) return null;
  const drawing = histogram({
    label: `Histogram of \u2113 over ${plural(h.total, "token")}`,
    series: [{ ...h, css: "s1" }],
    xTitle: "\u2113 = log p \u2212 log q (nats)",
    zeroLine: true,
  });
  const says = `Left of 0, the target finds a token less likely than the policy that sampled it. ${LOG_COUNTS}${beyond(h)}`;
  return figure("Log-ratio of the sampled tokens", says, drawing, () => histogramNumbers(h));
}

function plotOther(name, given) {
  const h = readHistogram(given);
  if (!h) return null;
  const drawing = histogram({ label: `Histogram of ${words(name)}`, series: [{ ...h, css: "s1" }], xTitle: words(name) });
  return figure(`Histogram of ${words(name)}`, `${LOG_COUNTS}${beyond(h)}`, drawing, () => histogramNumbers(h));
}

function plotSizes(given) {
  const h = readHistogram(given);
  if (!h) return null;
  const logs = { ...h, edges: h.edges.map(Math.log10), css: "s1" };
  const drawing = histogram({
    label: "Histogram of the size of \u2113 on a log axis",
    series: [logs],
    xTitle: "|\u2113| (nats)",
    power: true,
  });
  return figure("Size of the log-ratio", `From rounding noise to real disagreement, on log axes.${beyond(h)}`, drawing, () =>
    histogramNumbers(h),
  );
}

function plotEntropies(behaviour, target) {
  const series = [
    [behaviour, "s0", "behaviour"],
    [target, "s1", "target"],
  ]
    .map(([h, css, name]) => ({ ...readHistogram(h), css, name }))
    .filter((h) => h.edges);
  if (!series.length) return null;
  const drawing = histogram({ label: "Histogram of the entropy of both policies", series, xTitle: "entropy (nats)" });
  return figure("Entropy", `How many tokens each policy was how unsure about. ${LOG_COUNTS}`, drawing, () =>
    histogramNumbers(series.at(-1)),
  );
}

function plotDensity(given) {
  if (!given || !Array.isArray(given.counts)) return null;
  const counts = given.counts.map((row) => row.map(num));
  const drawing = density({
    label: "Density of p against q; on-policy tokens lie on the diagonal",
    edges: given.edges.map(num),
    counts,
    xTitle: "q: who sampled",
    yTitle: "p: who scored",
  });
  return figure(
    "p against q",
    "Probability of each sampled token under both policies: on-policy tokens lie on the diagonal. The stronger the colour, the more tokens (log).",
    drawing,
  );
}

function plotDrift(curve, positions) {
  const says =
    "Sum of \u2113 from the first token on, averaged over the responses that get this far: how an importance weight wanders with length.";
  const settings = {
    label: "Cumulative \u2113 by position",
    xTitle: "position in the response (token)",
    yTitle: "cumulative \u2113 (nats)",
    zeroLine: true,
  };
  if (curve && curve.position && curve.position.length) {
    const drawing = lineChart({
      ...settings,
      xs: curve.position.map(num),
      linear: true,
      series: [{ name: "cumulative \u2113", css: "s1", values: curve.mean.map(num) }],
    });
    return figure("Drift with length", says, drawing, () =>
      table(
        null,
        ["token", "cumulative \u2113", "responses"],
        curve.position.map((at, i) =>
          el(
            "tr",
            {},
            el("th", { scope: "row" }, fmt(at)),
            [curve.mean[i], (curve.num || [])[i]].map((v) => el("td", { class: "number" }, fmt(v))),
          ),
        ),
      ),
    );
  }
  return positionFigure("Drift with length", says, positions, [["cumulative_l", "cumulative \u2113", "s1"]], settings);
}

function plotByPosition(positions) {
  const rows_ = positions.map((p) => ({ ...p, l_mean: p.l_mean ?? minus(p.kl) }));
  return positionFigure(
    "Mismatch by position",
    "Where in a response the policies part; bands are 95\u00a0% intervals.",
    rows_,
    [
      ["logprob_diff_mean", "mean |\u2113|", "s2"],
      ["l_mean", "mean \u2113", "s1"],
    ],
    { label: "Mean \u2113 and mean |\u2113| by position", yTitle: "nats", zeroLine: true },
  );
}

function minus(x) {
  if (x === null || x === undefined) return undefined;
  return typeof x === "object" ? { value: -num(x), lo: -num(x.hi), hi: -num(x.lo) } : -num(x);
}

function plotEntropyByPosition(positions) {
  return positionFigure(
    "Entropy by position",
    "How unsure each policy is of the next token; bands are 95\u00a0% intervals.",
    positions,
    [
      ["entropy_behaviour", "behaviour", "s0"],
      ["entropy_target", "target", "s1"],
    ],
    { label: "Entropy by position", yTitle: "entropy (nats)", floor: 0 },
  );
}

function plotEssByPosition(positions) {
  return positionFigure(
    "Effective sample size by position",
    "Share of the tokens at a position that count after reweighting by rho; bands are 95\u00a0% intervals.",
    positions,
    [["ess_token", "effective share", "s1"]],
    { label: "Effective sample size of the tokens by position", yTitle: "share" },
  );
}

// Whose error the gap is, of a run that has a truth; the ladder's where only the ladder made one.
function errorsOf(compared) {
  const { attribution } = summary;
  const found = compared.whose_error || (attribution && attribution.target === compared.name && attribution.whose_error);
  return found && found.by_probability.map((p) => ({ start: p.start, end: p.end, count: countOf(p), ...metricsOf(p) }));
}

function plotErrors(buckets) {
  if (!buckets) return null;
  return positionFigure(
    "Whose error, by probability",
    "How far each side is from a forward pass in float32, by the token's probability there; bands are 95\u00a0% intervals.",
    buckets,
    [
      ["error_behaviour", "behaviour", "s0"],
      ["error_target", "target", "s1"],
      ["error_gap", "gap", "s2"],
    ],
    {
      label: "Root mean square error of both sides by the token's probability",
      xTitle: "probability of the token, from",
      yTitle: "nats (root mean square)",
      floor: 0,
      noun: "probability",
      heads: ["from probability", "to"],
    },
  );
}

// wanted: [[metric, name, colour], ...]
function positionFigure(title, says, positions, wanted, { heads = ["from token", "to"], ...settings }) {
  const there = wanted.filter(([name]) => positions.some((p) => Number.isFinite(num(p[name]))));
  if (!there.length) return null;
  const part = (name, key) => positions.map((p) => num((p[name] || {})[key]));
  const series = there.map(([name, label, css]) => {
    const lows = part(name, "lo");
    return {
      name: label,
      css,
      values: positions.map((p) => num(p[name])),
      ...(lows.some(Number.isFinite) && { lows, highs: part(name, "hi") }),
    };
  });
  const drawing = lineChart({ xs: positions.map((p) => num(p.start)), series, xTitle: "position in the response (token)", ...settings });
  return figure(title, says, drawing, () =>
    table(
      null,
      [...heads, "tokens", ...there.map(([, label]) => label)],
      positions.map((p) =>
        el(
          "tr",
          {},
          el("th", { scope: "row" }, fmt(p.start)),
          [p.end, p.count, ...there.map(([name]) => p[name])].map((v) => el("td", { class: "number" }, fmt(v))),
        ),
      ),
    ),
  );
}

function plotEss(overall, groups) {
  const rows_ = Object.keys(overall)
    .filter((name) => /^ess_/.test(name) && Number.isFinite(num(overall[name])))
    .map((name) => essRow(words(name.replace("ess_", "")).replace("seq", "response"), overall[name]));
  for (const [column, values] of Object.entries(groups)) {
    const named = Object.entries(values).filter(([, part]) => Number.isFinite(num(metricsOf(part).ess_token)));
    if (rows_.length + named.length <= 7)
      rows_.push(...named.map(([value, part]) => essRow(`token, ${words(column)} ${value}`, metricsOf(part).ess_token)));
  }
  if (!rows_.length) return null;
  const drawing = intervals({
    label: "Effective sample size: " + rows_.map((r) => `${r.name} ${fmt(r.value)}`).join(", "),
    rows: rows_,
    xTitle: "share of the samples that count",
  });
  return figure(
    "Effective sample size",
    "(\u03a3w)\u00b2 / (N \u03a3w\u00b2): 1 is on-policy; at 0.5, half of the data is lost to reweighting.",
    drawing,
  );
}

const essRow = (name, x) => ({ name, value: num(x), lo: num(x && x.lo), hi: num(x && x.hi) });
