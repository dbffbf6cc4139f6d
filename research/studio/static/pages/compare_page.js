// Curves of several runs over each other.
import { Chart, chartControls, fetchCurves, fillTable, heldOut } from "../parts/charts.js";

const names = [...document.querySelectorAll("#compared tr[data-run]")].map((row) => row.dataset.run);
const charts = new Map([...document.querySelectorAll("[data-chart]")].map((figure) => [figure.dataset.chart, new Chart(figure, (from, to) => choice.span(from, to))]));
const problem = document.querySelector("[data-problem]");
let found = [];
let reads = 0;
const choice = chartControls(document.querySelector("[data-chart-controls]"), read);

// A run that was moved meanwhile is named, and the others are shown.
async function read() {
  const number = ++reads;
  const answers = await Promise.allSettled(names.map((name) => fetchCurves(name, choice)));
  if (number !== reads) return; // The choice has changed since.
  found = answers.flatMap(({ value }, index) => (value ? [{ name: names[index], ...value }] : []));
  problem.textContent = answers.flatMap(({ reason }) => (reason ? [reason.message] : [])).join("; ");
  problem.hidden = !problem.textContent;
  draw();
}

function draw() {
  show("loss", found.map(({ name, train }) => ({ label: name, x: train.loss[0], y: train.loss[1] })));
  show("held_out", found.flatMap((one) => heldOut(one).slice(0, 1).map((curve) => ({ ...curve, label: one.name }))));
}

function show(kind, curves) {
  charts.get(kind).show(curves, choice);
  fillTable(document.querySelector(`[data-chart="${kind}"] [data-table]`), curves);
}

read();
