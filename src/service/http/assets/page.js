// Which page is shown, and what all pages share.

import { html, render } from "./vendor/lit-html.js";
import { Refused, get, key } from "./api.js";
import * as job from "./job.js";
import * as jobs from "./jobs.js";
import * as submit from "./submit.js";
import * as sweeps from "./sweeps.js";
import * as webhooks from "./webhooks.js";
import * as workers from "./workers.js";

const main = document.getElementById("main");
const nav = document.getElementById("nav");
const dialog = document.getElementById("dialog");
const PAGES = [["#/", "Jobs"], ["#/sweeps", "Sweeps"], ["#/submit", "New job"], ["#/workers", "Workers"], ["#/webhooks", "Webhooks"]];

let leave = null;
let shown = null;

export function say(text) {
  document.getElementById("said").textContent = text;
}

function route() {
  const [path, query] = (location.hash.slice(1) || "/").split("?");
  const parts = path.split("/").filter(Boolean);
  const asked = new URLSearchParams(query);
  if (parts[0] === "jobs" && parts[1]) return ["", "Job", (place) => job.show(place, parts[1])];
  if (parts[0] === "sweeps" && parts[1]) return ["", "Sweep", (place) => sweeps.show(place, parts[1])];
  if (parts[0] === "sweeps") return ["#/sweeps", "Sweeps", (place) => sweeps.list(place, asked)];
  if (parts[0] === "submit") return ["#/submit", "New job", (place) => submit.show(place, asked.get("like"))];
  if (parts[0] === "webhooks" && parts[1]) return ["", "Webhook", (place) => webhooks.show(place, parts[1])];
  if (parts[0] === "webhooks") return ["#/webhooks", "Webhooks", webhooks.all];
  if (parts[0] === "workers") return ["#/workers", "Workers", workers.show];
  return ["#/", "Jobs", (place) => jobs.show(place, asked)];
}

function menu(current) {
  const link = ([href, name]) => html`<a href=${href} aria-current=${href === current ? "page" : "false"}>${name}</a>`;
  const locked = key.get() ? html`<button class="plain" @click=${forget}>Forget key</button>` : "";
  render(html`${PAGES.map(link)}${locked}`, nav);
}

function forget() {
  key.drop();
  open();
}

// Shows the page that the address names. The focus follows only when a person went there.
export async function open(moved = true) {
  leave?.abort();
  leave = new AbortController();
  const here = leave;
  const [current, title, show] = route();
  menu(current);
  document.title = `${title} · secateur`;
  const place = {
    signal: here.signal,
    draw: (what) => here.signal.aborted || render(what, main),
    title: (text) => (document.title = `${text} · secateur`),
    fail: (error) => here.signal.aborted || fail(error),
  };
  if (shown !== title) render(html`<p class="quiet">Loading…</p>`, main);
  shown = title;
  if (moved) main.focus({ preventScroll: true });
  if (moved) window.scrollTo(0, 0);
  try {
    await show(place);
  } catch (error) {
    place.fail(error);
  }
}

function fail(error) {
  if (error instanceof Refused && error.status === 401) return ask(error);
  const problem = error instanceof Refused ? error.problem : {};
  render(
    html`<section class="notice bad" role="alert">
      <h1>${problem.title ?? "The service does not answer"}</h1>
      <p>${error.message}</p>
      ${problem.request_id ? html`<p class="quiet">Request ${problem.request_id}</p>` : ""}
      <p><button @click=${() => open()}>Try again</button> <a href="#/">All jobs</a></p>
    </section>`,
    main,
  );
}

// Asks for the key that opens the API.
function ask(error) {
  const wrong = key.get() !== null;
  key.drop();
  menu("");
  const use = async (event) => {
    event.preventDefault();
    key.set(new FormData(event.target).get("key").trim());
    try {
      await get("/v1/jobs?limit=1");
      open();
    } catch (refused) {
      fail(refused);
    }
  };
  render(
    html`<form class="card narrow" @submit=${use}>
      <h1>This service is locked</h1>
      <p>Give an API key to see its jobs. The key stays in this tab and is forgotten when you close it.</p>
      ${wrong ? html`<p class="bad" role="alert">${error.message}</p>` : ""}
      <label for="key">API key</label>
      <input id="key" name="key" type="password" autocomplete="current-password" required placeholder="sct_…" autofocus>
      <p><button class="main">Open</button></p>
    </form>`,
    main,
  );
  main.querySelector("#key").focus();
}

// Asks a yes-or-no question; resolves to whether it was yes.
export function confirm(title, text, yes) {
  return new Promise((answer) => {
    const close = (said) => () => {
      dialog.close();
      answer(said);
    };
    dialog.oncancel = () => answer(false);
    render(
      html`<h2 id="dialog-title">${title}</h2><p>${text}</p>
        <p class="row"><button class="danger" @click=${close(true)}>${yes}</button>
        <button @click=${close(false)}>Keep it</button></p>`,
      dialog,
    );
    dialog.showModal();
  });
}

// Runs `look` now and every `every` ms while the page is in sight.
export async function watch(place, every, look) {
  await look();
  const timer = setInterval(() => document.hidden || look().catch(place.fail), every);
  place.signal.addEventListener("abort", () => clearInterval(timer));
}

window.addEventListener("hashchange", () => {
  if (location.hash !== "#main") open();
});
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault();
  main.focus();
});
main.textContent = "";
open(false);
