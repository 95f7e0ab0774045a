// Verdict, policies and every table of metrics.

function describe(name) {
  const { description, unit, better, bar } = summary.metrics[name] || {};
  return { description: (description || "").replace(LONE_L, "\u2113"), unit: unit || "", better: better || "", bar: num(bar) };
}

const LONE_L = /(?<![a-z])l(?![a-z])/gi; // |l| reads as three bars in many fonts
const BETTER = { lower: "lower", higher: "higher", zero: "nearer 0", one: "nearer 1", none: "" };

// Whether a value meets the field's bar, in words; nothing where the field has none.
function barChip(name, value) {
  const { better, bar } = describe(name);
  if (Number.isNaN(bar) || Number.isNaN(num(value))) return null;
  const higher = better === "higher";
  const fine = higher ? num(value) > bar : Math.abs(num(value)) < bar;
  return el(
    "span",
    { title: "The field's bar", class: `chip ${fine ? "fine" : "bad"}` },
    `${fine ? "meets" : "misses"} the bar: ${higher ? ">" : "<"} ${fmt(bar)}`,
  );
}

const policyName = (p, fallback) =>
  String(p.name || [p.engine || p.backend, p.model, p.dtype].filter(Boolean).join(" \u00b7 ") || fallback);

// Roles are stated, or the first policy sampled and the others scored.
function rolesOf(policies) {
  const stated = policies.some((p) => p.role);
  const isTarget = (p, i) => (stated ? /target|score/i.test(p.role || "") : i > 0);
  return { behaviour: policies.find((p, i) => !isTarget(p, i)), targets: policies.filter(isTarget) };
}

function targetName(i) {
  const comparison = summary.comparisons[i] || {};
  const target = rolesOf(summary.policies).targets[i];
  return String(comparison.target || comparison.name || (target ? policyName(target, "") : "") || `target ${i + 1}`);
}

function behaviourName() {
  const policy = rolesOf(summary.policies).behaviour;
  return policy ? policyName(policy, "behaviour") : "behaviour";
}

const comparison = () => summary.comparisons[state.target] || {};
const metricOrder = (overall) => [...new Set([...Object.keys(summary.metrics).filter((n) => n in overall), ...Object.keys(overall)])];

function headlineNames(overall, most) {
  const measured = metricOrder(overall).filter((name) => Number.isFinite(num(overall[name])));
  const rank = (name) => (summary.metrics[name] || {}).headline || 0;
  const known = measured.filter(rank).sort((a, b) => rank(b) - rank(a));
  return (known.length ? known : measured).slice(0, most);
}

function showHeader() {
  byId("title").textContent = summary.title;
  byId("verdict").textContent = summary.verdict;
  document.title = summary.title;
}

function showSize() {
  const total = index.id.reduce((sum, _, r) => sum + sampledLength(r), 0);
  const facts = [plural(index.id.length + index.left_out, "response"), index.left_out ? null : plural(total, "response token")];
  const skip = /^(num_)?(responses|sequences|tokens)$/;
  const counts = Object.entries(comparison().counts || {}).filter(([name, value]) => !skip.test(name) && num(value) > 0);
  for (const [name, value] of counts) facts.push(`${fmt(value)} ${words(name.replace(/^num_/, ""))}`);
  byId("size").textContent = facts.filter(Boolean).join(" \u00b7 ");
  if (index.left_out) {
    warn(
      `The token view holds the first ${plural(index.id.length, "response")}; ${index.left_out.toLocaleString("en-US")} more are counted in the metrics but left out here to keep the file small.`,
    );
  }
}

function warn(text) {
  byId("warning").textContent = text;
  byId("warning").hidden = false;
}

function showHeadline() {
  const refused = refusal();
  if (refused) return byId("headline").replaceChildren(refused);
  const overall = comparison().overall || {};
  const cards = headlineNames(overall, 6).map((name) => {
    const { description } = describe(name);
    return el(
      "div",
      { class: "card-number" },
      el("span", { class: "name", title: description }, name),
      el("span", { class: "value" }, fmt(overall[name])),
      el("span", { class: "note" }, interval(overall[name]) || "\u00a0"),
      barChip(name, overall[name]),
    );
  });
  byId("headline").replaceChildren(...cards);
}

function showPolicies() {
  const { policies } = summary;
  if (!policies.length) return;
  const { behaviour } = rolesOf(policies);
  const facts = [...new Set(policies.flatMap((p) => Object.keys(p)))].filter((f) => f !== "role" && f !== "name");
  const heads = policies.map((p, i) =>
    el(
      "span",
      {},
      el("span", { class: `role ${p === behaviour ? "s0" : "s1"}` }, p === behaviour ? "sampled" : "scored"),
      " ",
      policyName(p, `policy ${i + 1}`),
    ),
  );
  const rows = facts.map((fact) => {
    const values = policies.map((p) => factText(p[fact]));
    const differ = new Set(values).size > 1;
    return el(
      "tr",
      {},
      el("th", { scope: "row" }, words(fact)),
      values.map((v) => el("td", { class: differ ? "differs" : null }, v)),
    );
  });
  byId("policies").replaceChildren(
    el("h2", {}, "Who sampled, who scored"),
    table(null, ["", ...heads], rows, { class: "facts", "aria-label": "Facts about each policy; rows that differ are bold" }),
  );
}

function factText(value) {
  if (value === null || value === undefined || value === "") return "\u2013";
  if (Array.isArray(value)) return value.map(factText).join(", ") || "\u2013";
  if (typeof value === "object")
    return Object.entries(value)
      .map(([k, v]) => `${k}=${factText(v)}`)
      .join(", ");
  return String(value);
}

const numberCell = (x) => el("td", { class: "number" }, fmt(x), el("span", { class: "note block-note" }, interval(x)));

function showAllTargets() {
  if (summary.comparisons.length < 2) return;
  const names = headlineNames(Object.assign({}, ...summary.comparisons.filter(isComparable).map((c) => c.overall || {})), 5);
  const cells = (c) =>
    isComparable(c)
      ? names.map((name) => numberCell((c.overall || {})[name]))
      : el("td", { colspan: Math.max(names.length, 1) }, el("span", { class: "chip bad" }, "not comparable"));
  const rows = summary.comparisons.map((c, i) =>
    el(
      "tr",
      { class: i === state.target ? "current" : null },
      el("th", { scope: "row" }, el("button", { class: "link", type: "button", onclick: () => chooseTarget(i) }, targetName(i))),
      cells(c),
    ),
  );
  byId("all-targets").replaceChildren(el("h2", {}, "All targets"), table(null, ["target", ...names], rows));
}

function metricRow(name, value) {
  const { description, unit, better } = describe(name);
  return el(
    "tr",
    {},
    el("th", { scope: "row" }, el("code", {}, name), description && el("span", { class: "note block-note" }, description)),
    el(
      "td",
      { class: "number" },
      fmt(value),
      unit && !/^(fraction|ratio|probability|correlation|rank|perplexity)$/.test(unit) && el("span", { class: "note" }, " ", unit),
    ),
    el("td", { class: "number note" }, interval(value)),
    el("td", { class: "note better" }, BETTER[better] ?? better),
    el("td", {}, barChip(name, value)),
  );
}

function showMetricTable() {
  const refused = refusal();
  if (refused) return byId("metric-table").replaceChildren(el("h2", {}, "Metrics"), refused);
  const overall = comparison().overall || {};
  const names = metricOrder(overall);
  const family = (name) => (summary.metrics[name] || {}).family || "Other";
  const head = ["metric", "value", "95 % interval", "better", "the field's bar"].map((h, i) =>
    el("th", { scope: "col", class: i === 1 || i === 2 ? "number" : null }, h),
  );
  const bodies = [...new Set(names.map(family))].map((title) =>
    el(
      "tbody",
      {},
      el("tr", { class: "family" }, el("th", { scope: "rowgroup", colspan: 5 }, title)),
      names.filter((name) => family(name) === title).map((name) => metricRow(name, overall[name])),
    ),
  );
  const note = `${behaviourName()} sampled, ${targetName(state.target)} scored. \u2113 = log p \u2212 log q of a sampled token; q is who sampled, p is who scored.`;
  byId("metric-table").replaceChildren(
    el("h2", {}, "Metrics"),
    el("p", { class: "note" }, note),
    names.length
      ? el("div", { class: "scroll" }, el("table", { class: "metrics" }, el("thead", {}, el("tr", {}, head)), bodies))
      : el("p", {}, "Nothing was compared in this run."),
  );
}

function showGroupTable() {
  const groups = Object.entries(comparison().groups || {});
  if (!groups.length || !isComparable(comparison())) return byId("group-table").replaceChildren();
  const [column, rows] = groups.find(([name]) => name === state.groupColumn) || groups[0];
  const names = headlineNames(Object.assign({}, ...Object.values(rows).map(metricsOf)), 6);
  const select = el(
    "select",
    {
      onchange: (event) => {
        state.groupColumn = event.target.value;
        showGroupTable();
      },
    },
    groups.map(([name]) => option(name, words(name), name === column)),
  );
  const counted = Object.values(rows).some((r) => countOf(r) !== null);
  const body = Object.entries(rows).map(([value, metrics]) =>
    el(
      "tr",
      {},
      el("th", { scope: "row" }, value),
      counted && el("td", { class: "number" }, fmt(countOf(metrics))),
      names.map((name) => numberCell(metricsOf(metrics)[name])),
    ),
  );
  byId("group-table").replaceChildren(
    el("h2", {}, "By group"),
    el("label", {}, "Group by ", select),
    table(null, [words(column), ...(counted ? ["tokens"] : []), ...names], body),
  );
}

// A part of a comparison holds its metrics and counts under those names.
const metricsOf = (part) => part.metrics || part;
const countOf = (part) => (part.counts && part.counts.tokens !== undefined ? part.counts.tokens : null);
