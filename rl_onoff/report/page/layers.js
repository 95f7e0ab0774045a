// Where in the network two sides part: how the error of the hidden states grows, and where in the sequence.

const POINTS = { embeddings: "embeddings", lm_head: "norm before the LM head" };
const pointName = (row) => POINTS[row.point] || (row.point === "layer" ? `layer ${row.layer}` : `layer ${row.layer}, its ${row.point}`);
const log10 = (x) => Math.log10(num(x));

function showLayers() {
  const { layers } = summary;
  if (!layers) return;
  const figures = [plotGrowth(layers), plotHeat(layers), plotRouters(layers)].filter(Boolean);
  byId("layers").replaceChildren(
    el("h2", {}, "Where in the network they part"),
    el("p", {}, layers.sentence),
    figures.length > 0 && el("div", { class: "plots" }, figures),
  );
}

// A line at the layer in which they part; a share of the x axis for every point.
function partingMark({ points, parting }, xShare) {
  const i = parting && parting.layer !== null ? points.findIndex((row) => row.layer === parting.layer) : -1;
  return i >= 0 && svg("line", { class: "departure", x1: toX(xShare(i)), x2: toX(xShare(i)), y1: toY(0), y2: toY(1) });
}

function plotGrowth(layers) {
  const { points, tokens } = layers;
  const series = [
    ["median", "s1"],
    ["p90", "s0"],
    ["max", "s2"],
  ].map(([name, css]) => ({ name, css, values: points.map((row) => log10(row[name])) }));
  if (!series.some((s) => s.values.some(Number.isFinite))) return null;
  const drawing = lineChart({
    label: "Relative error of the hidden states after every layer",
    xs: points.map((_, i) => i),
    linear: true,
    noun: "point",
    series,
    xTitle: "layers passed (the last point: the norm before the LM head)",
    yTitle: "log\u2081\u2080 of the error",
    marks: (xShare) => partingMark(layers, xShare),
  });
  const says = `\u2016a \u2212 b\u2016 / \u2016b\u2016 of the residual stream over ${plural(tokens, "token")}; a: the backend, b: the target. No dot: no difference.`;
  return figure("Growth of the error", says, drawing, () => pointNumbers(layers));
}

function pointNumbers({ points, inside, parting }) {
  const rows = points.flatMap((row) => {
    const parts = parting && row.point === "layer" && row.layer === parting.layer ? inside.filter((part) => part.layer === row.layer) : [];
    return [...parts, row];
  });
  const names = ["median", "p90", "max", "growth"];
  return table(
    null,
    ["after", ...names],
    rows.map((row) =>
      el(
        "tr",
        {},
        el("th", { scope: "row" }, pointName(row)),
        names.map((name) => el("td", { class: "number" }, fmt(row[name]))),
      ),
    ),
  );
}

function plotHeat(layers) {
  const { points, positions } = layers;
  const values = points.flatMap((row) => row.by_position.map(log10)).filter(Number.isFinite);
  if (!values.length) return null;
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const strength = (x) => (high > low ? 0.08 + (0.92 * (x - low)) / (high - low) : 0.5);
  const [width, height] = [INNER_WIDTH / points.length, INNER_HEIGHT / positions.length];
  const cells = points.flatMap((row, i) =>
    row.by_position.map((error, j) => {
      const place = { x: toX(0) + i * width, width: width + 0.3, y: toY(1) + j * height, height: height + 0.3 };
      const title = svg("title", {}, `${pointName(row)}, positions ${positionsText(positions[j])}: ${fmt(error)}`);
      return num(error) > 0 && svg("rect", { class: "cell", ...place, "fill-opacity": strength(log10(error)).toFixed(3) }, title);
    }),
  );
  const every = Math.ceil(points.length / 8);
  const xTicks = points.map((_, i) => [(i + 0.5) / points.length, String(i)]).filter((_, i) => i % every === 0);
  const yTicks = positions.map((p, j) => [1 - (j + 0.5) / positions.length, fmt(p.start)]);
  const drawing = frame(
    "Median error by layer and position",
    svg("rect", { class: "field", x: toX(0), y: toY(1), width: INNER_WIDTH, height: INNER_HEIGHT }),
    cells.filter(Boolean),
    yAxis(yTicks, "from position"),
    partingMark(layers, (i) => (i + 0.5) / points.length),
    xAxis(xTicks, "layers passed"),
  );
  const says = `Median error by layer and position in the sequence, prompt included, from ${fmt(10 ** low)} to ${fmt(10 ** high)} (log); none where a cell is empty.`;
  return figure("Error by layer and position", says, drawing);
}

function plotRouters({ routers }) {
  if (!routers) return null;
  const rows = routers.layers;
  const names = { overlap: "overlap", same: "same set" };
  const drawing = lineChart({
    label: "Overlap of the chosen experts by layer",
    xs: rows.map((row) => row.layer),
    linear: true,
    noun: "layer",
    series: Object.keys(names).map((key, i) => ({ name: names[key], css: `s${1 - i}`, values: rows.map((row) => num(row[key])) })),
    xTitle: "layer",
    yTitle: "share",
  });
  const says = `Share of the chosen experts that both sides chose, and of the ${plural(routers.tokens, "response token")} for which all of them are the same.`;
  const numbers = () =>
    table(
      null,
      ["layers that differ", "tokens", "mean |\u0394 logprob|"],
      routers.by_layers.map((row) =>
        el(
          "tr",
          {},
          el("th", { scope: "row" }, positionsText(row)),
          [row.tokens, row.nats].map((value) => el("td", { class: "number" }, fmt(value))),
        ),
      ),
    );
  return figure("Experts by layer", says, drawing, numbers);
}

const positionsText = ({ start, end }) => (end - start > 1 ? `${start} to ${end - 1}` : String(start));
