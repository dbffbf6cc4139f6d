// Uploads a file as it is, and opens it at the address of the form, `data-upload`.

const form = document.querySelector("[data-upload]");
const said = document.querySelector("[data-upload-said]");

form?.addEventListener("submit", (event) => {
  event.preventDefault();
  const file = form.querySelector("input").files[0];
  if (!file) return;
  const request = new XMLHttpRequest(); // Unlike fetch, it says how far it has come.
  request.open("PUT", `/act/upload/${encodeURIComponent(file.name)}`);
  request.setRequestHeader("Accept", "application/json");
  request.upload.addEventListener("progress", ({ loaded, total }) => {
    said.textContent = `${Math.floor((100 * loaded) / Math.max(total, 1))} %`;
  });
  request.addEventListener("load", () => {
    const answer = JSON.parse(request.responseText);
    const page = form.dataset.upload + encodeURIComponent(answer.file);
    if (request.status === 200) location.assign(page);
    else said.textContent = answer.error;
  });
  request.addEventListener("error", () => { said.textContent = "the connection was lost; nothing of the file stays"; });
  request.send(file);
});
