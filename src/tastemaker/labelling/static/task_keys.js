// Single keys on a task's page: digits rank or rate the response one is in, letters go to a response or choose.
// They do nothing while a text field has the focus, can be switched off, and none of them sends or discards anything.

const form = document.querySelector("form[data-task]");
const list = form.querySelector("[data-keys]");
const on = form.querySelector("[data-keys-on]");
const order = form.querySelector("[data-order]");

list.hidden = false;
on.checked = localStorage.getItem("keys") !== "off";
on.addEventListener("change", () => localStorage.setItem("keys", on.checked ? "on" : "off"));

const isText = (element) =>
  element.matches("textarea, select, [contenteditable], input:not([type=radio], [type=checkbox])");

function choose(field) {
  if (!field) return false;
  field.focus();
  field.click();
  return true;
}

function act(key) {
  if (key === "?") {
    list.open = !list.open;
    if (list.open) list.querySelector("summary").focus();
    return true;
  }
  const response = document.activeElement.closest("[data-response]");
  if (response && /^[1-9]$/.test(key)) return choose(response.querySelector(`input[type=radio][value="${key}"]`));
  const letter = key.toUpperCase();
  if (!/^[A-Z]$/.test(letter)) return false;
  if (form.elements.namedItem("choice")) {
    return choose(form.querySelector(`input[name=choice][value="${letter === "T" ? "tie" : letter}"]`));
  }
  const asked = form.querySelector(`[data-response="${letter}"]`);
  asked?.focus();
  return Boolean(asked);
}

document.addEventListener("keydown", (event) => {
  if (event.isComposing || event.altKey || event.defaultPrevented) return;
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    form.requestSubmit(form.querySelector("button[value=submit]"));
    return;
  }
  if (event.ctrlKey || event.metaKey || !on.checked || isText(document.activeElement)) return;
  if (act(event.key)) event.preventDefault();
});

// The order so far, in words.
function showOrder() {
  const ranks = new Map();
  for (const field of form.querySelectorAll("[data-answer] input:checked")) {
    const letter = field.closest("[data-response]").dataset.response;
    ranks.set(Number(field.value), [...(ranks.get(Number(field.value)) ?? []), letter]);
  }
  const groups = [...ranks].sort(([a], [b]) => a - b).map(([, letters]) => letters.join(" = "));
  const missing = form.querySelectorAll("[data-response]").length - [...ranks.values()].flat().length;
  order.textContent = groups.length ? `Best first: ${groups.join(", then ")}${missing ? ` · ${missing} to go` : ""}` : "";
}
if (order) {
  form.addEventListener("change", showOrder);
  showOrder();
}
