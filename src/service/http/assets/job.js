// One job: how it stands, what it does, what came of it, and what may be done to it.

import { html } from "./vendor/lit-html.js";
import { follow, get, post, remove } from "./api.js";
import { Charts } from "./charts.js";
import { badge, progress } from "./jobs.js";
import { confirm, say } from "./page.js";
import * as results from "./results.js";
import { ago, called, clock, duration, moment, took } from "./words.js";

const ENDED = ["succeeded", "failed", "cancelled"];
// What the log shows; measured values go to the charts.
const TOLD = ["state_changed", "wish_noted", "stage_started", "stage_finished", "noted", "failed"];
const MOST_EVENTS = 1000;

class Shown {
  constructor(place, id) {
    this.place = place;
    this.id = id;
    this.at = `/v1/jobs/${id}`;
    this.charts = new Charts(place.signal);
    this.events = [];
    this.found = null;
    this.problem = null;
  }

  // The job and all that was told so far, then the news as it comes.
  async begin() {
    const { signal } = this.place;
    this.job = await get(this.at, { signal });
    const last = this.job.last_seq;
    const [series, told] = await Promise.all([
      get(`${this.at}/metrics`, { signal }),
      get(`${this.at}/events?limit=${MOST_EVENTS}&${TOLD.map((kind) => `event=${kind}`).join("&")}`, { signal }),
    ]);
    for (const { stage, key, points } of series.data) {
      for (const { step, value } of points) this.charts.add(stage, key, step, value);
    }
    for (const event of told.data) this.note(event);
    await this.results();
    this.draw();
    if (ENDED.includes(this.job.state)) return;
    follow(`${this.at}/events`, last, signal, (name, event) => this.hear(name, event)).catch(this.place.fail);
  }

  note(event) {
    if (event.event === "measured") this.charts.add(event.stage, event.name, event.step, event.value);
    else if (TOLD.includes(event.event) && !(event.seq <= this.events.at(-1)?.seq)) this.events.push(event);
  }

  hear(name, event) {
    if (name === "progress") this.job.progress = event;
    else if (name !== "end") this.note(event);
    if (["state_changed", "wish_noted", "stage_started", "stage_finished", "end"].includes(name)) this.look();
    if (name === "state_changed") say(`The job is ${event.state}.`);
    this.draw();
  }

  // Looks the job up again: once for many events.
  look() {
    this.looking ??= setTimeout(async () => {
      this.looking = null;
      try {
        this.job = await get(this.at, { signal: this.place.signal });
        await this.results();
        this.draw();
      } catch (error) {
        this.place.fail(error);
      }
    }, 150);
  }

  async results() {
    if (this.job.state === "succeeded") this.found ??= await results.load(this.id, this.place.signal);
  }

  draw() {
    this.drawing ??= requestAnimationFrame(() => {
      this.drawing = null;
      if (this.place.signal.aborted) return;
      this.place.title(called(this.job));
      this.place.draw(view(this));
      this.charts.draw();
    });
  }

  act(name) {
    return async () => {
      this.problem = null;
      try {
        const job = await post(`${this.at}/${name}`);
        if (name === "retry") location.hash = `#/jobs/${job.id}`;
        else this.job = job;
      } catch (error) {
        this.problem = error;
      }
      this.draw();
      if (!ENDED.includes(this.job.state)) this.look();
    };
  }

  async cancel() {
    if (await confirm("Cancel this job?", "It stops at its next seam. A new try can go on with what it has recorded.", "Cancel the job")) {
      await this.act("cancel")();
    }
  }

  async delete() {
    if (!(await confirm("Delete this job?", "The job and all its files go; nothing brings them back.", "Delete it"))) return;
    try {
      await remove(this.at);
      location.hash = "#/";
    } catch (error) {
      this.problem = error;
      this.draw();
    }
  }
}

function buttons(shown) {
  const { state, wish } = shown.job;
  const has = [];
  if ((state === "queued" || state === "running") && !wish) has.push(html`<button @click=${shown.act("pause")}>Pause</button>`);
  if (state === "paused") has.push(html`<button class="main" @click=${shown.act("resume")}>Resume</button>`);
  if (!ENDED.includes(state) && wish !== "cancel") has.push(html`<button class="danger" @click=${() => shown.cancel()}>Cancel</button>`);
  if (state === "failed" || state === "cancelled") has.push(html`<button class="main" @click=${shown.act("retry")}>Try again</button>`);
  has.push(html`<a class="button" href="#/submit?like=${shown.id}">Make one like it</a>`);
  if (ENDED.includes(state)) has.push(html`<button class="danger" @click=${() => shown.delete()}>Delete</button>`);
  return html`<p class="row">${has}</p>`;
}

function facts({ job }) {
  const all = [
    ["Created", html`<time datetime=${job.created_at} title=${moment(job.created_at)}>${ago(job.created_at)}</time>`],
    ["Took", took(job)],
    ["Attempt", job.crashes ? `${job.attempt}, ${job.crashes} lost their worker` : `${job.attempt}`],
    ["Waiting before it", job.jobs_ahead],
    ["Tries again", job.retry_of ? html`<a href="#/jobs/${job.retry_of}">an earlier job</a>` : null],
    ["Labels", Object.entries(job.labels).map(([k, v]) => html`<span class="label">${k}=${v}</span> `)],
    ["Id", html`<code>${job.id}</code>`],
  ];
  const there = all.filter(([, value]) => value !== null && value !== undefined && value.length !== 0);
  return html`<dl class="facts">${there.map(([name, value]) => html`<div><dt>${name}</dt><dd>${value}</dd></div>`)}</dl>`;
}

function stages({ job }) {
  if (!job.stages.length) return "";
  const row = (s) => html`<tr><th scope="row">${s.stage}</th><td>${badge(s.state)}</td>
    <td>${s.duration_ms === null ? took({ started_at: s.started_at, finished_at: s.finished_at }) : duration(s.duration_ms)}</td>
    <td>${s.reused ? html`<span class="label">reused</span>` : ""}</td></tr>`;
  return html`<section class="card"><h2>Stages</h2><table><thead><tr><th scope="col">Stage</th><th scope="col">State</th>
    <th scope="col">Took</th><th scope="col"><span class="sr">Reuse</span></th></tr></thead><tbody>${job.stages.map(row)}</tbody></table></section>`;
}

// An event in words.
function words(event) {
  switch (event.event) {
    case "state_changed":
      return `${event.state}${event.reason ? `: ${event.reason}` : ""}`;
    case "wish_noted":
      return `asked to ${event.wish}`;
    case "stage_started":
      return `${event.stage} begins`;
    case "stage_finished":
      return `${event.stage} ${event.reused ? "taken from an earlier record" : `done in ${duration(event.duration_ms)}`}`;
    case "failed":
      return `failed: ${event.failure.message}`;
    default:
      return event.message ?? event.event;
  }
}

function log({ events }) {
  if (!events.length) return "";
  const line = (e) => html`<li class=${e.event}><time datetime=${e.at} title=${moment(e.at)}>${clock(e.at)}</time> ${words(e)}</li>`;
  return html`<section class="card"><h2>Events</h2><ol class="log" tabindex="0" aria-label="Events, newest first">${events.toReversed().map(line)}</ol></section>`;
}

const spec = ({ job }) =>
  html`<details class="card"><summary>What was asked</summary><pre tabindex="0">${JSON.stringify(job.spec, null, 2)}</pre></details>`;

function view(shown) {
  const { job, problem } = shown;
  return html`<p class="back"><a href="#/">All jobs</a></p>
    <div class="row spread"><h1>${called(job)} ${badge(job.state)}</h1>${buttons(shown)}</div>
    ${job.wish ? html`<p class="notice" role="status">Asked to ${job.wish}: it stops at its next seam.</p>` : ""}
    ${problem ? html`<p class="notice bad" role="alert">${problem.message}</p>` : ""}
    ${job.failure && job.state !== "succeeded" ? html`<section class="notice bad"><h2>${job.state === "failed" ? "Why it failed" : "Why the last attempt failed"}</h2>
      <p class="text">${job.failure.message}</p></section>` : ""}
    ${progress(job.progress)}${facts(shown)}
    ${shown.found ? results.view(shown.id, shown.found) : ""}
    <div class="columns">${stages(shown)}${log(shown)}</div>${shown.charts.view()}${spec(shown)}`;
}

export async function show(place, id) {
  await new Shown(place, encodeURIComponent(id)).begin();
}
