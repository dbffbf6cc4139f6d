// Figures of a server over the last seconds: the difference of two looks.
import { formatNumber } from "../parts/numbers.js";

const EVERY = 2000; // milliseconds
const WINDOW = 15; // looks that a rate is taken over
const place = document.querySelector("#served");
const seen = [];

function show(field, text) {
  const found = place.querySelector(`[data-figure="${field}"]`);
  if (found && found.textContent !== text) found.textContent = text;
}

function ratio(before, now, above, below) {
  const count = now[below] - before[below];
  return count > 0 ? (now[above] - before[above]) / count : null;
}

async function look() {
  if (document.hidden) return;
  const answer = await fetch(`/api/served/${encodeURIComponent(place.dataset.server)}`);
  if (!answer.ok) return;
  const { state, figures } = await answer.json();
  if (state !== place.querySelector('[data-figure="state"]').textContent) {
    // Other buttons are right now, and the server draws them; but what is typed stays.
    const fields = [...document.querySelectorAll("input, textarea")];
    if (fields.every((field) => field.value === field.defaultValue)) location.reload();
    return;
  }
  if (!figures) return;
  const now = { ...figures, at: performance.now() / 1000 };
  seen.push(now);
  if (seen.length > WINDOW) seen.shift();
  const before = seen[0];
  show("slots", `${now.busy} of ${now.slots}`);
  show("waiting", formatNumber(now.waiting));
  show("answers", formatNumber(now.answers));
  show("refused", formatNumber(now.refused));
  if (seen.length < 2) return;
  const span = Math.max(now.at - before.at, 0.001);
  show("rate", formatNumber((now.answers - before.answers) / span));
  show("token_rate", formatNumber((now.tokens - before.tokens) / span));
  const first = ratio(before, now, "first_seconds", "firsts");
  const whole = ratio(before, now, "seconds", "answers");
  if (first !== null) show("first", formatNumber(first));
  if (whole !== null) show("whole", formatNumber(whole));
  place.querySelector("[data-window]").textContent = `Rates, and times where answers have ended, are of the last ${Math.round(span)} s.`;
}

const state = place.querySelector('[data-figure="state"]').textContent;
if (place.querySelector("[data-window]") || state === "loading") {
  look();
  setInterval(look, EVERY);
}
