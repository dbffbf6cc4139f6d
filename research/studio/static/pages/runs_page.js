// The list of runs: figures of running ones are kept up to date while the page is seen.
import { formatNumber } from "../parts/numbers.js";

const EVERY = 5000; // milliseconds
const table = document.querySelector("#runs");

async function update() {
  if (document.hidden || !table) return;
  const answer = await fetch("/api/runs");
  if (!answer.ok) return;
  const runs = new Map((await answer.json()).map((run) => [run.name, run]));
  for (const row of table.querySelectorAll("tr[data-run]")) {
    const run = runs.get(row.dataset.run);
    if (run) show(row, run);
  }
}

function show(row, run) {
  const state = row.querySelector(".state");
  if (state.textContent !== run.state) {
    state.className = `state ${run.state}`;
    state.textContent = run.state;
  }
  for (const field of ["loss", "held_out"]) {
    row.querySelector(`[data-field=${field}]`).textContent = formatNumber(run[field]);
  }
  const step = formatNumber(run.step) + (run.steps ? ` / ${formatNumber(run.steps)}` : "");
  row.querySelector("[data-field=step]").textContent = step;
}

setInterval(update, EVERY);
