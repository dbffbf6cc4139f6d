// The page of a run: curves and figures that follow the run. All text is set as text.
import { asked, Chart, chartControls, fetchCurves, heldOut } from "../parts/charts.js";
import { formatDuration, formatNumber } from "../parts/numbers.js";

const MOST_APPENDED = 1000; // New points after which the server thins the curves again.
const RETRY_AFTER = 10_000; // milliseconds
const place = document.querySelector("#run");
const run = place.dataset.run;
const connection = place.querySelector("[data-connection]");
const charts = new Map([...place.querySelectorAll("[data-chart]")].map((figure) => [figure.dataset.chart, new Chart(figure, (from, to) => choice.span(from, to))]));
const overlays = new Map(); // Name of another run -> its curves.
let curves = null;
let appended = 0;
let reading = null;
let again = 0; // The timer of another try.
let events = null; // The one stream of this page.
let retry = 0;
let gone = false;

const controls = place.querySelector("[data-chart-controls]");
const choice = chartControls(controls, () => (isRead() ? draw() : read()));
let shown = null; // What the points on this page are, once there are any.

function isRead() {
  return JSON.stringify(asked(choice)) === JSON.stringify(shown);
}

function draw() {
  if (!curves) return;
  for (const [kind, chart] of charts) {
    const own = kind === "held_out" ? heldOut(curves) : [line(kind, curves, overlays.size ? run : kind.replaceAll("_", " "))];
    const others = [...overlays].flatMap(([name, found]) =>
      kind === "held_out" ? heldOut(found, `${name} `).slice(0, 1) : [line(kind, found, name)]);
    chart.show([...own, ...others], { ...choice, log: choice.log && kind !== "memory_gb" });
  }
}

function line(kind, found, label) {
  const [x, y] = found.train[kind];
  return { label, x, y };
}

async function read() {
  if (reading) return reading;
  clearTimeout(again);
  let wait = 0;
  reading = (async () => {
    try {
      const wanted = { ...choice };
      const found = await fetchCurves(run, wanted);
      await readOverlays(wanted);
      shown = asked(wanted);
      const follows = found.cursor === curves?.cursor;
      curves = found;
      appended = 0;
      draw();
      // The stream stands elsewhere: it would send lines twice, or skip some.
      if (events && !follows) listen();
    } catch (error) {
      connection.textContent = error.message;
      wait = RETRY_AFTER;
    } finally {
      reading = null;
      if (!isRead() && !gone) again = setTimeout(read, wait);
    }
  })();
  return reading;
}

// A run that was moved meanwhile is named, and no longer laid over the others.
async function readOverlays(wanted) {
  const names = [...overlays.keys()];
  const answers = await Promise.allSettled(names.map((name) => fetchCurves(name, wanted)));
  answers.forEach(({ value, reason }, index) => {
    if (value) {
      overlays.set(names[index], value);
    } else {
      overlays.delete(names[index]);
      connection.textContent = `${names[index]} is no longer shown: ${reason.message}`;
    }
  });
}

function addRows(rows) {
  appended += rows.train.step.length;
  for (const [kind, [x, y]] of Object.entries(curves.train)) {
    x.push(...rows.train.step);
    y.push(...rows.train[kind]);
  }
  for (const { step, losses } of rows.evals) {
    for (const [group, value] of Object.entries(losses)) {
      const [x, y] = (curves.held_out[group] ??= [[], []]);
      x.push(step);
      y.push(value);
    }
    if ("" in losses) set("held_out", formatNumber(losses[""]));
  }
  // Means over neighbours, and long curves, are the server's work.
  if (shown.smooth || appended > MOST_APPENDED) read();
  else draw();
}

function set(field, text) {
  const found = place.querySelector(`[data-figure="${field}"]`);
  if (found && found.textContent !== text) found.textContent = text;
}

let known = place.querySelector(".state").textContent;
let isTouched = false;
place.querySelector("form[action='/act/notes']")?.addEventListener("input", () => { isTouched = true; });

function showState(state) {
  if (state.state !== known && known !== "queued") {
    // Other buttons are right now, and the server draws them; but typed notes must stay.
    if (isTouched) connection.textContent = `${state.state} now: load this page again for its buttons`;
    else location.reload();
    return;
  }
  // Not by a new page: that could swallow a click.
  for (const part of place.querySelectorAll("[data-job]")) part.hidden = part.dataset.job !== state.job;
  for (const field of ["step", "steps", "loss", "tokens_per_s", "memory_gb"]) {
    if (state[field] !== undefined && !(field === "steps" && !state.steps)) set(field, formatNumber(state[field]));
  }
  if (state.eta_s !== undefined) set("eta_s", formatDuration(state.eta_s));
  const bar = place.querySelector("progress");
  if (state.steps) bar.max = state.steps;
  if (state.step) bar.value = state.step;
  const share = state.steps && state.step ? `${Math.floor((100 * state.step) / state.steps)}% ` : "";
  document.title = `${state.state === "running" ? share : ""}${run} · studio`;
  if (state.state === "running") showLog();
}

let logShown = 0;

async function showLog() {
  const log = place.querySelector("[data-log]");
  if (Date.now() - logShown < 3000) return;
  logShown = Date.now();
  const answer = await fetch(`/api/log?${new URLSearchParams({ run })}`);
  if (!answer.ok) return;
  const { log: text, samples } = await answer.json();
  showSamples(samples);
  if (!log || text === log.textContent) return;
  const atEnd = log.scrollTop + log.clientHeight >= log.scrollHeight - 30;
  log.textContent = text;
  if (atEnd) log.scrollTop = log.scrollHeight;
}

// Samples as they come, the newest first.
function showSamples(samples) {
  const section = place.querySelector("[data-samples]");
  const known = section.querySelector(".panel p")?.textContent;
  if (!samples.length || known === `step ${samples[0].step}`) return;
  const panels = samples.map(({ step, prompt, text }) => {
    const panel = document.createElement("div");
    panel.className = "panel";
    for (const [kind, words] of [["p", `step ${step}`], ["pre", prompt], ["pre", text]]) {
      const part = document.createElement(kind);
      if (kind === "p") part.className = "small quiet";
      part.textContent = words;
      panel.append(part);
    }
    return panel;
  });
  section.querySelector(".columns").replaceChildren(...panels);
  section.hidden = false;
}

// Follows the run from behind the lines that the page has.
function listen() {
  clearTimeout(retry);
  events?.close();
  events = null;
  // A browser opens six connections to a server, and hidden tabs would hold them all.
  if (document.hidden || gone) return;
  const fields = new URLSearchParams({ run, after: curves?.cursor ?? "" });
  const stream = new EventSource(`/api/events?${fields}`);
  events = stream;
  stream.addEventListener("open", () => { connection.textContent = "live"; });
  stream.addEventListener("error", () => {
    connection.textContent = "no connection; trying again";
    // A browser gives up behind an answer with an error, as of a studio with too many tabs.
    if (stream.readyState === EventSource.CLOSED) retry = setTimeout(listen, RETRY_AFTER);
  });
  stream.addEventListener("rows", (event) => {
    if (!curves) {
      read();
      return;
    }
    curves.cursor = event.lastEventId;
    addRows(JSON.parse(event.data));
  });
  stream.addEventListener("state", (event) => showState(JSON.parse(event.data)));
  stream.addEventListener("reset", () => read());
  stream.addEventListener("gone", () => {
    gone = true;
    listen();
    connection.textContent = "this run was moved or removed";
  });
}

async function offerOverlays() {
  const answer = await fetch("/api/runs");
  if (!answer.ok) return;
  const others = (await answer.json()).map((one) => one.name).filter((name) => name !== run);
  if (!others.length) return;
  const select = document.createElement("select");
  select.setAttribute("aria-label", "Lay another run over the curves");
  select.append(new Option("lay a run over it", ""), ...others.map((name) => new Option(name, name)));
  const clear = document.createElement("button");
  clear.type = "button";
  clear.textContent = "Remove overlays";
  clear.hidden = true;
  select.addEventListener("change", async () => {
    const name = select.value;
    select.value = "";
    if (!name) return;
    try {
      overlays.set(name, await fetchCurves(name, choice));
    } catch (error) {
      connection.textContent = error.message;
      return;
    }
    clear.hidden = false;
    draw();
  });
  clear.addEventListener("click", () => { overlays.clear(); clear.hidden = true; draw(); });
  controls.append(select, clear);
}

const log = place.querySelector("[data-log]");
if (log) log.scrollTop = log.scrollHeight;
await read();
listen();
document.addEventListener("visibilitychange", listen);
offerOverlays();
