// Once the rows have been looked at, each choice of a column looks at them again.

const form = document.querySelector("form[data-auto]");
const looked = document.querySelector("#rows, .problem, [role=status].said");

form?.addEventListener("change", () => {
  if (looked) form.requestSubmit();
});
