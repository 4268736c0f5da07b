"use strict";

const at = (id) => document.getElementById(id);
let image = null;
let asked = 0;

function problem(text) {
  at("problem").textContent = text;
  at("problem").hidden = !text;
}

function list(place, shares) {
  place.replaceChildren(
    ...shares.map((one) => {
      const line = document.createElement("li");
      const part = (100 * one.probability).toFixed(1) + " %";
      for (const [kind, text] of [["bar", ""], ["name", one.name], ["share", part]]) {
        const piece = document.createElement("span");
        piece.className = kind;
        piece.textContent = text;
        line.append(piece);
      }
      line.firstChild.style.width = 100 * one.probability + "%";
      return line;
    }),
  );
}

async function ask() {
  if (!image) return;
  const mine = ++asked;
  at("answers").classList.add("old");
  problem("");
  try {
    const query = new URLSearchParams({ client: at("client").value });
    const answer = await fetch("/predict?" + query, { method: "POST", body: image });
    const said = await answer.json();
    if (mine !== asked) return;
    if (!answer.ok) throw new Error(said.error);
    at("mine").textContent = at("client").selectedOptions[0].textContent + ", " + said.method;
    list(at("classes"), said.classes);
    list(at("zero_shot"), said.zero_shot);
    at("answers").hidden = false;
    at("answers").classList.remove("old");
  } catch (error) {
    if (mine !== asked) return;
    at("answers").hidden = true;
    problem(error.message);
  }
}

function take(file) {
  if (!file) return;
  if (at("picture").src) URL.revokeObjectURL(at("picture").src);
  image = file;
  at("picture").src = URL.createObjectURL(file);
  at("picture").alt = file.name || "the image";
  at("picture").hidden = false;
  at("hint").hidden = true;
  ask();
}

at("picture").addEventListener("error", () => {
  at("picture").hidden = true;
  at("hint").hidden = false;
});
at("file").addEventListener("change", (event) => take(event.target.files[0]));
at("client").addEventListener("change", ask);
document.addEventListener("paste", (event) => take(event.clipboardData.files[0]));
for (const name of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(name, (event) => {
    event.preventDefault();
    at("drop").classList.toggle("over", name === "dragover");
    if (name === "drop") take(event.dataTransfer.files[0]);
  });
}

(async () => {
  try {
    const about = await (await fetch("/about")).json();
    at("about").textContent =
      about.method + " on " + about.clip + ", " + about.classes.length + " classes: " +
      about.classes.slice(0, 12).join(", ") + (about.classes.length > 12 ? ", …" : "");
    at("client").replaceChildren(...about.clients.map((one) => new Option(one.name, one.id)));
    at("client").disabled = about.clients.length < 2;
  } catch (error) {
    problem("The server does not answer: " + error.message);
  }
})();
