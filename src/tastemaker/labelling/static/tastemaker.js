// What every page does a little better with JavaScript; each page works without it.

// Times are written in UTC; show them in the reader's own zone.
const format = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "short" });
for (const time of document.querySelectorAll("time[datetime]")) {
  time.textContent = format.format(new Date(time.dateTime));
}

// A form is sent once, however often its button is pressed, unless it says `data-again` (a download leaves its page as it
// is); `data-confirm` on a button asks first.
document.addEventListener("submit", (event) => {
  const { target: form, submitter } = event;
  const question = submitter?.dataset.confirm;
  if (form.dataset.sent || (question && !window.confirm(question))) {
    event.preventDefault();
    return;
  }
  if (!("again" in form.dataset)) form.dataset.sent = "yes";
});
// Back from the next page: the form may be sent again.
window.addEventListener("pageshow", () => {
  for (const form of document.querySelectorAll("form[data-sent]")) delete form.dataset.sent;
});

// `data-copy="#id"` copies the text of that element.
for (const button of document.querySelectorAll("button[data-copy]")) {
  button.hidden = !navigator.clipboard;
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(document.querySelector(button.dataset.copy).textContent.trim());
    button.textContent = "Copied";
  });
}

// What is said at the top of a page after an act is read out.
document.querySelector("[data-said]")?.focus({ preventScroll: true });
