// Sweeps: many jobs side by side, and which of them no other one beats.

import { html, svg } from "./vendor/lit-html.js";
import { get, key, post } from "./api.js";
import { badge } from "./jobs.js";
import { confirm, watch } from "./page.js";
import { ago, bytes, moment, number, percent } from "./words.js";

const called = (sweep) => sweep.name || `sweep ${sweep.id.slice(-12)}`;
const counts = (sweep) => Object.entries(sweep.counts).map(([state, n]) => html`<span class="badge ${state}">${n} ${state}</span> `);

export async function list(place, asked) {
  const cursor = asked.get("after") ? `&after=${encodeURIComponent(asked.get("after"))}` : "";
  const row = (sweep) => html`<tr><td data-name="Jobs">${counts(sweep)}</td><td data-name="Sweep"><a href="#/sweeps/${sweep.id}">${called(sweep)}</a></td>
    <td data-name="State">${sweep.done ? "done" : "goes on"}</td>
    <td data-name="Created"><time datetime=${sweep.created_at} title=${moment(sweep.created_at)}>${ago(sweep.created_at)}</time></td></tr>`;
  await watch(place, 3000, async () => {
    const page = await get(`/v1/sweeps?limit=20${cursor}`, { signal: place.signal });
    place.draw(html`<h1>Sweeps</h1>
      <p>A sweep is a job spec and axes along which it varies: amounts, strategies, ways of healing. Its jobs share what they have in common.</p>
      ${page.data.length ? html`<table class="list"><thead><tr>${["Jobs", "Sweep", "State", "Created"].map((n) => html`<th scope="col">${n}</th>`)}</tr></thead>
        <tbody>${page.data.map(row)}</tbody></table>`
      : html`<p class="card">No sweeps yet. <code>POST /v1/sweeps</code> makes one; its form is in the <a href="/docs/">API documentation</a>.</p>`}
      ${page.has_more ? html`<p><a href="#/sweeps?after=${page.last_id}">Older sweeps</a></p>` : ""}`);
  });
}

export async function show(place, id) {
  const at = `/v1/sweeps/${encodeURIComponent(id)}`;
  const cancel = async () => {
    if (!(await confirm("Cancel this sweep?", "Its jobs that have not ended are cancelled; what is done stays.", "Cancel the sweep"))) return;
    await post(`${at}/cancel`).then(draw, place.fail);
  };
  const draw = (sweep) => {
    place.title(called(sweep));
    place.draw(html`<p class="back"><a href="#/sweeps">All sweeps</a></p>
      <div class="row spread"><h1>${called(sweep)}</h1><p class="row">
        ${sweep.done ? "" : html`<button class="danger" @click=${cancel}>Cancel</button>`}
        ${key.get() ? "" : html`<a class="button" href=${sweep.links.report} target="_blank" rel="noopener">Open the report</a>`}</p></div>
      <p>${counts(sweep)}</p>${front(sweep.report.rows)}${table(sweep)}`);
  };
  let done = false;
  await watch(place, 3000, async () => {
    if (done) return;
    const sweep = await get(at, { signal: place.signal });
    done = sweep.done;
    draw(sweep);
  });
}

function table({ jobs, report }) {
  const row = (r, i) => {
    const o = r.outcome;
    const job = jobs[i] ?? {};
    return html`<tr><th scope="row">${job.job_id ? html`<a href="#/jobs/${job.job_id}">${r.name}</a>` : r.name}${r.on_front ? html` <span class="badge finished">front</span>` : ""}</th>
      <td>${job.state ? badge(job.state) : "deleted"}</td><td>${o ? o.dropped.length : ""}</td><td>${o ? bytes(o.size_bytes) : ""}</td>
      <td>${o?.perplexity_ratio ? `×${number(o.perplexity_ratio, 3)}` : ""}</td><td>${o?.accuracy_ratio ? percent(o.accuracy_ratio, 0) : ""}</td>
      <td>${o?.speedup ? `×${number(o.speedup, 3)}` : ""}</td><td>${o?.verdict ? badge(o.verdict) : ""}</td></tr>`;
  };
  const names = ["Job", "State", "Layers cut", "Size", "Perplexity", "Accuracy kept", "Speed", "Verdict"];
  return html`<section class="card"><h2>All jobs</h2><div class="scroll" tabindex="0" role="region" aria-label="Jobs of the sweep"><table>
    <thead><tr>${names.map((n) => html`<th scope="col">${n}</th>`)}</tr></thead><tbody>${report.rows.map(row)}</tbody></table></div></section>`;
}

// Size against what is lost. The table says the same in numbers.
function front(rows) {
  const by = rows.some((r) => r.outcome?.accuracy_ratio) ? "accuracy_ratio" : "perplexity_ratio";
  const points = rows.filter((r) => r.outcome?.[by]).map((r) => ({ ...r, x: r.outcome.size_bytes, y: r.outcome[by] }));
  if (points.length < 2) return "";
  const scale = (values, from, to) => {
    const [low, high] = [Math.min(...values), Math.max(...values)];
    return { low, high, at: (v) => from + ((high > low ? (v - low) / (high - low) : 0.5) * 0.9 + 0.05) * (to - from) };
  };
  const x = scale(points.map((p) => p.x), 70, 690);
  // Perplexity grows by factors.
  const [tall, back] = by === "perplexity_ratio" ? [Math.log, Math.exp] : [Number, Number];
  const y = scale(points.map((p) => tall(p.y)), 260, 20);
  const line = points.filter((p) => p.on_front).sort((a, b) => a.x - b.x).map((p) => `${x.at(p.x)},${y.at(tall(p.y))}`).join(" ");
  const what = by === "accuracy_ratio" ? "accuracy over the base model's" : "perplexity over the base model's";
  const mark = (p) => svg`<circle class=${p.on_front ? "on" : "off"} cx=${x.at(p.x)} cy=${y.at(tall(p.y))} r="6"><title>${p.name}: ${bytes(p.x)}, ${number(p.y, 3)}</title></circle>`;
  const end = (v, text, anchor, px, py) => svg`<text x=${px} y=${py} text-anchor=${anchor}>${text(v)}</text>`;
  return html`<section class="card"><h2>What no other one beats</h2><svg class="front" viewBox="0 0 720 310" role="img"
      aria-label="Size against ${what}: ${points.filter((p) => p.on_front).map((p) => `${p.name} ${bytes(p.x)} ${number(p.y, 3)}`).join("; ")} are on the front">
    <path class="axis" d="M70 20V260H690"></path><polyline class="line" points=${line}></polyline>${points.map(mark)}
    ${end(x.low, bytes, "middle", x.at(x.low), 280)}${x.high > x.low ? end(x.high, bytes, "middle", x.at(x.high), 280) : ""}
    ${end(y.low, (v) => number(back(v), 3), "end", 62, y.at(y.low) + 4)}${y.high > y.low ? end(y.high, (v) => number(back(v), 3), "end", 62, y.at(y.high) + 4) : ""}
    <text x="380" y="302" text-anchor="middle">size of the weights</text></svg>
    <p class="quiet">Up: ${what}. Filled: no other job is at least as good in everything that was measured, and better in something.</p></section>`;
}
