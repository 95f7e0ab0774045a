// Why the gap is there: a row for every cause that was tried, or why it was not.

function showAttribution() {
  const { attribution } = summary;
  if (!attribution || !isComparable(summary.comparisons.find((c) => c.name === attribution.target))) return;
  const rows = attribution.rows.map((row) => {
    const share = num(row.share);
    return el(
      "tr",
      { class: Number.isNaN(share) ? "note" : null },
      el("th", { scope: "row" }, words(row.switch || row.rung), el("span", { class: "note block-note" }, row.changed)),
      [row.before, row.after].map((x) => el("td", { class: "number" }, fmt(x))),
      el("td", { class: "number" }, Number.isNaN(share) ? "\u2013" : `${Math.round(share * 100)}\u00a0%`),
      el("td", {}, row.verdict),
    );
  });
  const shown = table(null, ["changed", "k3 KL before", "after", "share of the gap", "verdict"], rows);
  shown.querySelector("thead th:last-child").classList.remove("number");
  byId("attribution").replaceChildren(
    el("h2", {}, `Why ${attribution.target} differs`),
    el("p", {}, attribution.sentence),
    shown,
    el("p", { class: "note" }, "A change that takes away a tenth of the gap or more is kept for the rows after it, so shares add up. The noise row is the target's engine against itself, a response alone and in batches; the verdict's noise floor is the sampler's, between sampling and scoring."),
  );
}
