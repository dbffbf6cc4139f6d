// Search over the runs of the form: those without a match are hidden.

const search = document.querySelector("[data-find]");

search?.addEventListener("input", () => {
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  for (const choice of document.querySelectorAll(search.dataset.find)) {
    const name = choice.dataset.choice.toLowerCase();
    choice.hidden = !words.every((word) => name.includes(word));
  }
});

// Enter in the search field must not send the form.
search?.addEventListener("keydown", (event) => {
  if (event.key === "Enter") event.preventDefault();
});
