// The output of jobs that run, as it comes; the page is read again when one begins or ends, or
// when its results have a page, unless somebody has begun to fill a form.

const EVERY = 2000; // milliseconds

let isTouched = false;
document.addEventListener("input", () => { isTouched = true; });

for (const place of document.querySelectorAll("[data-job]")) follow(place);

async function follow(place) {
  const log = place.querySelector("pre");
  const bar = place.querySelector("progress");
  if (log) log.scrollTop = log.scrollHeight;
  for (;;) {
    await new Promise((resolve) => setTimeout(resolve, EVERY));
    let job;
    try {
      const answer = await fetch(`/api/job/${place.dataset.job}`);
      if (answer.status === 404) return; // It is not listed any more.
      job = await answer.json();
    } catch {
      continue; // The server is away; the job is not.
    }
    if (log) show(job, log, bar);
    if (job.state === place.dataset.state && job.page === (place.dataset.page ?? job.page)) continue;
    if (!isTouched) return location.reload();
    const said = document.createElement("p");
    said.setAttribute("role", "status");
    said.textContent = `This job is ${job.state}. Load the page again to see more.`;
    return place.append(said);
  }
}

function show(job, log, bar) {
  const isAtEnd = log.scrollTop + log.clientHeight >= log.scrollHeight - 8;
  if (job.log && job.log !== log.textContent) log.textContent = job.log;
  if (isAtEnd) log.scrollTop = log.scrollHeight;
  bar.hidden = !job.progress;
  if (job.progress) [bar.value, bar.max] = job.progress;
}
