// Who computes, and on what.

import { html } from "./vendor/lit-html.js";
import { get } from "./api.js";
import { watch } from "./page.js";
import { ago, bytes, moment } from "./words.js";

function row(worker) {
  const work = worker.job_id ? html`<a href="#/jobs/${worker.job_id}">its job</a>` : worker.busy ? "another tenant's job" : "";
  const machine = worker.core_count ? `${worker.core_count} cores, ${bytes(worker.memory_bytes)}` : "not known";
  return html`<tr>
    <td data-name="State"><span class="badge ${worker.busy ? "running" : "idle"}">${worker.busy ? "busy" : "idle"}</span> ${work}</td>
    <td data-name="Host">${worker.host}</td><td data-name="Device">${worker.device}</td><td data-name="Machine">${machine}</td>
    <td data-name="Version">${worker.version}</td>
    <td data-name="Since"><time datetime=${worker.started_at} title=${moment(worker.started_at)}>${ago(worker.started_at)}</time></td>
    <td data-name="Last seen"><time datetime=${worker.seen_at}>${ago(worker.seen_at)}</time></td></tr>`;
}

const table = (workers) => html`<table class="list"><thead><tr>
  ${["State", "Host", "Device", "Machine", "Version", "Since", "Last seen"].map((n) => html`<th scope="col">${n}</th>`)}
  </tr></thead><tbody>${workers.map(row)}</tbody></table>`;

export async function show(place) {
  await watch(place, 3000, async () => {
    const { data } = await get("/v1/workers", { signal: place.signal });
    place.draw(html`<h1>Workers</h1>
      <p>One worker per device; each runs one job at a time. Those heard of within five minutes are shown.</p>
      ${data.length ? table(data) : html`<p class="notice bad">No worker is there: jobs wait. Start one with
        <code>secateur worker</code>, or run <code>secateur up</code>.</p>`}`);
  });
}
