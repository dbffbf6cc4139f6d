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
  constructor(figure) {
    this.place = figure.querySelector(".chart");
    this.curves = [];
    this.log = false;
    this.plot = null;
    this.shape = "";
    new ResizeObserver(() => this.resize()).observe(this.place);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
      this.shape = "";
      this.draw();
    });
  }

  show(curves, log) {
    this.curves = curves.filter((curve) => curve.x.length);
    this.log = log;
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
    const shape = JSON.stringify([this.log, few, this.curves.map((curve) => curve.label)]);
    if (this.plot && shape === this.shape) {
      this.plot.setData(data);
      return;
    }
    this.drop();
    this.place.textContent = "";
    this.shape = shape;
    this.plot = new uPlot(this.options(few), data, this.place);
  }

  data() {
    // A logarithm has no value at zero and below: a gap.
    const shown = (y) => (this.log ? y.map((v) => (v > 0 ? v : null)) : y);
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
      label: curve.label,
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
      scales: { x: { time: false }, y: this.log ? { distr: 3 } : { range: padded } },
      axes: [
        { ...axis, values: (plot, ticks) => ticks.map((v) => (Number.isInteger(v) ? formatNumber(v) : "")) },
        { ...axis, size: 58, values: (plot, ticks) => ticks.map(shortTick) },
      ],
      series: [{ label: "step", value: (plot, value) => formatNumber(value) }, ...series],
      cursor: { sync: { key: synced.key, scales: ["x", null] }, points: { size: 6 } },
      legend: { live: true },
    };
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

// Smoothing and the axis, remembered by this browser.
export function chartControls(place, onChange) {
  const choice = { smooth: Number(localStorage.smooth || 0), log: localStorage.log === "1" };
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
  place.append(smooth, label);
  const changed = () => {
    choice.smooth = Number(smooth.value);
    choice.log = log.checked;
    localStorage.smooth = choice.smooth;
    localStorage.log = choice.log ? "1" : "0";
    onChange(choice);
  };
  smooth.addEventListener("change", changed);
  log.addEventListener("change", changed);
  return choice;
}

export async function fetchCurves(run, smooth) {
  const fields = new URLSearchParams({ run, smooth });
  const answer = await fetch(`/api/curves?${fields}`, { headers: { accept: "application/json" } });
  if (!answer.ok) throw new Error((await answer.json()).error);
  return answer.json();
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
