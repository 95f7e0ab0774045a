// Start, tabs and the choice of target.

const summary = readJson("summary");
const index = readJson("index");
const state = {
  target: 0,
  page: 0,
  sort: "worst",
  colour: "l",
  scale: "auto",
  groupColumn: null,
  over: "kl_k3",
  search: "",
  reward: "",
  finish: "",
  least: "",
};

// Facts about the run that every view asks for.
function prepareIndex() {
  index.firstOfChunk = [];
  index.chunk.forEach((c, r) => {
    index.firstOfChunk[c] ??= r;
  });
  index.hasBehaviour = index.has_behaviour;
  index.hasTargets = index.has_targets;
  index.compared = index.hasBehaviour && index.hasTargets;
  index.hasReward = index.reward.some((reward) => reward !== null);
  index.scales = index.worst.map((column) => {
    const sorted = column
      .map(num)
      .filter((x) => x > 0 && Number.isFinite(x))
      .sort((a, b) => a - b);
    return sorted.length ? Number(sorted[sorted.length >> 1].toPrecision(1)) : 1;
  });
}

function showTarget() {
  showFindings();
  showHeadline();
  showSteps();
  showAllTargets();
  showPlots();
  showMetricTable();
  showGroupTable();
  showWorst();
}

async function chooseTarget(i) {
  state.target = i;
  byId("target").value = String(i);
  showTarget();
  await updateList();
  const span = chosenSpan();
  if (span) chooseSpan(span);
  else closePanel();
}

function showTargetSelect() {
  const count = Math.max(summary.comparisons.length, index.hasTargets ? index.mean.length : 0);
  if (count < 2) return;
  byId("target").replaceChildren(...Array.from({ length: count }, (_, i) => option(String(i), targetName(i))));
  byId("target").addEventListener("change", (event) => chooseTarget(Number(event.target.value)));
  byId("target-label").hidden = false;
}

function selectTab(name) {
  for (const tab of byId("tabs").children) {
    const here = tab.getAttribute("aria-controls") === name;
    tab.setAttribute("aria-selected", String(here));
    tab.tabIndex = here ? 0 : -1;
    byId(tab.getAttribute("aria-controls")).hidden = !here;
  }
}

function watchTabs() {
  const tabs = [...byId("tabs").children];
  byId("tabs").addEventListener("click", (event) => {
    const tab = event.target.closest("[role=tab]");
    if (!tab) return;
    selectTab(tab.getAttribute("aria-controls"));
    history.replaceState(null, "", `#${tab.getAttribute("aria-controls")}`);
  });
  byId("tabs").addEventListener("keydown", (event) => {
    const at = tabs.indexOf(event.target);
    const goal = { ArrowRight: at + 1, ArrowLeft: at - 1 + tabs.length, Home: 0, End: tabs.length - 1 }[event.key];
    if (goal === undefined) return;
    event.preventDefault();
    const tab = tabs[goal % tabs.length];
    selectTab(tab.getAttribute("aria-controls"));
    tab.focus();
  });
}

async function followHash() {
  const [, r, t] = /^#token-(\d+)-(\d+)$/.exec(location.hash) || [];
  if (r !== undefined && Number(r) < index.id.length) return jumpTo(Number(r), Number(t));
  const name = location.hash.slice(1);
  if (["overview", "metrics", "tokens", "worst"].includes(name)) selectTab(name);
}

async function start() {
  prepareIndex();
  showHeader();
  if (!("DecompressionStream" in window))
    warn("This browser is too old for the token view (it has no DecompressionStream); the metrics are complete.");
  watchTabs();
  showTargetSelect();
  showSize();
  showPolicies();
  showAcceptance();
  showAttribution();
  showLayers();
  showPanel();
  await loadTokenTexts();
  state.colour = colourings()[0]?.[0] ?? "l";
  showTools();
  showTarget();
  await updateList();
  await followHash();
  document.documentElement.dataset.ready = Math.round(performance.now());
}

start().catch((error) => {
  warn(`The page could not be shown: ${error.message}`);
  throw error;
});
