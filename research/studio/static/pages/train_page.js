// Search over all knobs: groups without a match are hidden, those with one open.

const search = document.querySelector("[data-find]");

search?.addEventListener("input", () => {
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  for (const group of document.querySelectorAll("[data-group]")) {
    let found = 0;
    for (const knob of group.querySelectorAll("[data-knob]")) {
      const text = knob.dataset.knob.toLowerCase();
      knob.hidden = !words.every((word) => text.includes(word));
      found += knob.hidden ? 0 : 1;
    }
    group.hidden = found === 0;
    if (words.length) group.open = found > 0;
  }
});

// Enter in the search field must not send the form.
search?.addEventListener("keydown", (event) => {
  if (event.key === "Enter") event.preventDefault();
});
