"use strict";

// ---------------------------------------------------------------- elements and texts
const state = { contents: JSON.parse(document.getElementById("contents").textContent), hidden: new Set(), xAxis: "step" };
const COLOURS = {
  light: ["#1f5fd6", "#c2410c", "#15803d", "#9333ea", "#0e7490", "#be185d", "#4d7c0f", "#5b4ad8", "#a16207", "#475569"],
  dark: ["#8ab4ff", "#ffa066", "#74d693", "#d7a6ff", "#62d3e8", "#ff95bd", "#b9dd6a", "#b3a6ff", "#eac55e", "#b6c2d3"],
};
const DASHES = ["solid", "dash", "dot", "dashdot"];
const calm = matchMedia("(prefers-reduced-motion: reduce)");
const coarse = matchMedia("(pointer: coarse)");
let nextId = 0;

// An element; children are elements or plain texts, never HTML.
function el(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "class") node.className = value;
    else if (name === "style") Object.assign(node.style, value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(4).filter((child) => child !== null && child !== undefined));
  return node;
}

// Plotly reads some markup in texts; names of users are no markup.
function plain(text) {
  return String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
}

function format(value) {
  if (value === null || value === undefined || value === "") return "";
  if (typeof value !== "number") return String(value);
  if (Number.isInteger(value) && Math.abs(value) < 1e6) return value.toLocaleString("en");
  const size = Math.abs(value);
  if (size >= 1e6 || size < 1e-3) return value.toExponential(3);
  return String(Number(value.toPrecision(4)));
}

function percentText(value, metric) {
  if (value === null || value === undefined) return "";
  return metric === "R2" || Math.abs(value) < 1 ? value.toFixed(3) : value.toFixed(1);
}

function css(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function isDark() {
  return document.documentElement.dataset.theme === "dark";
}

function colourOf(index) {
  const colours = COLOURS[isDark() ? "dark" : "light"];
  return colours[index % colours.length];
}

function faint(colour, part) {
  const value = parseInt(colour.slice(1), 16);
  return `rgba(${value >> 16}, ${(value >> 8) & 255}, ${value & 255}, ${part})`;
}

function shownRuns() {
  return state.contents.runs.map((run, index) => ({ run, index })).filter(({ run }) => !state.hidden.has(run.name));
}

// Nodes, and what makes them show other runs or figures.
const onRuns = new Map();

// ---------------------------------------------------------------- charts
const charts = new Map();
const viewer = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    if (!entry.isIntersecting) continue;
    const chart = charts.get(entry.target);
    if (chart) { chart.near = true; drawIfStale(entry.target); }
  }
}, { rootMargin: "500px" });

function layoutWith(more) {
  const axis = { gridcolor: css("--grid"), zerolinecolor: css("--line"), linecolor: css("--line"), automargin: true, title: { font: { size: 12 }, standoff: 8 } };
  const { xaxis, yaxis, ...rest } = more;
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: css("--ink"), size: 12, family: "system-ui, sans-serif" },
    margin: { l: 54, r: 12, t: 12, b: 44 }, showlegend: false, modebar: { bgcolor: "rgba(0,0,0,0)", color: css("--quiet"), activecolor: css("--accent") }, hovermode: "x unified", dragmode: coarse.matches ? false : "zoom",
    hoverlabel: { bgcolor: css("--card"), bordercolor: css("--line"), font: { color: css("--ink"), size: 12 } },
    xaxis: mergedAxis(axis, xaxis), yaxis: mergedAxis(axis, yaxis), ...rest,
  };
}

function mergedAxis(base, own = {}) {
  return { ...base, ...own, title: { ...base.title, ...own.title } };
}

// A chart is drawn when it comes near the view. build(): {traces, layout, label}.
function chartNode(build, tall) {
  const node = el("div", { class: tall ? "chart tall" : "chart", tabindex: "0", role: "group", "aria-roledescription": "chart" });
  charts.set(node, { build, near: false, stale: true, point: -1 });
  node.addEventListener("keydown", (event) => moveByKey(node, event));
  viewer.observe(node);
  return node;
}

function drawIfStale(node) {
  const chart = charts.get(node);
  if (!chart.near || !chart.stale) return;
  const { traces, layout, label } = chart.build();
  chart.stale = false;
  node.setAttribute("aria-label", `${label}. Arrow keys read values, plus and minus zoom, 0 resets.`);
  Plotly.react(node, traces, layoutWith(layout), {
    responsive: true, displaylogo: false, displayModeBar: coarse.matches ? false : "hover", scrollZoom: false,
    modeBarButtons: [["zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d", "toImage"]],
    toImageButtonOptions: { format: "png", scale: 2 },
  });
}

function redrawCharts() {
  for (const [node, chart] of charts) {
    if (!node.isConnected) { viewer.unobserve(node); charts.delete(node); continue; }
    chart.stale = true;
    drawIfStale(node);
  }
}

// The keyboard reads a chart as the mouse does.
function moveByKey(node, event) {
  if (event.target !== node || !node.data || !node.data.length) return;
  const chart = charts.get(node);
  const curve = node.data.findIndex((trace) => trace.x && trace.hoverinfo !== "skip" && trace.x.length);
  const axis = node._fullLayout.xaxis;
  const move = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10 }[event.key];
  if (move && curve >= 0) {
    const last = node.data[curve].x.length - 1;
    chart.point = Math.min(last, Math.max(0, chart.point + move));
    Plotly.Fx.hover(node, [{ curveNumber: curve, pointNumber: chart.point }]);
  } else if (event.key === "+" || event.key === "-") {
    const [low, high] = axis.range.map(Number);
    const part = (high - low) * (event.key === "+" ? 0.25 : -0.5);
    Plotly.relayout(node, { "xaxis.range": [low + part, high - part] });
  } else if (event.key === "0") {
    Plotly.relayout(node, { "xaxis.autorange": true, "yaxis.autorange": true });
  } else if (event.key === "Escape") {
    Plotly.Fx.unhover(node);
  } else {
    return;
  }
  event.preventDefault();
}

function xOf(run, steps) {
  if (state.xAxis === "clips" && run.batch) return steps.map((step) => step * run.batch);
  if (state.xAxis === "flops" && run.curves.flops) {
    const { x, y } = run.curves.flops;
    let i = 0;
    return steps.map((step) => {
      while (i < x.length - 1 && x[i + 1] <= step) i += 1;
      if (step <= x[0]) return y[0] * step / x[0];
      if (i === x.length - 1) return y[i];
      return y[i] + (y[i + 1] - y[i]) * (step - x[i]) / (x[i + 1] - x[i]);
    });
  }
  return steps;
}

const X_TITLES = { step: "step", clips: "clips seen", flops: "model FLOPs of training" };

// Cards by the title of their chart. One is kept when other charts come, and with it what the reader chose.
const curveCards = new Map();

// A card with a curve of each run: one column of the log at a time.
function curveCard(panel) {
  const known = curveCards.get(panel.title);
  if (known && known.isConnected) { known.update(panel); return known; }
  const own = { column: panel.columns[0], log: panel.log };
  const build = () => {
    const traces = [];
    const shapes = [];
    const ends = [];
    for (const { run, index } of shownRuns()) {
      const column = run.curves.columns[own.column];
      if (!column) continue;
      const steps = run.curves.x[column.x];
      const x = xOf(run, steps);
      const colour = colourOf(index);
      const few = steps.length <= 60;
      if (column.low) {
        traces.push({ x, y: column.low, mode: "lines", line: { width: 0 }, hoverinfo: "skip" });
        traces.push({ x, y: column.high, mode: "lines", line: { width: 0 }, fill: "tonexty", fillcolor: faint(colour, 0.13), hoverinfo: "skip" });
      }
      traces.push({
        x, y: column.y, name: plain(run.name), mode: few ? "lines+markers" : "lines", line: { color: colour, width: 1.8, dash: DASHES[Math.floor(index / 10) % 4] },
        marker: { size: 6, color: colour, symbol: index % 20 }, hovertemplate: "%{y:.5~g}",
      });
      ends.push(`${run.name} ${format(column.y[column.y.length - 1])}`);
      if (panel.of_features) collapseMarks(run, column, x, colour, traces, shapes);
    }
    return {
      traces, label: `${panel.title}, ${own.column}; last values: ${ends.join(", ") || "none"}`,
      layout: {
        shapes, uirevision: `${own.column} ${state.xAxis} ${own.log}`,
        xaxis: { title: { text: X_TITLES[state.xAxis] }, exponentformat: "power", hoverformat: state.xAxis === "flops" ? ".3e" : ",d" },
        yaxis: { title: { text: panel.unit }, type: own.log ? "log" : "linear", rangemode: own.log ? "normal" : "tozero", exponentformat: "SI", dtick: own.log ? null : undefined },
      },
    };
  };
  const node = chartNode(build);
  const refresh = () => { charts.get(node).stale = true; drawIfStale(node); };
  const select = el("select", { "aria-label": `Column of ${panel.title}`, onchange: (e) => { own.column = e.target.value; refresh(); } });
  const log = el("button", { type: "button", "aria-pressed": String(own.log), "aria-label": `Logarithmic axis of ${panel.title}`, onclick: (e) => {
    own.log = !own.log;
    e.target.setAttribute("aria-pressed", String(own.log));
    refresh();
  } }, "log");
  const values = valuesOf(panel.title);
  const card = el("article", { class: "card", "data-panel": panel.title }, el("div", { class: "head" }, el("h3", {}, panel.title), el("div", { class: "tools" }, select, log)),
    el("p", { class: "note" }, panel.about), node, values);
  card.update = ({ columns }) => {
    if (!columns.includes(own.column)) own.column = columns[0];
    select.replaceChildren(...columns.map((name) => el("option", { value: name, selected: name === own.column }, name)));
    select.hidden = columns.length < 2;
    values.columns = columns;
  };
  card.update(panel);
  curveCards.set(panel.title, card);
  return card;
}

function collapseMarks(run, column, x, colour, traces, shapes) {
  const marked = { x: [], y: [] };
  for (const [start, end] of run.collapse) {
    const inside = run.curves.x[column.x].map((step, i) => [step, i]).filter(([step]) => step >= start && step <= end);
    if (!inside.length) continue;
    inside.forEach(([, i]) => { marked.x.push(x[i]); marked.y.push(column.y[i]); });
    shapes.push({ type: "rect", xref: "x", yref: "paper", x0: x[inside[0][1]], x1: x[inside[inside.length - 1][1]], y0: 0, y1: 1,
      fillcolor: faint(colour, 0.12), line: { color: faint(colour, 0.5), width: 1, dash: "dot" } });
  }
  if (marked.x.length) {
    traces.push({ ...marked, name: `${plain(run.name)}: collapsed`, mode: "markers", marker: { symbol: "x", size: 9, color: css("--bad") }, hovertemplate: "%{y:.5~g}" });
  }
}

// First, lowest, highest and last values: what a chart says, as a table, which follows the runs while it is open.
function valuesOf(title) {
  const details = el("details", {}, el("summary", {}, "Values"));
  const rows = [];
  let scroller = null;
  const fill = () => {
    if (!details.open) return;
    rows.splice(0, rows.length, ...state.contents.runs.flatMap((run) => valueRows(run, details.columns)));
    if (scroller) { scroller.refill(); return; }
    scroller = table(`${title}: values`, [["run", "run"], ["column", "column"], ["first", "first"], ["lowest", "lowest"], ["highest", "highest"], ["last", "last"]], rows);
    details.append(scroller);
  };
  details.addEventListener("toggle", fill);
  onRuns.set(details, fill);
  return details;
}

function valueRows(run, names) {
  return names.filter((name) => run.curves.columns[name]).map((name) => {
    const column = run.curves.columns[name];
    return { run: run.name, column: name, first: column.y[0], lowest: Math.min(...(column.low || column.y)), highest: Math.max(...(column.high || column.y)), last: run.last[name] ?? column.y[column.y.length - 1] };
  });
}

// ---------------------------------------------------------------- tables
// columns: [key, title, text of a value (optional)]; a column sorts by its values.
function table(caption, columns, rows, options = {}) {
  const sort = { key: null, up: true };
  const body = el("tbody");
  const isNumber = (key) => rows.some((row) => typeof row[key] === "number");
  const heads = columns.map(([key, title]) => el("th", { scope: "col", class: isNumber(key) ? "number" : null, "aria-sort": "none" },
    el("button", { type: "button", onclick: () => { sort.up = sort.key === key ? !sort.up : !isNumber(key); sort.key = key; fill(); } }, title)));
  const compare = (a, b) => {
    const [x, y] = [a[sort.key], b[sort.key]];
    if (x === y) return 0;
    if (x === null || x === undefined || x === "") return 1;
    if (y === null || y === undefined || y === "") return -1;
    const order = typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y), "en", { numeric: true });
    return sort.up ? order : -order;
  };
  function fill() {
    const ordered = sort.key === null ? rows : [...rows].sort(compare);
    heads.forEach((head, i) => head.setAttribute("aria-sort", columns[i][0] !== sort.key ? "none" : sort.up ? "ascending" : "descending"));
    body.replaceChildren(...ordered.filter((row) => !options.keep || options.keep(row)).map((row) => el("tr", { class: options.mark && options.mark(row) },
      columns.map(([key, , text], i) => {
        const value = text ? text(row[key], row) : format(row[key]);
        return i === 0 ? el("th", { scope: "row" }, value) : el("td", { class: isNumber(key) ? "number" : "text" }, value);
      }))));
  }
  fill();
  const scroller = el("div", { class: options.wraps ? "scroll wraps" : "scroll", tabindex: "0", role: "region", "aria-label": `Table: ${caption}` },
    el("table", {}, el("caption", {}, caption), el("thead", {}, el("tr", {}, heads)), body));
  scroller.refill = fill;
  return scroller;
}

// ---------------------------------------------------------------- players of clips
const players = new Set();
const playing = new IntersectionObserver((entries) => {
  for (const entry of entries) entry.target.player.visible = entry.isIntersecting;
}, { rootMargin: "100px" });

function showFrame(player, frame) {
  player.frame = frame;
  for (const { node, frames } of player.clips) node.style.backgroundPosition = `${frames > 1 ? (100 * (frame % frames)) / (frames - 1) : 0}% 0`;
  player.slider.value = String(frame);
  player.output.textContent = `${frame + 1} / ${player.frames}`;
}

function setPlaying(player, on) {
  player.on = on;
  player.button.textContent = on ? "Pause" : "Play";
  player.button.setAttribute("aria-label", `${on ? "Pause" : "Play"} ${player.title}`);
}

// item: {title, about, frames, fps, wide, rows: [{label, note, src, width, height, smooth, frames}]}
function playerCard(item) {
  const player = { ...item, frame: 0, on: false, visible: false, clips: [] };
  const figures = item.rows.map((row) => {
    const clip = el("div", { class: row.smooth ? "clip smooth" : "clip", role: "img", "aria-label": `${item.title}: ${row.label}` , style: {
      backgroundImage: `url(${row.src})`, backgroundSize: `${100 * (row.frames || item.frames)}% 100%`, aspectRatio: `${row.width} / ${row.height}` } });
    player.clips.push({ node: clip, frames: row.frames || item.frames });
    return el("figure", {}, clip, el("figcaption", {}, row.label, row.note ? el("small", {}, row.note) : null));
  });
  const card = el("article", { class: item.wide ? "card player all" : "card player" }, el("h3", {}, item.title), item.about ? el("p", { class: "note" }, item.about) : null,
    el("div", { class: "strips", style: item.columns ? { gridTemplateColumns: `repeat(${item.columns}, 1fr)` } : {} }, figures));
  if (item.frames < 2) return card;
  player.button = el("button", { type: "button", onclick: () => setPlaying(player, !player.on) }, "Play");
  player.slider = el("input", { type: "range", min: 0, max: item.frames - 1, step: 1, value: 0, "aria-label": `Frame of ${item.title}`,
    oninput: (e) => { setPlaying(player, false); showFrame(player, Number(e.target.value)); } });
  player.output = el("output", {});
  card.append(el("div", { class: "playbar" }, player.button, player.slider, player.output));
  card.player = player;
  players.add(player);
  playing.observe(card);
  setPlaying(player, !calm.matches);
  showFrame(player, 0);
  return card;
}

setInterval(() => {
  const now = performance.now();
  for (const player of players) {
    if (!player.on || !player.visible || document.hidden || now - (player.shown || 0) < 1000 / (player.fps || 8)) continue;
    player.shown = now;
    showFrame(player, (player.frame + 1) % player.frames);
  }
}, 40);

// ---------------------------------------------------------------- sections
function section(id, title, about, ...children) {
  return el("section", { id, "aria-labelledby": `${id}-title` }, el("h2", { id: `${id}-title` }, title), about ? el("p", { class: "quiet" }, about) : null, children);
}

function definitions(pairs) {
  return el("dl", { class: "facts" }, pairs.map(([name, text]) => [el("dt", {}, name), el("dd", {}, text)]));
}

function summarySection({ runs }) {
  if (!runs.length) return null;
  const cards = runs.map((run) => {
    const [first] = run.verdicts;
    return el("article", { class: "card run-card", "data-run": run.name }, el("div", { class: "head" }, el("h3", {}, run.name), el("span", { class: `badge ${first.kind}` }, first.answer)),
      definitions(run.facts), verdictList(run.verdicts), missingList(run.missing, `What is missing in ${run.name}`));
  });
  return section("summary", "Summary", "Each verdict follows a stated rule from the run's own files.", el("div", { class: "grid" }, cards));
}

function curveSections({ panels }) {
  const select = el("select", { id: "x-axis", onchange: (e) => { state.xAxis = e.target.value; redrawCharts(); } },
    Object.entries(X_TITLES).map(([value, text]) => el("option", { value, selected: value === state.xAxis }, text)));
  const groups = [["curves", "Curves", "Drag to zoom, double-click to reset; where a log is long, a point is a mean of several steps and the band its extremes.", panels.filter((p) => !p.of_features)],
    ["features", "Features over training", "Spread and rank of the encoder's tokens. A shaded span with crosses is a collapse.", panels.filter((p) => p.of_features)]];
  return groups.filter(([, , , own]) => own.length).map(([id, title, about, own], i) => section(id, title, about,
    i === 0 ? el("p", {}, el("label", { for: "x-axis" }, "Horizontal axis "), select) : null, el("div", { class: "grid" }, own.map(curveCard))));
}

const CONTROL_NAMES = { none: "unchanged clips", random_init: "untrained", pixels: "mean colours", shuffled: "frames shuffled", reversed: "frames reversed", still: "one frame repeated", single: "one frame" };

function controlName(control) {
  return CONTROL_NAMES[control] || control;
}

function allRows(key) {
  return state.contents.runs.flatMap((run, index) => run[key].map((row) => ({ run: run.name, index, ...row })));
}

function intervalText(_, row) {
  return row.low === null || row.low === undefined ? "" : `${percentText(row.low, row.metric)} to ${percentText(row.high, row.metric)}`;
}

const HATCHES = { none: "", random_init: "/", pixels: ".", shuffled: "x", reversed: "\\", still: "-", single: "|" };

// Bars of one label set: probes by controls, with intervals and chance.
function probeChart(label, rows) {
  const mine = rows.filter((row) => row.label === label && row.fraction === null);
  const protocols = [...new Set(mine.map((row) => row.protocol))];
  const controls = [...new Set(mine.map((row) => row.control))];
  const build = () => {
    const shown = mine.filter((row) => !state.hidden.has(row.run));
    const nameOf = (row) => plain([state.contents.runs.length > 1 ? row.run : "", row.probe === row.run ? "" : row.probe, protocols.length > 1 ? row.protocol : ""].filter((t) => t).join("<br>")).replaceAll("&lt;br&gt;", "<br>") || "probe";
    const traces = controls.map((control, i) => {
      const own = shown.filter((row) => row.control === control && row.value !== null);
      return { type: "bar", name: controlName(control), x: own.map(nameOf), y: own.map((row) => row.value), marker: { color: own.map((row) => control === "none" ? colourOf(row.index) : faint(isDark() ? "#a5afbf" : "#566072", 0.75 - 0.12 * (i % 5))),
        pattern: { shape: HATCHES[control] || "", fillmode: "overlay", fgcolor: css("--card"), size: 7 } },
        error_y: { type: "data", symmetric: false, array: own.map((row) => row.high === null ? 0 : Math.max(0, row.high - row.value)), arrayminus: own.map((row) => row.low === null ? 0 : Math.max(0, row.value - row.low)), color: css("--ink"), thickness: 1.2, width: 3 },
        hovertemplate: `%{y:.1f}<extra>${controlName(control)}</extra>` };
    });
    const chances = [...new Set(shown.map((row) => row.chance).filter((value) => value !== null))];
    return { traces, label: `Probes of ${label}: ${shown.map((row) => `${row.run} ${controlName(row.control)} ${percentText(row.value, row.metric)}`).slice(0, 12).join(", ")}`,
      layout: { barmode: "group", hovermode: "closest", showlegend: controls.length > 1, legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, font: { size: 11 } }, uirevision: label,
        shapes: chances.map((chance) => ({ type: "line", xref: "paper", x0: 0, x1: 1, y0: chance, y1: chance, line: { color: css("--ink"), width: 1.2, dash: "dot" } })),
        annotations: chances.slice(0, 1).map((chance) => ({ xref: "paper", x: 1, y: chance, text: "chance", showarrow: false, xanchor: "right", yanchor: "bottom", font: { size: 11, color: css("--quiet") } })),
        margin: { l: 50, r: 12, t: controls.length > 1 ? 60 : 14, b: 60 }, yaxis: { title: { text: mine[0].metric === "R2" ? "R2" : `${mine[0].metric}, %` }, rangemode: "tozero" }, xaxis: { tickfont: { size: 11 } } } };
  };
  return el("article", { class: "card" }, el("h3", {}, label), el("p", { class: "note" }, "Bars: 95 % intervals over groups of test samples."), chartNode(build, true));
}

const PROBE_COLUMNS = [["run", "run"], ["probe", "probe"], ["step", "step"], ["label", "label"], ["protocol", "protocol"], ["control", "control", controlName], ["fraction", "part of train"], ["metric", "metric"],
  ["value", "value", (v, row) => percentText(v, row.metric)], ["low", "95 % interval", intervalText], ["chance", "chance", (v, row) => percentText(v, row.metric)], ["top5", "top 5", (v) => percentText(v)], ["mean_per_class", "mean per class", (v) => percentText(v)], ["n_test", "test samples"], ["n_train", "train samples"]];

function filteredTable(caption, columns, rows) {
  let wanted = "";
  const used = columns.filter(([key]) => rows.some((row) => row[key] !== null && row[key] !== undefined && row[key] !== ""));
  const scroller = table(caption, used, rows, { keep: (row) => !state.hidden.has(row.run) && (!wanted || used.some(([key, , text]) => String(text ? text(row[key], row) : row[key]).toLowerCase().includes(wanted))) });
  const search = el("input", { type: "search", placeholder: "Filter", "aria-label": `Filter ${caption}`, oninput: (e) => { wanted = e.target.value.toLowerCase(); scroller.refill(); } });
  onRuns.set(scroller, scroller.refill);
  return el("article", { class: "card" }, el("div", { class: "head" }, el("h3", {}, caption), el("div", { class: "tools" }, search)), scroller);
}

function probeSection() {
  const rows = allRows("probes");
  if (!rows.length) return null;
  const labels = [...new Set(rows.filter((row) => row.fraction === null).map((row) => row.label))];
  return section("probes", "Probes", "Frozen features, chosen on held-out train, test read once; beside them what weakened inputs and encoders reach.",
    el("div", { class: "grid charts" }, labels.map((label) => probeChart(label, rows))), filteredTable("All results of probes", PROBE_COLUMNS, rows));
}

function denseSection() {
  const rows = allRows("dense");
  return rows.length ? section("dense", "Dense heads", "Depth, keypoints and propagation on frozen features.", filteredTable("Results of dense heads", PROBE_COLUMNS, rows)) : null;
}

function confusionSection({ runs }) {
  const found = runs.flatMap((run) => run.confusions.map((item) => ({ run: run.name, ...item })));
  if (!found.length) return null;
  const place = el("div", { class: "wide" });
  const show = (item) => {
    const pairs = item.pairs.map(([truth, predicted, n]) => ({ truth, predicted: predicted || "(not decoded)", n }));
    const children = [];
    if (item.matrix) children.push(el("article", { class: "card" }, el("h3", {}, "Matrix"), el("p", { class: "note" }, "Rows: true class; columns: predicted. Colour: part of the row."), chartNode(() => matrixChart(item), true)));
    children.push(el("article", { class: "card" }, el("h3", {}, "Most frequent confusions"), table("Confusions", [["truth", "true class"], ["predicted", "predicted"], ["n", "samples"]], pairs)));
    children.push(el("article", { class: "card" }, el("h3", {}, "Classes"), table("Accuracy of each class", [["class", "class"], ["n", "samples"], ["right", "correct"], ["accuracy", "accuracy, %", (v) => v.toFixed(1)]], item.per_class)));
    place.replaceChildren(el("div", { class: "grid" }, children));
  };
  const select = el("select", { id: "confusion", onchange: (e) => show(found[Number(e.target.value)]) }, found.map((item, i) => el("option", { value: i }, `${item.run} · ${item.probe} · ${item.label} (${item.n} samples)`)));
  show(found[0]);
  return section("confusions", "Confusions", "Of test samples on unchanged clips, from predictions.csv.", el("p", {}, el("label", { for: "confusion" }, "Probe "), select), place);
}

function matrixChart(item) {
  const sums = item.matrix.map((row) => row.reduce((a, b) => a + b, 0));
  const z = item.matrix.map((row, i) => row.map((n) => sums[i] ? 100 * n / sums[i] : null));
  const names = item.columns.map((name) => plain(name || "(not decoded)"));
  const few = names.length <= 14;
  return { label: `Confusion matrix of ${item.label}; the tables beside it hold its figures`, traces: [{ type: "heatmap", z, x: names, y: item.names.map(plain), customdata: item.matrix, zmin: 0, zmax: 100, xgap: 1, ygap: 1,
    colorscale: isDark() ? [[0, "#1f2631"], [0.5, "#3f6fc4"], [1, "#cfe0ff"]] : [[0, "#f3f5f9"], [0.5, "#7aa5ee"], [1, "#0f3d91"]], showscale: false,
    text: few ? item.matrix : undefined, texttemplate: few ? "%{text}" : undefined, hovertemplate: "true %{y}<br>predicted %{x}<br>%{customdata} samples, %{z:.0f} %<extra></extra>" }],
  layout: { hovermode: "closest", uirevision: item.label, margin: { l: 90, r: 8, t: 8, b: 90 }, xaxis: { tickangle: -50, title: { text: "predicted" }, showgrid: false, dtick: names.length <= 30 ? 1 : undefined }, yaxis: { autorange: "reversed", showgrid: false, title: { text: "true class" }, dtick: names.length <= 30 ? 1 : undefined } } };
}

function pictureSections({ pictures }) {
  return (pictures || []).filter(({ id }) => id !== "rejected-files").map((group) => section(group.id, group.title, group.about, group.missing && group.missing.length ? el("ul", { class: "missing" }, group.missing.map((text) => el("li", {}, text))) : null,
    el("div", { class: "players" }, group.items.map(playerCard))));
}

function zooSections({ zoos }) {
  return zoos.map((zoo, i) => {
    const panels = new Map();
    for (const row of zoo.rows) {
      const key = `${row.probe}: ${row.label}${row.train_fraction ? `, ${row.train_fraction} of train` : ""}`;
      panels.set(key, [...(panels.get(key) || []), row]);
    }
    const columns = [["run", "run"], ["seed", "seed"], ["step", "step"], ["clips", "clips"], ["flops", "FLOPs"], ["probe", "probe"], ["label", "label"], ["control", "control", controlName], ["train_fraction", "part of train"], ["metric", "metric"], ["accuracy", "value", (v, row) => percentText(v, row.metric)], ["low", "95 % interval", intervalText], ["chance", "chance", (v) => percentText(v)], ["rankme", "RankMe"], ["alpha", "alpha-ReQ"], ["n_test", "test samples"]];
    return section(i ? `zoo-${i + 1}` : "zoo", `Zoo: ${zoo.name}`, "Methods on the same data for the same clips or FLOPs; frozen probes of every snapshot.",
      zoo.missing.length ? el("ul", { class: "missing" }, zoo.missing.map((text) => el("li", {}, text))) : null,
      el("div", { class: "grid charts" }, [...panels].map(([title, rows]) => zooChart(title, rows))),
      el("div", { class: "grid wide-tables" }, zoo.tables.map((t, n) => el("article", { class: "card" }, el("h3", {}, t.title), table(`${t.title} (table ${n + 1} of ${zoo.name})`, t.head.map((name, k) => [k, name]), t.rows.map((cells) => ({ ...cells.map(numberIfPlain) })))))),
      zoo.rows.length ? filteredTable(`All results of ${zoo.name}`, columns, zoo.rows.map((row) => ({ ...row }))) : null);
  });
}

function numberIfPlain(text) {
  return /^[+-]?[\d,]*\.?\d+(e[+-]?\d+)?$/i.test(text) ? Number(text.replaceAll(",", "")) : text;
}

function zooChart(title, rows) {
  const names = [...new Set(rows.filter((row) => row.control === "none" && row.step > 0).map((row) => row.run))];
  const build = () => {
    const traces = names.map((name, i) => {
      const own = rows.filter((row) => row.run === name && row.control === "none" && row.step > 0 && row.accuracy !== null).sort((a, b) => a.step - b.step);
      const x = own.map((row) => row.flops || row.clips);
      return { x, y: own.map((row) => row.accuracy), name: plain(name), mode: "lines+markers", line: { color: colourOf(i), dash: DASHES[Math.floor(i / 10) % 4] }, marker: { symbol: i % 20, size: 8 },
        error_y: { type: "data", symmetric: false, array: own.map((row) => Math.max(0, row.high - row.accuracy)), arrayminus: own.map((row) => Math.max(0, row.accuracy - row.low)), thickness: 1, width: 3, color: colourOf(i) }, hovertemplate: "%{y:.1f}" };
    });
    const lines = rows.filter((row) => row.step === 0 && ["none", "pixels"].includes(row.control)).map((row) => [row.control === "none" ? "untrained" : "mean colours", row.accuracy]);
    if (rows[0].chance !== null) lines.push(["chance", rows[0].chance]);
    return { traces, label: `${title}: accuracy over training of ${names.join(", ")}`, layout: { showlegend: names.length > 1, legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, font: { size: 11 } }, uirevision: title,
      shapes: lines.map(([, y]) => ({ type: "line", xref: "paper", x0: 0, x1: 1, y0: y, y1: y, line: { color: css("--quiet"), width: 1, dash: "dot" } })),
      annotations: lines.map(([text, y]) => ({ xref: "paper", x: 1, y, text, showarrow: false, xanchor: "right", yanchor: "bottom", font: { size: 11, color: css("--quiet") } })),
      margin: { l: 50, r: 12, t: 60, b: 44 }, xaxis: { title: { text: rows.some((row) => row.flops) ? "model FLOPs of training" : "clips seen" }, exponentformat: "power", hoverformat: ".3~g" }, yaxis: { title: { text: rows[0].metric === "R2" ? "R2" : `${rows[0].metric}, %` } } } };
  };
  return el("article", { class: "card" }, el("h3", {}, title), el("p", { class: "note" }, "95 % intervals; dotted: untrained, mean colours, chance."), chartNode(build, true));
}

const HISTOGRAMS = [["duration", "Duration", "seconds", 1], ["fps", "Frame rate", "frames a second", 1], ["short_side", "Short side", "pixels", 1], ["bytes", "Size of a sample", "kilobytes", 1e-3]];
const MOST_BARS = 40;

// Bars of all data sets in one chart; of several, as percent of each.
function histogramCard(data, key, title, unit, factor) {
  const own = data.map((one, index) => ({ ...one, index, found: one.report[key] })).filter(({ found }) => found && found.counts && found.counts.length);
  if (!own.length) return null;
  const several = own.length > 1;
  const texts = own.map(({ name, found }) => `${several ? `${name}: ` : ""}median ${format(found.median * factor)}, ${format(found.min * factor)} to ${format(found.max * factor)}${found.outliers ? `, ${found.outliers} outliers in the bars at the ends` : ""}`);
  const build = () => ({
    label: `${title}, ${unit}; ${texts.join("; ")}`,
    traces: own.map(({ name, index, found }) => {
      const all = found.counts.reduce((a, b) => a + b, 0);
      return { type: "bar", name: plain(name), x: found.counts.map((_, i) => factor * (found.edges[i] + found.edges[i + 1]) / 2), width: found.counts.map((_, i) => factor * (found.edges[i + 1] - found.edges[i])),
        y: several ? found.counts.map((n) => 100 * n / all) : found.counts, customdata: found.counts, offsetgroup: String(index), opacity: several ? 0.6 : 1, marker: { color: colourOf(index), line: { width: 1, color: css("--card") } }, hovertemplate: `%{x:.3~g} ${unit}: %{customdata} samples<extra>${several ? plain(name) : ""}</extra>` };
    }),
    layout: { hovermode: "closest", uirevision: key, bargap: 0, barmode: "overlay", showlegend: several, legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, font: { size: 11 } }, margin: { l: 54, r: 12, t: several ? 34 : 12, b: 44 }, xaxis: { title: { text: unit } }, yaxis: { title: { text: several ? "% of the set" : "samples" }, rangemode: "tozero" } },
  });
  const varies = own.some(({ found }) => found.counts.length > 1);
  return el("article", { class: varies ? "card" : "card short" }, el("h3", {}, title), el("p", { class: "note" }, `${texts.join("; ")} ${unit}.`), varies ? chartNode(build) : null);
}

function codecCard(data) {
  const original = data.filter(({ report }) => Object.keys((report.original || {}).codec || {}).length);
  const own = [...data.map(({ name, report }, index) => ({ name, index, counts: report.codec || {} })), ...original.map(({ name, report }) => ({ name: `${name}, before encoding`, index: data.length + 1, counts: report.original.codec }))].filter(({ counts }) => Object.keys(counts).length);
  const names = [...new Set(own.flatMap(({ counts }) => Object.keys(counts)))].slice(0, MOST_BARS);
  if (names.length < 2) return null;
  return el("article", { class: "card" }, el("h3", {}, "Codecs"), el("p", { class: "note" }, "Samples of each; logarithmic."), chartNode(() => ({
    label: `Samples of each codec: ${own.map(({ name, counts }) => `${name} ${names.map((c) => `${c} ${counts[c] || 0}`).join(", ")}`).join("; ")}`,
    traces: own.map(({ name, index, counts }) => ({ type: "bar", name: plain(name), x: names.map(plain), y: names.map((codec) => counts[codec] || null), marker: { color: colourOf(index) }, text: names.map((codec) => counts[codec] || ""), hovertemplate: "%{x}: %{y} samples" })),
    layout: { hovermode: "closest", showlegend: own.length > 1, legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, font: { size: 11 } }, uirevision: "codec", margin: { l: 46, r: 8, t: own.length > 1 ? 34 : 8, b: 60 }, xaxis: { tickangle: names.length > 6 ? -45 : 0 }, yaxis: { type: "log", dtick: 1, title: { text: "samples" } } },
  })));
}

// Bars of the classes of a label set, the largest first, with a table of all.
function classCard(label, data) {
  const own = data.map(({ name, report }, index) => ({ name, index, sizes: (report.classes || {})[label] })).filter(({ sizes }) => sizes && Object.keys(sizes).length);
  const total = {};
  for (const { sizes } of own) for (const [name, n] of Object.entries(sizes)) total[name] = (total[name] || 0) + n;
  const names = Object.keys(total).sort((a, b) => total[b] - total[a]);
  if (!names.length) return null;
  const filled = names.filter((name) => total[name] > 0);
  const said = filled.length ? `${names.length} classes; largest ${filled[0]} (${total[filled[0]].toLocaleString("en")}), smallest ${filled.at(-1)} (${total[filled.at(-1)].toLocaleString("en")})${filled.length < names.length ? `; ${(names.length - filled.length).toLocaleString("en")} without a sample` : ""}` : `${names.length} classes, none with a sample`;
  const few = names.length <= MOST_BARS;
  const build = () => ({
    label: `Samples of each class of ${label}: ${said}`,
    traces: own.map(({ name, index, sizes }) => ({ type: "bar", name: plain(name), x: few ? names.map(plain) : names.map((_, i) => i + 1), y: names.map((c) => sizes[c] || 0), customdata: names.map(plain), marker: { color: colourOf(index) }, hovertemplate: "%{customdata}: %{y} samples" })),
    layout: { hovermode: "closest", barmode: "stack", bargap: few ? 0.2 : 0, showlegend: own.length > 1, legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, font: { size: 11 } }, uirevision: label, margin: { l: 46, r: 8, t: own.length > 1 ? 34 : 8, b: few ? 90 : 44 }, xaxis: few ? { tickangle: names.length > 3 ? -45 : 0, dtick: 1, tickfont: { size: 11 } } : { title: { text: "classes, the largest first" } }, yaxis: { title: { text: "samples" } } },
  });
  const details = el("details", {}, el("summary", {}, "All classes"));
  details.addEventListener("toggle", () => {
    if (!details.open || details.querySelector("table")) return;
    details.append(table(`Classes of ${label}`, [["name", "class"], ...own.map(({ name }, i) => [i, name]), ...(own.length > 1 ? [["all", "all"]] : [])],
      names.map((name) => ({ name, all: total[name], ...Object.fromEntries(own.map(({ sizes }, i) => [i, sizes[name] || 0])) })), { mark: (row) => own.some((_, i) => row[i] === 0) ? "differs" : null }));
  });
  return el("article", { class: "card", "data-labels": label }, el("h3", {}, `Classes of ${label}`), el("p", { class: "note" }, `${said}.`), chartNode(build), details);
}

function dataSection({ data, sets }) {
  if (!data.length) return null;
  const facts = sets ? [] : data.map(({ name, report }) => {
    const rejected = Object.entries(report.rejected || {}).map(([reason, n]) => `${reason} ${n}`).join(", ") || "none";
    const codecs = Object.entries(report.codec || {}).map(([codec, n]) => `${codec} ${n.toLocaleString("en")}`).join(", ");
    return el("article", { class: "card" }, el("h3", {}, name), definitions([["samples", `${(report.samples || 0).toLocaleString("en")} of ${(report.files || 0).toLocaleString("en")} files`], ["hours", ((report.seconds || 0) / 3600).toFixed(2)], ["codecs", codecs], ["rejected", rejected], ["size", `${((report.bytes_out || 0) / 1e6).toFixed(1)} MB`]]));
  });
  const labels = [...new Set(data.flatMap(({ report }) => Object.keys(report.classes || {})))];
  const bars = labels.map((label) => classCard(label, data)).filter((card) => card);
  const shapes = [...HISTOGRAMS.map((histogram) => histogramCard(data, ...histogram)), codecCard(data)].filter((card) => card);
  const about = "What the shards hold, from the files beside them.";
  if (!sets) return section("data", "Data", about, el("div", { class: "wide" }, facts, el("div", { class: "grid" }, shapes, bars)));
  return [bars.length ? section("labels", "Labels", "Samples of each class, from report.json.", el("div", { class: "grid" }, bars)) : null,
    shapes.length ? section("data", "Durations, sizes, codecs", "Measured when the data were packed, from report.json.", el("div", { class: "grid" }, shapes)) : null];
}

// ---------------------------------------------------------------- pages of data sets
function verdictList(verdicts) {
  return el("ul", { class: "verdicts" }, verdicts.map((verdict) => el("li", {}, el("div", { class: "line" }, el("strong", {}, verdict.question), el("span", { class: `badge ${verdict.kind}` }, verdict.answer)),
    verdict.why ? el("p", {}, verdict.why) : null, el("details", {}, el("summary", {}, "The rule"), el("p", {}, verdict.rule)))));
}

function missingList(texts, label) {
  return texts && texts.length ? el("ul", { class: "missing", "aria-label": label }, texts.map((text) => el("li", {}, text))) : null;
}

function setsSection({ sets, between }) {
  if (!sets) return null;
  const cards = sets.map((one) => el("article", { class: "card run-card" }, el("h3", {}, one.name), definitions([...one.facts, ["folder", one.path]]), verdictList(one.verdicts), missingList(one.missing, `What is missing in ${one.name}`)));
  const together = between && between.length ? el("article", { class: "card run-card" }, el("h3", {}, "The sets together"), verdictList(between)) : null;
  return section("summary", "Summary", "Each verdict follows a stated rule from the files beside the shards.", el("div", { class: "grid" }, together, cards));
}

function rejectedSection({ sets, rejected, pictures }) {
  if (!sets || !rejected.length) return null;
  const shown = pictures.find(({ id }) => id === "rejected-files");
  const cards = rejected.map((row) => el("article", { class: "card" }, el("div", { class: "head" }, el("h3", {}, sets.length > 1 ? `${row.set}: ${row.reason}` : row.reason), el("span", { class: "badge warn" }, row.n.toLocaleString("en"))),
    row.meaning ? el("p", { class: "note" }, row.meaning) : null,
    el("ul", { class: "plain" }, row.examples.map(([path, detail]) => el("li", {}, path, detail ? el("small", {}, detail) : null)))));
  return section("rejected", "Rejected", "Files and clips that are not in the shards, by reason, with the first of each, from rejected.jsonl.", el("div", { class: "grid" }, cards),
    shown ? [missingList(shown.missing, "What is missing of rejected files"), shown.items.length ? el("h3", { class: "apart" }, shown.title) : null, el("div", { class: "players" }, shown.items.map(playerCard))] : null);
}

function configSection({ runs }) {
  const configs = runs.map((run) => Object.fromEntries(run.config));
  const keys = [...new Set(runs.flatMap((run) => run.config.map(([key]) => key)))];
  if (!keys.length) return null;
  const differs = (key) => new Set(configs.map((config) => config[key])).size > 1;
  const own = { only: runs.length > 1 && keys.some(differs), wanted: "" };
  const rows = keys.map((key) => ({ key, ...Object.fromEntries(configs.map((config, i) => [i, config[key] ?? "–"])) }));
  const scroller = table("Configuration", [["key", "key"], ...runs.map((run, i) => [i, run.name])], rows, { wraps: true, keep: (row) => (!own.only || differs(row.key)) && (!own.wanted || Object.values(row).some((v) => String(v).toLowerCase().includes(own.wanted))), mark: (row) => runs.length > 1 && differs(row.key) ? "differs" : null });
  const tools = el("div", { class: "tools" }, runs.length > 1 ? el("button", { type: "button", "aria-pressed": String(own.only), onclick: (e) => { own.only = !own.only; e.target.setAttribute("aria-pressed", String(own.only)); scroller.refill(); } }, "Only differences") : null,
    el("input", { type: "search", placeholder: "Filter", "aria-label": "Filter the configuration", oninput: (e) => { own.wanted = e.target.value.toLowerCase(); scroller.refill(); } }));
  return section("config", "Configuration", null, el("article", { class: "card" }, el("div", { class: "head" }, el("h3", {}, "Resolved configuration"), tools), scroller));
}

function commandBlock(text) {
  const button = el("button", { type: "button", "aria-label": `Copy ${text}`, onclick: () => { navigator.clipboard && navigator.clipboard.writeText(text); button.textContent = "Copied"; } }, "Copy");
  return el("div", {}, el("pre", {}, text), button);
}

function versionSection({ runs, command, version, made }) {
  const cards = runs.map((run) => el("article", { class: "card" }, el("h3", {}, run.name), definitions([["folder", run.path], ...run.versions]), run.command ? [el("p", { class: "note" }, "The same run again:"), commandBlock(run.command)] : null));
  return section("versions", "Versions and commands", null, el("div", { class: "grid" }, cards, el("article", { class: "card" }, el("h3", {}, "This page"), definitions([["made", made], ["vidssl", version]]), commandBlock(command))));
}

// ---------------------------------------------------------------- the page
let chipsOf = []; // names of the runs that have a box

function runChips() {
  chipsOf = state.contents.runs.map(({ name }) => name);
  const chips = state.contents.runs.map((run, index) => el("label", {}, el("input", { type: "checkbox", checked: !state.hidden.has(run.name), "data-run": run.name, onchange: (e) => {
    if (e.target.checked) state.hidden.delete(run.name); else state.hidden.add(run.name);
    applyHidden();
  } }), el("span", { class: "swatch", style: { borderTopColor: colourOf(index), borderTopStyle: DASHES[Math.floor(index / 10) % 4] === "solid" ? "solid" : "dashed" } }), run.name));
  document.getElementById("runs").replaceChildren(...(chips.length > 1 ? chips : []));
}

function applyHidden() {
  for (const card of document.querySelectorAll(".run-card")) card.hidden = state.hidden.has(card.dataset.run);
  for (const [node, refill] of onRuns) {
    if (node.isConnected) refill(); else onRuns.delete(node);
  }
  redrawCharts();
}

// Sections by what they are made of: one is made anew when that has changed.
const PARTS = [
  [summarySection, ({ runs }) => runs.map(({ name, verdicts, facts, missing }) => [name, verdicts, facts, missing])],
  [setsSection, ({ sets, between }) => [sets, between]],
  [curveSections, ({ panels }) => panels],
  [pictureSections, ({ pictures }) => pictures],
  [zooSections, ({ zoos }) => zoos],
  [probeSection, ({ runs }) => runs.map(({ name, probes }) => [name, probes])],
  [confusionSection, ({ runs }) => runs.map(({ name, confusions }) => [name, confusions])],
  [denseSection, ({ runs }) => runs.map(({ name, dense }) => [name, dense])],
  [rejectedSection, ({ rejected, sets }) => [rejected, sets]],
  [dataSection, ({ data }) => data],
  [configSection, ({ runs }) => runs.map(({ name, config }) => [name, config])],
  [versionSection, ({ runs, command }) => [command, runs.map(({ name, path, versions, command }) => [name, path, versions, command])]],
];
const made = PARTS.map(() => ({ key: null, nodes: [] }));

function render() {
  const { contents } = state;
  const open = [...document.querySelectorAll("main details[open]")].map(pathOf);
  const active = document.activeElement;
  const focused = active && active.closest("main section") ? pathOf(active) : null;
  document.getElementById("title").textContent = contents.title;
  document.getElementById("made").textContent = `made ${contents.made}`;
  document.getElementById("about").textContent = `vidssl ${contents.version}`;
  if (String(contents.runs.map(({ name }) => name)) !== String(chipsOf)) runChips();
  PARTS.forEach(([build, keyOf], i) => {
    const key = JSON.stringify(keyOf(contents)) || "";
    if (key === made[i].key) return;
    made[i] = { key, nodes: [build(contents)].flat().filter((node) => node) };
  });
  const sections = made.flatMap(({ nodes }) => nodes);
  const main = document.getElementById("main");
  for (const node of [...main.children]) if (!sections.includes(node)) node.remove();
  sections.forEach((node, i) => { if (main.children[i] !== node) main.insertBefore(node, main.children[i] || null); });
  for (const player of players) if (!player.button.isConnected) players.delete(player);
  const nav = document.getElementById("nav");
  const links = [...nav.children];
  if (String(links.map(({ hash }) => hash)) !== String(sections.map(({ id }) => `#${id}`))) {
    nav.replaceChildren(...sections.map((node) => links.find(({ hash }) => hash === `#${node.id}`) || el("a", { href: `#${node.id}` }, node.querySelector("h2").textContent)));
  }
  for (const path of open) { const node = document.querySelector(path); if (node) node.open = true; }
  if (document.activeElement === document.body && active) {
    const node = active.isConnected ? active : focused && document.querySelector(focused);
    if (node) node.focus({ preventScroll: true });
  }
  applyHidden();
  followSections(sections);
}

// Changes the page and leaves what stands at the top of the view where it is. The browser does so by itself only
// for nodes that stay, and not every browser does.
function keepPlace(change) {
  const root = document.documentElement;
  const top = Math.max(0, document.getElementById("top").getBoundingClientRect().bottom);
  const node = window.scrollY ? [...document.querySelectorAll("main h2, main article")].find((one) => one.getBoundingClientRect().bottom > top) : null;
  if (!node) { change(); return; }
  const before = node.getBoundingClientRect().top;
  const path = pathOf(node);
  root.style.overflowAnchor = "none";
  change();
  const now = node.isConnected ? node : document.querySelector(path);
  if (now) window.scrollBy({ top: now.getBoundingClientRect().top - before, behavior: "instant" });
  root.style.overflowAnchor = "";
}

function pathOf(node) {
  const steps = [];
  for (let at = node; at.id !== "main"; at = at.parentElement) {
    if (at.id) { steps.unshift(`#${at.id}`); break; }
    steps.unshift(`${at.tagName.toLowerCase()}:nth-of-type(${[...at.parentElement.children].filter((n) => n.tagName === at.tagName).indexOf(at) + 1})`);
  }
  return steps.join(" > ");
}

let follower = null;

function followSections(sections) {
  if (follower) follower.disconnect();
  follower = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      for (const link of document.querySelectorAll("#nav a")) {
        if (link.hash === `#${entry.target.id}`) link.setAttribute("aria-current", "true"); else link.removeAttribute("aria-current");
      }
    }
  }, { rootMargin: "-20% 0px -75% 0px" });
  sections.forEach((node) => follower.observe(node));
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  document.getElementById("theme").textContent = theme === "dark" ? "Light" : "Dark";
  document.getElementById("theme").setAttribute("aria-label", theme === "dark" ? "Light colours" : "Dark colours");
  runChips();
  redrawCharts();
}

const darkWanted = matchMedia("(prefers-color-scheme: dark)");
darkWanted.addEventListener("change", (e) => setTheme(e.matches ? "dark" : "light"));
document.getElementById("theme").addEventListener("click", () => setTheme(isDark() ? "light" : "dark"));
document.documentElement.dataset.theme = darkWanted.matches ? "dark" : "light";
render();
setTheme(document.documentElement.dataset.theme);

// ---------------------------------------------------------------- while a run writes
const askEvery = 1000 * state.contents.ask_every_s;
if (askEvery) {
  const live = document.getElementById("live");
  live.hidden = false;
  // It is read aloud, so only what is new is put there
  const say = (text) => { if (live.textContent !== text) live.textContent = text; };
  const following = "Watching: the page follows the run's files.";
  say(following);
  const ask = async () => {
    try {
      const answer = await fetch(`contents.json?since=${state.contents.number}`);
      if (answer.status === 200) {
        state.contents = await answer.json();
        keepPlace(render);
      }
      say(answer.ok ? following : "Watching: the files cannot be read just now.");
    } catch (error) {
      say("The program that serves this page has ended.");
    }
    setTimeout(ask, askEvery);
  };
  setTimeout(ask, askEvery);
}
