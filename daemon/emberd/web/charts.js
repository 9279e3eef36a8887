// The past on one axis of time: five charts that share span, zoom and read-out, with a table behind each.

import { find, make, steer, table, tell, unfold, words } from "./words.js";

const NIGHT_BEGINS_H = 22;
const NIGHT_ENDS_H = 8;
const LEAST_SPAN_S = 120;
const RIGHT_REM = 3.6; // in each chart: one below another they share the axis of time
const UNSEEN = "Nothing was recorded in this span.";
const PRESSURE = ["normal", "warn", "critical"];
const each = (value, say) => (value == null ? "unknown" : say(value));
const rem = (count) => count * Number.parseFloat(getComputedStyle(document.documentElement).fontSize);
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

// Steps of an axis, from one up: 1, 2, 5, 10, 20, ...
const stepsFrom = (least) => Array.from({ length: 40 }, (_, number) => least * [1, 2, 5][number % 3] * 10 ** Math.floor(number / 3));
const whole = stepsFrom(1);
const megabytes = stepsFrom(1e6); // with smaller ones two labels would be the same

// What a chart shows of the history. Columns that are stacked come with the top one first.
const CHARTS = [
  {
    title: "First tokens",
    help: "time until a reply began, on a scale by powers of ten",
    isLog: true, // a cold one takes a hundred times as long as a warm one
    key: [["accent", "measured"], ["other", "forecast"]],
    data: (past) => [past.tokens.at_s, past.tokens.took_s, past.tokens.forecast_s],
    series: [
      { dots: "accent", filled: true, label: "Measured", say: words.seconds },
      { dots: "dim", label: "Forecast", say: words.seconds },
    ],
    behind: [
      { label: "Idle before", data: ({ tokens }) => tokens.idle_s, say: words.duration },
      { label: "Found", data: ({ tokens }) => tokens.temperature, say: String },
      { label: "Tokens reused", data: reused, say: String },
    ],
    axis: words.seconds,
    none: "No first token in this span.",
  },
  {
    title: "Memory of the engine",
    help: "what of it is where",
    key: [["locked", "locked"], ["resident", "in memory"], ["swapped", "in swap"]],
    data: (past) => [past.at_s, past.locked_bytes, unlocked(past), past.swapped_bytes],
    stack: true,
    series: [
      { area: "locked", label: "Locked", say: words.bytes },
      { area: "resident", label: "Unlocked", say: words.bytes },
      { area: "swapped", label: "In swap", say: words.bytes },
    ],
    axis: words.bytes,
    steps: megabytes,
  },
  {
    title: "Memory pressure",
    help: "available to programs; shaded while memory is short",
    key: [["other", "available"], ["reading", "warn"], ["swapped", "critical"]],
    data: (past) => [past.at_s, past.available_bytes, past.pressure],
    series: [
      { line: "other", label: "Available", say: words.bytes },
      { band: ["reading", "swapped"], label: "Pressure", say: (value) => PRESSURE[value] },
    ],
    axis: words.bytes,
    steps: megabytes,
  },
  {
    title: "Written to swap",
    help: "by the engine and by others",
    key: [["swapped", "by the engine"], ["other", "by others"]],
    data: (past) => [past.at_s, past.swap_engine_bytes, others(past)],
    stack: true,
    series: [
      { bars: "swapped", label: "By the engine", say: words.bytes },
      { bars: "other", label: "By others", say: words.bytes },
    ],
    axis: words.bytes,
    steps: megabytes,
    none: "Nothing was written to swap in this span.",
  },
  {
    title: "Passes and losses",
    help: "how often emberd warmed, and how much had been taken",
    key: [["other", "passes"], ["swapped", "bytes lost"]],
    data: (past) => [past.at_s, past.passes, past.lost_bytes.map((value) => value || null)],
    series: [
      { bars: "other", label: "Passes", say: String },
      { dots: "swapped", filled: true, scale: "lost", label: "Lost", say: words.bytes },
    ],
    axis: String,
    steps: whole,
    right: { scale: "lost", axis: words.bytes, steps: megabytes },
    none: "No pass and no loss in this span.",
  },
];

const unlocked = (past) => past.resident_bytes.map((all, row) => all && Math.max(all - (past.locked_bytes[row] ?? 0), 0));
function reused({ tokens }) {
  return tokens.reused.map((count, row) => (count == null ? null : `${count} of ${count + tokens.processed[row]}`));
}
const others = (past) =>
  past.swap_other_bytes.map((value, row) => (value == null ? null : value + (past.swap_unknown_bytes[row] ?? 0)));

let shown = [];
let past = null;
let span = [0, 0];
let zoom = [0, 0];
let read = null;

export function spanOf(range, now = Date.now() / 1000) {
  if (range !== "night") return [now - (range === "week" ? 7 : 1) * 86400, now];
  const ends = new Date(now * 1000);
  if (ends.getHours() < NIGHT_ENDS_H) return [at(ends, ends.getHours() >= NIGHT_BEGINS_H ? 0 : -1, NIGHT_BEGINS_H), now];
  return [at(ends, -1, NIGHT_BEGINS_H), at(ends, 0, NIGHT_ENDS_H)];
}

function at(date, days, hour) {
  return new Date(date.getFullYear(), date.getMonth(), date.getDate() + days, hour).getTime() / 1000;
}

export function drawCharts(history, [from, to], { keepsZoom = false } = {}) {
  past = withGaps(history);
  const isZoomed = keepsZoom && isPart();
  span = [from, to];
  zoom = isZoomed ? within(...zoom) : span;
  if (!shown.length) build();
  for (const chart of shown) update(chart);
  tellZoom();
  performance.mark("charts");
}

// Whether less than the span is shown; a second is left for rounding.
function isPart() {
  return zoom[0] > span[0] + 1 || zoom[1] < span[1] - 1;
}

function tellZoom() {
  const isZoomed = isPart();
  if (isZoomed) tell(find("zoom"), zoom.map(words.moment).join(" to "));
  find("zoomed").hidden = !isZoomed;
}

find("all").addEventListener("click", () => zoomTo(...span));

function build() {
  find("charts").replaceChildren();
  shown = CHARTS.map((kind) => {
    const out = make("output");
    const plot = make("div.plot");
    plot.setAttribute("aria-label", `${kind.title}: ${kind.help}`);
    plot.setAttribute("aria-describedby", "chart-hint");
    const key = make("ul.key", ...kind.key.map(([name, text]) => swatch(name, text)));
    key.setAttribute("aria-hidden", "true");
    const chart = { kind, plot, out, key, data: [[]], raw: [[]], u: null };
    chart.table = unfold(`${kind.title} as a table`, () => rows(chart));
    find("charts").append(make("div.chart", make("div.of", make("h3", kind.title), out), plot, key, chart.table));
    chart.go = steer(plot, {
      count: () => chart.raw[0].length,
      move: (number) => move(chart, number),
      other: (pressed) => press(pressed),
    });
    plot.addEventListener("blur", leave);
    new ResizeObserver(() => chart.u?.setSize({ width: plot.clientWidth, height: plot.clientHeight })).observe(plot);
    return chart;
  });
  matchMedia("(prefers-color-scheme: dark)").onchange = () => {
    for (const chart of shown) {
      chart.u?.destroy();
      chart.u = null;
      update(chart);
    }
  };
}

// A step of nothing after each row that is not followed by the next one: emberd was away, and no line is drawn.
function withGaps(history) {
  const ends = history.at_s.map((time, row) => (history.at_s[row + 1] ?? time) - time > 1.5 * history.step_s);
  const columns = Object.entries(history).filter(([name, values]) => Array.isArray(values) && name !== "days");
  const spread = ([name, values]) => [
    name,
    values.flatMap((value, row) => (ends[row] ? [value, name === "at_s" ? value + history.step_s : null] : [value])),
  ];
  return { ...history, ...Object.fromEntries(columns.map(spread)) };
}

function swatch(name, text) {
  const mark = make("i");
  mark.style.background = `var(--${name})`;
  return make("li", mark, text);
}

// --- data -------------------------------------------------------------------------------------------------------

function update(chart) {
  chart.raw = chart.kind.data(past);
  chart.data = chart.kind.stack ? stacked(chart.raw) : chart.raw.map((column, number) => (number > 1 && chart.kind.series[number - 1].band ? column.map(() => null) : column));
  chart.none = sayNone(chart);
  tell(chart.out, chart.none);
  if (chart.u) {
    chart.u.batch(() => {
      chart.u.setData(chart.data, false);
      chart.u.setScale("x", { min: zoom[0], max: zoom[1] });
    });
  } else {
    chart.u = new uPlot(options(chart), chart.data, chart.plot);
    touch(chart);
  }
  if (chart.table.open) chart.table.refresh();
}

// Why a chart is empty. What is not known is never called nothing.
function sayNone({ kind, raw }) {
  const values = raw.slice(1).flat();
  if (values.some((value) => value)) return "";
  const isKnown = values.some((value) => value != null) || (past.at_s.length > 0 && !raw[0].length);
  return isKnown ? (kind.none ?? "") : UNSEEN;
}

// Sums from the bottom up; the highest is drawn first, and the others over it.
function stacked([times, ...columns]) {
  const sums = columns.map(() => []);
  times.forEach((_, row) => {
    let sum = 0;
    columns.forEach((column, number) => {
      sum += column[row] ?? 0;
      sums[number].push(column.every((_, other) => columns[other]?.[row] == null) ? null : sum);
    });
  });
  return [times, ...sums.reverse()];
}

function rows({ kind, raw }) {
  const shown = [...kind.series.map((one, number) => ({ ...one, values: raw[number + 1] })),
    ...(kind.behind ?? []).map((one) => ({ ...one, values: one.data(past) }))];
  const lines = [];
  raw[0].forEach((time, row) => {
    if (time < zoom[0] || time > zoom[1] || raw.slice(1).every((column) => column[row] == null)) return;
    lines.push([words.moment(time), ...shown.map(({ values, say }) => each(values[row], say))]);
  });
  return table(["Time", ...shown.map((one) => one.label)], lines.reverse(), shown.map((_, number) => number + 1));
}

// --- drawing ----------------------------------------------------------------------------------------------------

function options(chart) {
  const { kind } = chart;
  const drawn = kind.stack ? [...kind.series].reverse() : kind.series;
  const line = { stroke: colour("dim"), grid: { stroke: colour("grid"), width: 1 }, ticks: { show: false }, font: `${rem(0.75)}px ${getComputedStyle(document.body).fontFamily}` };
  return {
    width: chart.plot.clientWidth,
    height: chart.plot.clientHeight,
    padding: [8, kind.right ? 0 : rem(RIGHT_REM), 0, 0],
    legend: { show: false },
    cursor: {
      sync: { key: "time" },
      drag: { x: true, y: false },
      y: false,
      points: { show: false },
      bind: { dblclick: () => () => zoomTo(...span) },
    },
    scales: {
      x: { time: true, auto: false, range: () => zoom },
      y: kind.isLog ? { distr: 3, range: decades } : { range: (_, low, high) => [0, high > 0 ? high * 1.08 : 1] },
      lost: { range: (_, low, high) => [0, high > 0 ? high * 1.08 : 1] },
    },
    axes: [
      { ...line, size: rem(1.6), space: rem(4.5), grid: { show: false }, values: times },
      upright(line, kind, { size: rem(4) }),
      ...(kind.right ? [upright({ ...line, grid: { show: false } }, kind.right, { side: 1, size: rem(RIGHT_REM) })] : []),
    ],
    series: [{}, ...drawn.map(series)],
    hooks: {
      drawClear: [(u) => shade(u, chart)],
      setCursor: [(u) => readOut(chart, u.cursor.idx)],
      setSelect: [(u) => u.select.width > 4 && zoomTo(u.posToVal(u.select.left, "x"), u.posToVal(u.select.left + u.select.width, "x"))],
    },
  };
}

// An axis of values: nothing where there is no value, on a logarithmic one labels and lines at whole powers of ten only.
function upright(line, { axis, steps, isLog, scale = "y" }, place) {
  const filter = (u, splits) => {
    const isEmpty = !hasValue(u, scale);
    return splits.map((value) => (isEmpty || (isLog && Math.abs(Math.log10(value) % 1) > 1e-9) ? null : value));
  };
  const values = (_, splits) => splits.map((value) => (value == null ? "" : axis(value)));
  return { ...line, ...place, scale, incrs: steps, space: rem(2.2), filter, values, grid: { ...line.grid, filter } };
}

function hasValue(u, scale) {
  return u.series.some((one, number) => number > 0 && one.scale === scale && u.data[number].some((value) => value));
}

// Whole powers of ten around the values.
function decades(_, low, high) {
  return [10 ** Math.floor(Math.log10(low > 0 ? low : 0.1)), 10 ** Math.ceil(Math.log10(high > 0 ? high * 1.001 : 1))];
}

function series(one) {
  const [stroke] = [one.area, one.line, one.bars, one.dots].filter(Boolean).map(colour);
  const scale = one.scale ?? "y";
  if (one.band) return { show: false };
  if (one.dots) {
    return { scale, paths: () => null, points: { show: true, size: one.filled ? 7 : 9, width: 1.5, stroke, fill: one.filled ? stroke : "transparent" } };
  }
  const bars = one.bars && uPlot.paths.bars({ size: [0.8, 14], align: 1 });
  return { scale, stroke, width: one.bars ? 0 : 1.5, fill: one.line ? undefined : stroke, points: { show: false }, ...(bars ? { paths: bars } : {}) };
}

// The level of memory pressure, as bands behind the line.
function shade(u, chart) {
  const number = chart.kind.series.findIndex((one) => one.band);
  if (number < 0) return;
  const [times, levels] = [chart.raw[0], chart.raw[number + 1]];
  u.ctx.save();
  u.ctx.beginPath();
  u.ctx.rect(u.bbox.left, u.bbox.top, u.bbox.width, u.bbox.height);
  u.ctx.clip();
  times.forEach((time, row) => {
    if (!levels[row]) return;
    const [left, right] = [time, times[row + 1] ?? time + 60].map((value) => u.valToPos(value, "x", true));
    u.ctx.fillStyle = colour(chart.kind.series[number].band[levels[row] - 1]);
    u.ctx.globalAlpha = 0.35;
    u.ctx.fillRect(left, u.bbox.top, Math.max(right - left, 1), u.bbox.height);
  });
  u.ctx.restore();
}

function times(_, splits, __, ___, step) {
  return splits.map((time) => {
    const date = new Date(time * 1000);
    const isMidnight = !date.getHours() && !date.getMinutes();
    return step >= 86400 || isMidnight ? `${date.toLocaleDateString([], { weekday: "short" })} ${date.getDate()}` : words.clock(time);
  });
}

// --- reading out and zooming ------------------------------------------------------------------------------------

function readOut(chart, row) {
  if (row == null || chart.raw[0][row] == null) {
    tell(chart.out, chart.none);
    return "";
  }
  const values = chart.kind.series.map((one, number) => `${one.label.toLowerCase()} ${each(chart.raw[number + 1][row], one.say)}`);
  const text = `${words.moment(chart.raw[0][row])}: ${values.join(", ")}`;
  tell(chart.out, text);
  return text;
}

function move(chart, number) {
  if (number == null) return "";
  read = chart.raw[0][number];
  const half = (zoom[1] - zoom[0]) / 2;
  if (read < zoom[0] || read > zoom[1]) zoomTo(read - half, read + half);
  else point();
  return readOut(chart, number);
}

// Put every chart's cursor where the keyboard reads.
function point() {
  if (read == null) return;
  for (const { u } of shown) u?.setCursor({ left: u.valToPos(read, "x"), top: u.over.clientHeight / 3 });
}

function leave() {
  read = null;
  for (const { u } of shown) u?.setCursor({ left: -10, top: -10 });
}

function press(pressed) {
  const middle = read ?? (zoom[0] + zoom[1]) / 2;
  if (pressed === "+" || pressed === "=") zoomAt(middle, 0.5);
  else if (pressed === "-") zoomAt(middle, 2);
  else if (pressed === "Escape" || pressed === "0") zoomTo(...span);
  else return false;
  return true;
}

function zoomAt(time, factor) {
  zoomTo(time - (time - zoom[0]) * factor, time + (zoom[1] - time) * factor);
}

// What lies in the span of a part of it, as wide as that if possible.
function within(from, to) {
  const width = Math.min(Math.max(to - from, LEAST_SPAN_S), span[1] - span[0]);
  const begin = Math.min(Math.max(from, span[0]), span[1] - width);
  return [begin, begin + width];
}

function zoomTo(from, to) {
  zoom = within(from, to);
  for (const { u, table: behind } of shown) {
    u?.setScale("x", { min: zoom[0], max: zoom[1] });
    u?.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
    if (behind.open) behind.refresh();
  }
  tellZoom();
  setTimeout(point); // uPlot takes over a scale at the end of this task
}

// One finger reads out, two zoom; up and down scroll the page.
function touch({ u }) {
  const fingers = new Map();
  const { over } = u;
  const place = (event) => event.clientX - over.getBoundingClientRect().left;
  over.style.touchAction = "pan-y";
  const lift = (event) => fingers.delete(event.pointerId);
  over.addEventListener("pointerdown", (event) => event.pointerType === "touch" && fingers.set(event.pointerId, place(event)));
  for (const name of ["pointerup", "pointercancel", "pointerleave"]) over.addEventListener(name, lift);
  over.addEventListener("pointermove", (event) => {
    if (!fingers.has(event.pointerId)) return;
    const before = [...fingers.values()];
    fingers.set(event.pointerId, place(event));
    const now = [...fingers.values()];
    if (now.length === 1) {
      for (const other of shown) other.u.setCursor({ left: now[0], top: over.clientHeight / 3 });
    } else if (now.length === 2) {
      const [was, is] = [Math.abs(before[0] - before[1]), Math.abs(now[0] - now[1])];
      if (was > 8 && is > 8) zoomAt(u.posToVal((now[0] + now[1]) / 2, "x"), was / is);
    }
  });
}
