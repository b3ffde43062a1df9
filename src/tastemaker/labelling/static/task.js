// A task's page, with JavaScript: drafts save themselves, the lease goes on while the page is looked at, time is
// counted while it is visible, and nothing is sent that could get lost on the way. Without, the page is a plain form.

const form = document.querySelector("form[data-task]");
const control = (name) => form.elements.namedItem(name);
const trouble = form.querySelector("[data-trouble]");
const saved = form.querySelector("[data-saved]");
const IDLE_MS = 1500, BEAT_MS = 60_000;

function say(sentence) {
  trouble.textContent = sentence;
  trouble.hidden = !sentence;
}

// --- time on task, while the page can be seen ---

let spent = Number(control("seconds").value) || 0;
let since = document.hidden ? null : performance.now();

function count() {
  const now = performance.now();
  if (since !== null) spent += (now - since) / 1000;
  since = document.hidden ? null : now;
  control("seconds").value = spent.toFixed(1);
}

// --- talking to the server ---

const token = () => document.querySelector("meta[name=csrf-token]").content;

// After a new sign-in in another window, this page's token is an old one: take that of the task's page as it is now.
async function renewToken() {
  const page = await fetch(form.dataset.task);
  if (page.redirected || !page.ok) return false;
  const found = new DOMParser().parseFromString(await page.text(), "text/html").querySelector("meta[name=csrf-token]");
  if (!found || found.content === token()) return false;
  document.querySelector("meta[name=csrf-token]").content = found.content;
  for (const field of document.querySelectorAll("input[name=csrf_token]")) field.value = found.content;
  return true;
}

async function post(what, body, keepalive = false) {
  const send = () =>
    fetch(`${form.dataset.task}/${what}`, {
      method: "POST",
      headers: { "content-type": "application/json", accept: "application/json", "x-csrf-token": token() },
      body: JSON.stringify(body),
      keepalive: keepalive && JSON.stringify(body).length < 20_000, // browsers keep little alive
    });
  const answer = await send();
  return (answer.status === 401 || answer.status === 403) && (await renewToken()) ? send() : answer;
}

// False where the page should stay as it is: the session has ended, the server cannot be reached, or a draft is newer.
async function reach(what, body, keepalive, then) {
  let answer, said;
  try {
    answer = await post(what, body, keepalive);
    said = await answer.json();
  } catch {
    say("The server cannot be reached. Nothing on this page is lost; try again in a moment.");
    return false;
  }
  if (answer.status === 401 || answer.status === 403) {
    say("Your session has ended. Sign in again in another window and then go on here: nothing on this page is lost.");
    return false;
  }
  if (answer.ok) then(said);
  else say(said.error);
  if (answer.status === 409) stale = true; // a newer draft is never overwritten; sending again is up to the rater
  return answer.ok || (answer.status !== 409 && answer.status !== 429);
}

// --- drafts ---

let changes = 0, kept = 0, timer = null, stale = false, saving = Promise.resolve(true);

function fields() {
  const found = {};
  for (const field of form.querySelectorAll("[data-answer] :is(input, textarea)")) {
    if (field.type === "textarea" || field.checked) found[field.name] = field.value;
  }
  count();
  return { ...found, seconds: control("seconds").value };
}

function save(keepalive = false) {
  clearTimeout(timer);
  saving = saving.then(async () => {
    if (changes === kept || stale) return true;
    const upTo = changes;
    const version = Number(control("draft_version").value);
    return reach("draft", { body: fields(), version }, keepalive, (said) => {
      control("draft_version").value = said.version;
      kept = upTo;
      say("");
      const at = new Date().toLocaleTimeString([], { timeStyle: "short" });
      saved.textContent = `Draft saved ${at}`;
    });
  });
  return saving;
}

form.addEventListener("input", (event) => {
  if (!event.target.closest("[data-answer]")) return;
  changes += 1;
  saved.textContent = "";
  clearTimeout(timer);
  timer = setTimeout(save, IDLE_MS);
});

// --- leaving, coming back, staying ---

document.addEventListener("visibilitychange", () => {
  count();
  if (document.hidden) save(true);
  else beat();
});
window.addEventListener("pagehide", () => save(true));
window.addEventListener("pageshow", (event) => {
  if (event.persisted) location.reload(); // what was sent since may have changed the task
});

function beat() {
  if (document.hidden) return Promise.resolve(true);
  return reach("heartbeat", {}, false, (said) => {
    if (form.dataset.held === "yes" && !said.held) {
      form.dataset.held = "no";
      say("The time set aside for this task has run out, and it may go to somebody else. Send what you have: it is stored all the same.");
    }
  });
}
setInterval(beat, BEAT_MS);

// A form is sent when the server was heard of a moment before: else the page would be gone, and what is on it.
let ready = false;
form.addEventListener("submit", async (event) => {
  if (ready) {
    ready = false;
    return;
  }
  event.preventDefault();
  event.stopPropagation();
  if (form.dataset.asking) return;
  form.dataset.asking = "yes";
  count();
  const reached = (await save()) && (await beat());
  delete form.dataset.asking;
  if (!reached) return;
  kept = changes;
  ready = true;
  form.requestSubmit(event.submitter);
  ready = false;
});

// The guideline stays as it was left: folded or not, for each version of it.
const guideline = document.querySelector("details[data-unfolds]");
if (guideline) {
  const key = `guideline ${guideline.dataset.unfolds}`;
  const last = localStorage.getItem(key);
  const remember = () => localStorage.setItem(key, guideline.open ? "open" : "folded");
  if (last !== null) guideline.open = last === "open";
  else remember(); // a page may come unfolded, and whether that is a toggle that is still heard is chance
  guideline.addEventListener("toggle", remember);
}
