// The tool bar: search, order, colour and filters.

function showTools() {
  const tool = (label, control) => el("label", {}, el("span", {}, label), control);
  const select = (name, options) =>
    el(
      "select",
      { name },
      options.map(([value, label]) => option(value, label, String(state[name]) === value)),
    );
  const any = ["", "any"];
  const sorts = Object.entries(SORTS).filter(([name]) => !/^(low|high)$/.test(name) || index.hasReward);
  const finishes = [...new Set(index.finish)].filter(Boolean).sort();
  const scales = [
    ["auto", "this run"],
    ["0.01", "0.01"],
    ["0.1", "0.1"],
    ["1", "1"],
    ["5", "5"],
  ];
  const groups = Object.entries(index.groups).filter(([name]) => !isReward(name));
  const controls = [
    tool("Search", el("input", { type: "search", name: "search", placeholder: "prompt, response or id", autocomplete: "off" })),
    tool(
      "Sort",
      select(
        "sort",
        sorts.map(([name, [label]]) => [name, index.compared ? label : label.replace("|\u2113|", "logprob")]),
      ),
    ),
    tool("Colour by", select("colour", colourings())),
    index.compared && tool("Full colour at |\u2113|", select("scale", scales)),
    index.hasReward && tool("Reward", select("reward", [any, ["right", "right (> 0)"], ["wrong", "wrong (\u2264 0)"], ["none", "none"]])),
    finishes.length > 1 && tool("Finish", select("finish", [any, ...finishes.map((f) => [f, f])])),
    index.compared &&
      tool("Worst |\u2113| at least", el("input", { type: "number", name: "least", min: 0, step: "any", placeholder: "0" })),
    ...groups.map(([name, { values }]) => tool(words(name), select(`group:${name}`, [any, ...values.map((v, i) => [String(i), v])]))),
  ];
  byId("tools").replaceChildren(...controls.filter(Boolean));
  byId("tools").addEventListener("submit", (event) => event.preventDefault());
  byId("tools").addEventListener("input", (event) => changeTool(event.target));
}

let searchTimer = 0;
function changeTool(control) {
  state[control.name] = control.value;
  if (control.name === "colour" || control.name === "scale") return recolour();
  state.page = 0;
  clearTimeout(searchTimer);
  searchTimer = setTimeout(updateList, control.type === "search" ? 200 : 0);
}

let corpus = null; // lower-case id, prompt and text of every response; made at the first search

async function loadCorpus() {
  if (corpus) return corpus;
  const found = [];
  for (let c = 0; c < index.firstOfChunk.length; c++) {
    for (const row of await inflateJson(`texts-${c}`)) found.push(`${row.prompt}\n${row.text}`.toLowerCase());
  }
  corpus = found.map((text, r) => `${index.id[r]}\n${text}`.toLowerCase());
  return corpus;
}

function passesFilters(r) {
  const reward = num(index.reward[r]);
  if (state.reward === "right" && !(reward > 0)) return false;
  if (state.reward === "wrong" && !(reward <= 0)) return false;
  if (state.reward === "none" && !Number.isNaN(reward)) return false;
  if (state.finish && index.finish[r] !== state.finish) return false;
  if (Number(state.least) > 0 && !(statistic(index.worst, r) >= Number(state.least))) return false;
  return Object.entries(index.groups).every(([name, { codes }]) => !state[`group:${name}`] || codes[r] === Number(state[`group:${name}`]));
}
