// The list of jobs.

import { html } from "./vendor/lit-html.js";
import { get } from "./api.js";
import { watch } from "./page.js";
import { ago, called, duration, moment, percent, took } from "./words.js";

const STATES = ["queued", "running", "paused", "succeeded", "failed", "cancelled"];

export const badge = (state) => html`<span class="badge ${state}">${state}</span>`;

// How far a job is, as a bar and in words.
export function progress(p) {
  if (!p) return "";
  const eta = p.eta_s === null || p.eta_s === undefined ? "" : `, ${duration(p.eta_s * 1000)} left`;
  return html`<span class="progress"><progress max="1" value=${p.fraction} aria-label="Progress of ${p.stage}"></progress>
    <span class="quiet">${p.stage}: ${p.task} ${percent(p.fraction, 0)}${eta}</span></span>`;
}

function row(job) {
  const labels = Object.entries(job.labels).map(([name, value]) => html`<span class="label">${name}=${value}</span> `);
  return html`<tr>
    <td data-name="State">${badge(job.state)}${job.wish ? html` <span class="quiet">(${job.wish} asked)</span>` : ""}</td>
    <td data-name="Job"><a href="#/jobs/${job.id}">${called(job)}</a> ${labels}${progress(job.progress)}
      ${job.failure && job.state !== "succeeded" ? html`<span class="why">${job.failure.message.split("\n")[0]}</span>` : ""}</td>
    <td data-name="Created"><time datetime=${job.created_at} title=${moment(job.created_at)}>${ago(job.created_at)}</time></td>
    <td data-name="Took">${took(job)}</td>
  </tr>`;
}

function empty(state) {
  if (state) return html`<p class="card">No job is ${state}.</p>`;
  return html`<section class="card"><h2>No jobs yet</h2>
    <p>Name a model, say how many layers to cut, and watch: the model writes its own text to measure and heal on, so
    no data is needed for a first try.</p><p><a class="button main" href="#/submit">Make the first one</a></p></section>`;
}

export async function show(place, asked) {
  const state = STATES.includes(asked.get("state")) ? asked.get("state") : "";
  const cursor = asked.get("after") ? `&after=${encodeURIComponent(asked.get("after"))}` : "";
  const link = (name) => html`<a href=${name ? `#/?state=${name}` : "#/"} aria-current=${name === state ? "true" : "false"}>${name || "all"}</a>`;
  await watch(place, 2000, async () => {
    const page = await get(`/v1/jobs?limit=25${state ? `&state=${state}` : ""}${cursor}`, { signal: place.signal });
    const older = `#/?${state ? `state=${state}&` : ""}after=${page.last_id}`;
    place.draw(html`
      <div class="row spread"><h1>Jobs</h1><a class="button main" href="#/submit">New job</a></div>
      <nav class="tabs" aria-label="Filter by state">${["", ...STATES].map(link)}</nav>
      ${page.data.length === 0 ? empty(state) : html`<table class="list">
        <thead><tr><th scope="col">State</th><th scope="col">Job</th><th scope="col">Created</th><th scope="col">Took</th></tr></thead>
        <tbody>${page.data.map(row)}</tbody></table>`}
      <p class="row">${cursor ? html`<a href=${state ? `#/?state=${state}` : "#/"}>Newest</a>` : ""}
      ${page.has_more ? html`<a href=${older}>Older jobs</a>` : ""}</p>`);
  });
}
