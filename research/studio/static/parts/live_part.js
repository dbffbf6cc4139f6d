// Parts of a page that another page renders: each is fetched, fetched again while what
// it shows runs, and replaced by the answer of its own forms. The rest of the page, with
// what people have typed there, stays.

const EVERY = 1500; // milliseconds

for (const part of document.querySelectorAll("[data-part]")) follow(part);

async function follow(part) {
  if (part.dataset.state === "absent") part = await replace(part, fetch(part.dataset.part));
  while (part?.isConnected && part.dataset.state === "running") {
    await new Promise((resolve) => setTimeout(resolve, Number(part.dataset.every ?? EVERY)));
    if (part.isConnected) part = await replace(part, fetch(part.dataset.part));
  }
}

document.addEventListener("submit", async (event) => {
  const part = event.target.closest("[data-part]");
  if (!part) return;
  event.preventDefault();
  const { action, method } = event.target;
  const body = new URLSearchParams(new FormData(event.target, event.submitter));
  const headers = { Accept: "text/html" };
  const asked = method === "get" ? fetch(`${action}?${body}`, { headers }) : fetch(action, { method: "POST", body, headers });
  follow(await replace(part, asked));
});

// The part as the answer has it; the same one if the server is away.
async function replace(part, asked) {
  try {
    const page = new DOMParser().parseFromString(await (await asked).text(), "text/html");
    const main = page.querySelector(`#${part.id}`);
    const found = main ?? Object.assign(part.cloneNode(), { textContent: page.querySelector("main")?.textContent ?? "" });
    if (!main) found.dataset.state = "failed";
    const typed = [...part.querySelectorAll("input, textarea")].filter((x) => x.value !== x.defaultValue);
    const opened = [...part.querySelectorAll("details[open] > summary")].map((x) => x.textContent);
    const focused = document.activeElement?.id;
    part.replaceWith(found);
    for (const summary of found.querySelectorAll("details > summary")) {
      if (opened.includes(summary.textContent)) summary.parentElement.open = true;
    }
    for (const old of typed) {
      const field = found.querySelector(`#${CSS.escape(old.id)}`);
      if (field && field.value !== old.value) field.value = old.value;
    }
    if (focused) found.querySelector(`#${CSS.escape(focused)}`)?.focus();
    return found;
  } catch {
    return part; // The next look may find it.
  }
}
