// Parts of a page that another page renders: each is fetched, fetched again while what
// it shows runs, and replaced by the answer of its own forms. The rest of the page, with
// what people have typed there, stays. A form with `data-leave` leads to another page.

const EVERY = 1500; // milliseconds
const headers = { Accept: "text/html" };

for (const part of document.querySelectorAll("[data-part]")) follow(part);

async function follow(part) {
  // An answer without the part and without a reason is a proxy's: the next look may find it.
  const look = () => replace(part, fetch(part.dataset.part, { headers }), (same, why) => (why ? refuse(same, why) : same));
  if (part.dataset.state === "absent") part = await look();
  while (part?.isConnected && part.dataset.state === "running") {
    await new Promise((resolve) => setTimeout(resolve, Number(part.dataset.every ?? EVERY)));
    if (part.isConnected) part = await look();
  }
}

document.addEventListener("submit", async (event) => {
  const part = event.target.closest("[data-part]");
  if (!part || event.target.hasAttribute("data-leave")) return;
  event.preventDefault();
  const { action, method } = event.target;
  const body = new URLSearchParams(new FormData(event.target, event.submitter));
  const asked = method === "get" ? fetch(`${action}?${body}`, { headers }) : fetch(action, { method: "POST", body, headers });
  follow(await replace(part, asked, refuse));
});

// The part as the answer has it; the same one if the server is away; what `without`
// makes of it if the answer has none.
async function replace(part, asked, without) {
  try {
    const page = new DOMParser().parseFromString(await (await asked).text(), "text/html");
    const found = page.querySelector(`#${part.id}`);
    if (!found) return without(part, page.querySelector("main .problem")?.textContent);
    const typed = [...part.querySelectorAll("input, textarea")].filter((x) => x.value !== x.defaultValue);
    const opened = [...part.querySelectorAll("details[open] > summary")].map((x) => x.textContent);
    const focused = part.contains(document.activeElement) ? document.activeElement.id : null;
    part.replaceWith(found);
    for (const summary of found.querySelectorAll("details > summary")) {
      if (opened.includes(summary.textContent)) summary.parentElement.open = true;
    }
    for (const old of typed) {
      const field = found.querySelector(`#${CSS.escape(old.id)}`);
      if (field && field.value !== old.value) field.value = old.value;
    }
    if (focused !== null) keepFocus(found, focused);
    return found;
  } catch {
    return part; // The next look may find it.
  }
}

// The keyboard stays at its field or button, or else at the part.
function keepFocus(part, id) {
  const same = id && part.querySelector(`#${CSS.escape(id)}`);
  part.tabIndex = -1;
  (same && !same.disabled ? same : part).focus({ preventScroll: true });
}

// Says why the server did not do what a form of the part sent.
function refuse(part, why) {
  part.querySelector("[data-refused]")?.remove();
  const said = document.createElement("p");
  said.className = "problem";
  said.setAttribute("role", "alert");
  said.dataset.refused = "";
  said.textContent = why ?? "The studio answered with another page: load this one again.";
  part.prepend(said);
  part.dataset.state = "failed";
  return part;
}
