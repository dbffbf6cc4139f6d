// Once the rows have been looked at, each choice of a column looks at them again. The
// keyboard stays at its field: arrows choose one column after the other.

const form = document.querySelector("form[data-auto]");
const looked = document.querySelector("#rows, .problem, [role=status].said");

form?.addEventListener("change", ({ target }) => {
  if (!looked) return;
  sessionStorage.chosen = target.id;
  form.requestSubmit();
});
if (sessionStorage.chosen) document.getElementById(sessionStorage.chosen)?.focus();
delete sessionStorage.chosen;
