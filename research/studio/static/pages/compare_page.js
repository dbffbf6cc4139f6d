// Curves of several runs over each other.
import { Chart, chartControls, fetchCurves, heldOut } from "../parts/charts.js";

const names = [...document.querySelectorAll("#compared tr[data-run]")].map((row) => row.dataset.run);
const charts = new Map([...document.querySelectorAll("[data-chart]")].map((figure) => [figure.dataset.chart, new Chart(figure)]));
let found = [];
const choice = chartControls(document.querySelector("[data-chart-controls]"), read);

async function read() {
  found = await Promise.all(names.map((name) => fetchCurves(name, choice.smooth)));
  draw();
}

function draw() {
  const loss = found.map((one, index) => ({ label: names[index], x: one.train.loss[0], y: one.train.loss[1] }));
  charts.get("loss").show(loss, choice.log);
  const held = found.flatMap((one, index) => heldOut(one).slice(0, 1).map((curve) => ({ ...curve, label: names[index] })));
  charts.get("held_out").show(held, choice.log);
}

read();
