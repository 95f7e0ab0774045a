// Four kinds of plot, as inline SVG in a 400 x 250 frame: bars, lines, a density and intervals. Colours are CSS classes.

const FRAME = { width: 400, height: 250, left: 52, right: 14, top: 12, bottom: 40 };
const INNER_WIDTH = FRAME.width - FRAME.left - FRAME.right;
const INNER_HEIGHT = FRAME.height - FRAME.top - FRAME.bottom;
const toX = (share) => FRAME.left + share * INNER_WIDTH;
const toY = (share) => FRAME.top + (1 - share) * INNER_HEIGHT;

function figure(title, says, drawing, numbers) {
  const details = numbers && el("details", { class: "numbers" }, el("summary", {}, "Numbers"));
  if (details) details.addEventListener("toggle", () => details.children.length === 1 && details.append(numbers()), { once: true });
  return el("figure", {}, el("figcaption", {}, el("h3", {}, title), el("p", {}, says)), drawing, details);
}

function frame(label, ...children) {
  return svg("svg", { viewBox: `0 0 ${FRAME.width} ${FRAME.height}`, role: "img", "aria-label": label }, children);
}

function niceTicks(low, high, about = 5) {
  const rough = (high - low) / about;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((m) => m * power >= rough);
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) ticks.push(i * step);
  return ticks;
}

const tickText = (value) => fmt(Math.abs(value) < 1e-12 ? 0 : Number(value.toPrecision(6)), 2);

// ticks: [[share of the axis, text], ...]
function xAxis(ticks, title) {
  return [
    svg("line", { class: "axis", x1: toX(0), x2: toX(1), y1: toY(0), y2: toY(0) }),
    ticks.map(([share, text]) => svg("text", { class: "tick", x: toX(share), y: toY(0) + 15, "text-anchor": "middle" }, text)),
    svg("text", { class: "axis-title", x: toX(0.5), y: FRAME.height - 5, "text-anchor": "middle" }, title),
  ];
}

function yAxis(ticks, title) {
  return [
    ticks.map(([share, text]) => [
      svg("line", { class: "grid", x1: toX(0), x2: toX(1), y1: toY(share), y2: toY(share) }),
      svg("text", { class: "tick", x: FRAME.left - 6, y: toY(share) + 3.5, "text-anchor": "end" }, text),
    ]),
    title &&
      svg("text", { class: "axis-title", x: 11, y: toY(0.5), "text-anchor": "middle", transform: `rotate(-90 11 ${toY(0.5)})` }, title),
  ];
}

function linearAxis(low, high, about) {
  const share = (x) => (x - low) / (high - low);
  return { share, ticks: niceTicks(low, high, about).map((x) => [share(x), tickText(x)]) };
}

// Counts on a log axis, so that the few bad tokens stay visible beside the many good ones. A second series is drawn as steps.
function histogram({ label, series, xTitle, zeroLine, power }) {
  const { edges } = series[0];
  const x = linearAxis(edges[0], edges.at(-1), 6);
  const xTicks = power ? x.ticks.map(([share, text]) => [share, powerText(text)]) : x.ticks;
  const decades = Math.max(1, Math.ceil(Math.log10(Math.max(...series.flatMap((s) => s.counts), 1) * 1.05)));
  const height = (count) => (count > 0 ? (Math.log10(count) + 0.3) / (decades + 0.3) : 0);
  const yTicks = [];
  for (let d = 0; d <= decades; d += Math.ceil(decades / 5))
    yTicks.push([height(10 ** d), (10 ** d).toLocaleString("en-US", { notation: "compact" })]);
  const marks = series.map((s) => (series.length > 1 ? stepMarks(s, x.share, height) : barMarks(s, x.share, height, power)));
  const zero = zeroLine && edges[0] < 0 && edges.at(-1) > 0;
  const line = zero && svg("line", { class: "zero", x1: toX(x.share(0)), x2: toX(x.share(0)), y1: toY(0), y2: toY(1) });
  return frame(label, yAxis(yTicks, "tokens (log)"), marks, line, keyOf(series), xAxis(xTicks, xTitle));
}

const SUPERSCRIPTS = "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079";
const powerText = (text) => "10" + text.replace(MINUS, "\u207b").replace(/\d/g, (d) => SUPERSCRIPTS[d]);

function barMarks({ edges, counts }, xShare, height, power) {
  const shown = power ? edges.map((e) => 10 ** e) : edges;
  return counts.map((count, i) => {
    if (!count) return null;
    const [a, b] = [toX(xShare(edges[i])), toX(xShare(edges[i + 1]))];
    const title = svg("title", {}, `${binText(shown, i)}: ${plural(count, "token")}`);
    return svg(
      "rect",
      { class: "bar-mark", x: a, width: Math.max(b - a - 0.5, 0.8), y: toY(height(count)), height: height(count) * INNER_HEIGHT },
      title,
    );
  });
}

function stepMarks({ edges, counts, css }, xShare, height) {
  const corners = counts.map(
    (count, i) => `L${toX(xShare(edges[i])).toFixed(1)},${toY(height(count)).toFixed(1)}H${toX(xShare(edges[i + 1])).toFixed(1)}`,
  );
  return svg("path", { class: `line ${css}`, d: `M${toX(0)},${toY(0)}${corners.join("")}V${toY(0)}` });
}

const binText = (edges, i) => `${fmt(edges[i])} to ${fmt(edges[i + 1])}`;

function histogramNumbers({ edges, counts }) {
  const lines = counts.map(
    (count, i) => count > 0 && el("tr", {}, el("th", { scope: "row" }, binText(edges, i)), el("td", { class: "number" }, fmt(count))),
  );
  return table(null, ["from, to", "tokens"], lines.filter(Boolean));
}

// Which colour is which, at the top right of a plot with several series.
function keyOf(series) {
  if (series.length < 2) return null;
  return series.map((s, i) => {
    const x = toX(1) - (series.length - i) * 88;
    return [
      svg("line", { class: `line ${s.css}`, x1: x, x2: x + 16, y1: FRAME.top + 3, y2: FRAME.top + 3 }),
      svg("text", { class: "tick", x: x + 21, y: FRAME.top + 7 }, s.name),
    ];
  });
}

// series: [{name, css, values, lows?, highs?}] at xs: true to scale when linear, else evenly spaced (buckets, named by their start).
// `noun` names an x; `seen` are further values that y must reach; `marks(xShare, yShare)` gives further shapes, behind the lines.
function lineChart({ label, xs, linear, noun = "token", series, xTitle, yTitle, zeroLine, floor, seen = [], marks }) {
  const all = series.flatMap((s) => [...s.values, ...(s.lows || []), ...(s.highs || [])]).concat(seen).filter(Number.isFinite);
  let [low, high] = [Math.min(...all, zeroLine ? 0 : (floor ?? Infinity)), Math.max(...all, zeroLine ? 0 : -Infinity)];
  if (low === high) high = low + (Math.abs(low) || 1);
  const pad = (high - low) * 0.08;
  const y = linearAxis(low === 0 ? 0 : low - pad, high === 0 ? 0 : high + (series.length > 1 ? 2 : 1) * pad, 4);
  const x = linear && xs.length > 1 ? linearAxis(xs[0], xs.at(-1), 6) : bucketAxis(xs);
  const zero = zeroLine && svg("line", { class: "zero", x1: toX(0), x2: toX(1), y1: toY(y.share(0)), y2: toY(y.share(0)) });
  const lines = series.map((s) => lineMarks(s, xs, x.share, y.share, noun));
  const xTicks = !linear || noun === "token" ? x.ticks : x.ticks.filter(([, text]) => !text.includes("."));
  return frame(label, yAxis(y.ticks, yTitle), zero, marks && marks(x.share, y.share), lines, keyOf(series), xAxis(xTicks, xTitle));
}

function bucketAxis(xs) {
  const place = new Map(xs.map((x, i) => [x, xs.length === 1 ? 0.5 : i / (xs.length - 1)]));
  const every = Math.ceil(xs.length / 10);
  return { share: (x) => place.get(x), ticks: xs.filter((_, i) => i % every === 0).map((x) => [place.get(x), tickText(x)]) };
}

function lineMarks(s, xs, xShare, yShare, noun) {
  const points = s.values.map((v, i) => [toX(xShare(xs[i])), toY(yShare(v)), v, i]).filter((p) => Number.isFinite(p[2]));
  const path = (list) => list.map((p, i) => `${i ? "L" : "M"}${p[0].toFixed(1)},${p[1].toFixed(1)}`).join("");
  const fine = s.lows ? points.filter((p) => Number.isFinite(s.lows[p[3]]) && Number.isFinite(s.highs[p[3]])) : [];
  const edge = (values) => fine.map((p) => [p[0], toY(yShare(values[p[3]]))]);
  const band = fine.length > 1 && svg("path", { class: `band ${s.css}`, d: path([...edge(s.lows), ...edge(s.highs).reverse()]) + "Z" });
  const dots = points.map((p) =>
    svg(
      "circle",
      { class: `dot ${s.css}`, cx: p[0], cy: p[1], r: points.length > 40 ? 1 : 2.6 },
      svg("title", {}, `${s.name}, ${noun} ${fmt(xs[p[3]])}: ${fmt(p[2])}`),
    ),
  );
  return [band, svg("path", { class: `line ${s.css}`, d: path(points) }), dots];
}

// counts[i][j]: tokens with q in bin i and p in bin j.
function density({ label, edges, counts, xTitle, yTitle }) {
  const most = Math.log1p(Math.max(...counts.flat(), 1));
  const side = INNER_HEIGHT;
  const left = FRAME.left + (INNER_WIDTH - side) / 2 + 8;
  const [low, high] = [edges[0], edges.at(-1)];
  const share = (e) => (e - low) / (high - low);
  const cells = counts.flatMap((row, i) => row.map((count, j) => count > 0 && densityCell(edges, i, j, count, most, left, side, share)));
  const ticks = niceTicks(low, high, 4);
  const xTicks = ticks.map((t) => [(left + share(t) * side - FRAME.left) / INNER_WIDTH, tickText(t)]);
  return frame(
    label,
    svg("rect", { class: "field", x: left, y: FRAME.top, width: side, height: side }),
    cells.filter(Boolean),
    svg("line", { class: "diagonal", x1: left, y1: toY(0), x2: left + side, y2: toY(1) }),
    xTicks.map(([s, text]) => svg("text", { class: "tick", x: toX(s), y: toY(0) + 15, "text-anchor": "middle" }, text)),
    ticks.map((t) => svg("text", { class: "tick", x: left - 6, y: toY(share(t)) + 3.5, "text-anchor": "end" }, tickText(t))),
    svg("text", { class: "axis-title", x: left + side / 2, y: FRAME.height - 5, "text-anchor": "middle" }, xTitle),
    svg(
      "text",
      { class: "axis-title", x: left - 38, y: toY(0.5), "text-anchor": "middle", transform: `rotate(-90 ${left - 38} ${toY(0.5)})` },
      yTitle,
    ),
  );
}

function densityCell(edges, i, j, count, most, left, side, share) {
  const [x0, x1, y0, y1] = [share(edges[i]), share(edges[i + 1]), share(edges[j]), share(edges[j + 1])];
  const title = svg("title", {}, `q ${binText(edges, i)}, p ${binText(edges, j)}: ${plural(count, "token")}`);
  const place = { x: left + x0 * side, width: (x1 - x0) * side + 0.3, y: toY(y1), height: (y1 - y0) * INNER_HEIGHT + 0.3 };
  return svg("rect", { class: "cell", ...place, "fill-opacity": (0.12 + 0.88 * (Math.log1p(count) / most)).toFixed(3) }, title);
}

// rows: [{name, value, lo, hi}] on an axis from 0 to 1.
function intervals({ label, rows, xTitle }) {
  const space = Math.min(34, INNER_HEIGHT / rows.length);
  const left = 118;
  const x = (value) => left + Math.min(Math.max(value, 0), 1) * (FRAME.width - left - 60);
  const marks = rows.map((row, i) => {
    const y = FRAME.top + space * (i + 0.5);
    return [
      svg(
        "text",
        { class: "tick", x: left - 10, y: y + 4, "text-anchor": "end" },
        row.name.length > 18 ? row.name.slice(0, 17) + "\u2026" : row.name,
      ),
      svg("line", { class: "track", x1: x(0), x2: x(1), y1: y, y2: y }),
      Number.isFinite(row.lo) && svg("line", { class: "whisker", x1: x(row.lo), x2: x(row.hi), y1: y, y2: y }),
      svg("circle", { class: "dot s1", cx: x(row.value), cy: y, r: 4 }),
      svg("text", { class: "tick strong", x: x(1) + 8, y: y + 4 }, fmt(row.value)),
    ];
  });
  const bottom = FRAME.top + space * rows.length;
  const ticks = [0, 0.25, 0.5, 0.75, 1].map((v) =>
    svg("text", { class: "tick", x: x(v), y: bottom + 16, "text-anchor": "middle" }, String(v)),
  );
  const title = svg("text", { class: "axis-title", x: x(0.5), y: bottom + 34, "text-anchor": "middle" }, xTitle);
  const drawing = frame(label, marks, ticks, title);
  drawing.setAttribute("viewBox", `0 0 ${FRAME.width} ${bottom + 40}`);
  return drawing;
}
