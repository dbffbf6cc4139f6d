// Charts of curves over steps, several curves in one chart. A curve is {label, x, y}.
import uPlot from "../vendor/uPlot.esm.js";
import { formatNumber } from "./numbers.js";

const HEIGHT = 240;
const COLOURS = 8;
const synced = uPlot.sync("steps");

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

// Few letters, because an axis is narrow.
function shortTick(value) {
  if (value === null) return "";
  if (value && Math.abs(value) < 1e-3) return Number(value.toPrecision(2)).toExponential();
  return formatNumber(value);
}

// A curve that hardly changes is a flat line, and no picture of its last digits.
function padded(plot, low, high) {
  if (low === null) return [0, 1];
  const least = Math.max(Math.abs(low), Math.abs(high)) * 0.02 || 1;
  const middle = (low + high) / 2;
  const half = Math.max((high - low) * 0.55, least / 2);
  const bottom = middle - half;
  return [low >= 0 && bottom < 0 ? 0 : bottom, middle + half];
}

export class Chart {
  // `choice` is what `chartControls` gives; `onSpan(from, to)` is told what the mouse has marked.
  constructor(figure, onSpan) {
    this.place = figure.querySelector(".chart");
    this.curves = [];
    this.choice = { log: false, from: null, to: null };
    this.onSpan = onSpan;
    this.plot = null;
    this.shape = "";
    this.hidden = new Set(); // Labels of curves.
    this.buttons = new Map(); // Label of a curve -> its button in the legend.
    // Beside the chart, which is a picture to those who do not see it.
    this.legend = document.createElement("div");
    this.place.after(this.legend);
    new ResizeObserver(() => this.resize()).observe(this.place);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
      this.shape = "";
      this.draw();
    });
  }

  show(curves, choice) {
    this.curves = curves.filter((curve) => curve.x.length);
    this.choice = choice;
    this.draw();
  }

  draw() {
    const empty = this.curves.length === 0;
    this.place.classList.toggle("empty", empty);
    if (empty) {
      this.drop();
      this.place.textContent = "Nothing is measured yet.";
      return;
    }
    const data = this.data();
    const few = this.curves.every((curve) => curve.x.length < 60);
    const shape = JSON.stringify([this.choice.log, few, this.curves.map((curve) => curve.label)]);
    if (this.plot && shape === this.shape) {
      this.plot.setData(data);
      return;
    }
    const focused = document.activeElement;
    this.drop();
    this.place.textContent = "";
    this.shape = shape;
    this.plot = new uPlot(this.options(few), data, this.place);
    if (this.legend.contains(focused)) focused.focus();
  }

  data() {
    // A logarithm has no value at zero and below: a gap.
    const shown = (y) => (this.choice.log ? y.map((v) => (v > 0 ? v : null)) : y);
    const tables = this.curves.map((curve) => [curve.x, shown(curve.y)]);
    return tables.length === 1 ? tables[0] : uPlot.join(tables);
  }

  options(few) {
    const axis = {
      stroke: colour("--quiet"),
      grid: { stroke: colour("--line"), width: 1 },
      ticks: { stroke: colour("--line"), width: 1 },
      font: "12px system-ui, sans-serif",
    };
    const series = this.curves.map((curve, index) => ({
      label: this.button(curve.label),
      show: !this.hidden.has(curve.label),
      stroke: colour(`--c${index % COLOURS}`),
      width: 1.5,
      dash: index >= COLOURS ? [6, 4] : undefined,
      spanGaps: this.curves.length > 1,
      points: { show: few, size: 5 },
      value: (plot, value) => formatNumber(value),
    }));
    return {
      width: this.place.clientWidth,
      height: HEIGHT,
      scales: {
        x: { time: false, range: (plot, low, high) => this.span(low, high) },
        y: this.choice.log ? { distr: 3 } : { range: padded },
      },
      axes: [
        { ...axis, values: (plot, ticks) => ticks.map((v) => (Number.isInteger(v) ? formatNumber(v) : "")) },
        { ...axis, size: 58, values: (plot, ticks) => ticks.map(shortTick) },
      ],
      series: [{ label: "step", value: (plot, value) => formatNumber(value) }, ...series],
      cursor: {
        sync: { key: synced.key, scales: ["x", null], filters: { pub: (kind) => kind === "mousemove" } },
        points: { size: 6 },
        drag: { setScale: false },
        bind: { dblclick: () => () => this.onSpan(null, null) },
      },
      legend: { live: true, mount: (plot, table) => this.legend.replaceChildren(table) },
      hooks: { setSelect: [(plot) => this.mark(plot)], setSeries: [(plot, index) => this.toggle(plot, index)] },
    };
  }

  // The steps that are shown: those chosen, or all.
  span(low, high) {
    const { from, to } = this.choice;
    const [begin, end] = [from ?? low, to ?? high];
    return begin < end ? [begin, end] : [begin - 1, begin + 1];
  }

  mark(plot) {
    const { left, width } = plot.select;
    const [from, to] = [left, left + width].map((x) => Math.round(plot.posToVal(x, "x")));
    plot.setSelect({ left: 0, width: 0 }, false);
    if (from < to) this.onSpan(Math.max(from, 0), to);
  }

  // What a click on the name of a curve does in uPlot, a button lets keys do, too.
  button(label) {
    if (!this.buttons.has(label)) {
      const made = document.createElement("button");
      Object.assign(made, { type: "button", className: "plain", textContent: label });
      made.setAttribute("aria-pressed", String(!this.hidden.has(label)));
      this.buttons.set(label, made);
    }
    return this.buttons.get(label);
  }

  toggle(plot, index) {
    const curve = this.curves[index - 1];
    if (!curve) return;
    const { show } = plot.series[index];
    if (show) this.hidden.delete(curve.label);
    else this.hidden.add(curve.label);
    this.button(curve.label).setAttribute("aria-pressed", String(show));
  }

  resize() {
    const width = this.place.clientWidth;
    if (this.plot && width && width !== this.plot.width) this.plot.setSize({ width, height: HEIGHT });
  }

  drop() {
    this.plot?.destroy();
    this.plot = null;
    this.shape = "";
  }
}

// Smoothing and the axis, remembered by this browser, and the steps that are shown.
// `choice.span(from, to)` chooses them as the fields do; null shows all.
export function chartControls(place, onChange) {
  const choice = { smooth: Number(localStorage.smooth || 0), log: localStorage.log === "1", from: null, to: null };
  const smooth = document.createElement("select");
  for (const [steps, name] of [[0, "no smoothing"], [5, "mean of 5 steps"], [25, "mean of 25"], [100, "mean of 100"], [500, "mean of 500"], [2500, "mean of 2,500"]]) {
    const option = new Option(name, steps, false, steps === choice.smooth);
    smooth.append(option);
  }
  smooth.setAttribute("aria-label", "Smoothing");
  const label = document.createElement("label");
  const log = document.createElement("input");
  log.type = "checkbox";
  log.checked = choice.log;
  label.append(log, " logarithmic");
  const [from, to] = [stepField("from step"), stepField("to step")];
  const all = document.createElement("button");
  Object.assign(all, { type: "button", textContent: "All steps", hidden: true });
  place.append(smooth, label, from.parentElement, to.parentElement, all);
  const changed = () => {
    choice.smooth = Number(smooth.value);
    choice.log = log.checked;
    localStorage.smooth = choice.smooth;
    localStorage.log = choice.log ? "1" : "0";
    const [begin, end] = [from, to].map((field) => (field.value === "" ? null : Number(field.value)));
    const isEmpty = begin !== null && end !== null && begin >= end;
    to.setCustomValidity(isEmpty ? "The last step must be above the first." : "");
    if (isEmpty) return to.reportValidity();
    Object.assign(choice, { from: begin, to: end });
    all.hidden = begin === null && end === null;
    return onChange(choice);
  };
  choice.span = (begin, end) => {
    from.value = begin ?? "";
    to.value = end ?? "";
    changed();
  };
  for (const field of [smooth, log, from, to]) field.addEventListener("change", changed);
  all.addEventListener("click", () => { from.focus(); choice.span(null, null); });
  return choice;
}

function stepField(name) {
  const label = document.createElement("label");
  const field = document.createElement("input");
  Object.assign(field, { type: "number", min: 0, className: "step" });
  label.append(`${name} `, field);
  return field;
}

// The curves of a run as a choice has them: a long one has fewer points, so a part of it is
// read for itself. `asked` tells whether another choice needs other points.
export async function fetchCurves(run, choice) {
  const answer = await fetch(`/api/curves?${new URLSearchParams({ run, ...asked(choice) })}`, { headers: { accept: "application/json" } });
  if (!answer.ok) throw new Error((await answer.json()).error);
  return answer.json();
}

export function asked({ smooth, from, to }) {
  return { smooth, from: from ?? "", to: to ?? "" };
}

// The held-out curves of a run, the total first.
export function heldOut(found, prefix = "") {
  const groups = Object.keys(found.held_out).sort((a, b) => (a === "" ? -1 : b === "" ? 1 : a.localeCompare(b)));
  return groups.map((group) => {
    const [x, y] = found.held_out[group];
    return { label: prefix + (group === "" ? "all" : group), x, y };
  });
}

const TABLE_ROWS = 40;

// The numbers of a chart: at some of its steps, the newest value of each curve there.
export function fillTable(place, curves) {
  const steps = [...new Set(curves.flatMap((curve) => curve.x))].sort((a, b) => a - b);
  const last = steps.length - 1;
  const count = Math.min(steps.length, TABLE_ROWS);
  const table = document.createElement("table");
  addRow(table.createTHead(), "th", ["step", ...curves.map((curve) => curve.label)]);
  const body = table.createTBody();
  for (let row = 0; row < count; row++) {
    const step = steps[Math.round((row * last) / Math.max(count - 1, 1))];
    addRow(body, "td", [formatNumber(step), ...curves.map((curve) => valueAt(curve, step))]);
  }
  place.replaceChildren(table);
}

function addRow(part, kind, texts) {
  const row = part.insertRow();
  for (const text of texts) {
    const cell = document.createElement(kind);
    cell.textContent = text;
    row.append(cell);
  }
}

function valueAt({ x, y }, step) {
  const at = x.findLastIndex((value) => value <= step);
  return at < 0 || step > x[x.length - 1] ? "-" : formatNumber(y[at]);
}
