const form = document.querySelector("form"), shown = document.querySelector("output");
const cards = [...document.querySelectorAll("article")];
function apply() {
  const wanted = [...new FormData(form)].filter(([, value]) => value);
  let count = 0;
  for (const card of cards) {
    card.hidden = !wanted.every(([key, value]) => card.dataset[key] === value);
    count += !card.hidden;
  }
  shown.textContent = count;
}
for (const [key, value] of new URLSearchParams(location.hash.slice(1))) {
  const field = form.elements.namedItem(key);
  if (field) field.value = value;
}
form.addEventListener("input", apply);
apply();
