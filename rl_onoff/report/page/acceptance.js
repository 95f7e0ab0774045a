// Whether the model on the engine is fit to be trained: a row for every check, what failed with what to do.

function showAcceptance() {
  const { acceptance } = summary;
  if (!acceptance) return;
  const { model, engine, truth, accepted, failed, lines } = acceptance;
  const chip = { pass: "chip fine", fail: "chip bad" };
  const rows = lines.map(({ check, outcome, value, bar, said, fix }) =>
    el(
      "tr",
      { class: value === null && bar === null ? "note" : null },
      el("th", { scope: "row" }, words(check)),
      el("td", {}, el("span", { class: chip[outcome] }, outcome)),
      [value, bar].map((x) => el("td", { class: "number" }, fmt(x))),
      el("td", {}, inked(said), fix && el("strong", { class: "block-note" }, `What to do: ${inked(fix)}.`)),
    ),
  );
  const shown = table(null, ["check", "", "number", "bar", "what was found"], rows);
  for (const i of [2, 5]) shown.querySelector(`thead th:nth-child(${i})`).classList.remove("number");
  const judged = accepted ? "Fit to be trained" : failed.length ? "Not fit to be trained" : "Not known to be fit to be trained";
  byId("acceptance").replaceChildren(
    el("h2", {}, `${judged}: ${model} on ${engine || "an engine that was not asked"}`),
    shown,
    el("p", { class: "note" }, `The number must not be above the bar. The truth is ${truth || "not known"}.`),
  );
}
