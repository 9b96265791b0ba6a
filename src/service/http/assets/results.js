// What a job found: verdict, scores of base, pruned and healed, plots, files.

import { html } from "./vendor/lit-html.js";
import { call, get, key, save } from "./api.js";
import { bytes, count, number, percent } from "./words.js";

// Everything a finished job left, as far as it is there.
export async function load(id, signal) {
  const artifacts = (await get(`/v1/jobs/${id}/artifacts`, { signal })).data;
  const has = (path) => artifacts.some((a) => a.path === path);
  const report = has("report.json") ? await get(`/v1/jobs/${id}/report`, { signal }) : null;
  const plots = [];
  for (const file of artifacts.filter((a) => a.path.startsWith("plots/") && a.path.endsWith(".svg"))) {
    const text = await (await call(`${file.url}?proxy=1`, { signal })).text();
    const url = URL.createObjectURL(new Blob([text], { type: "image/svg+xml" }));
    signal.addEventListener("abort", () => URL.revokeObjectURL(url));
    plots.push({ url, name: file.path.slice(6, -4), title: /<title>([^<]*)<\/title>/.exec(text)?.[1] ?? file.path });
  }
  return { artifacts, report, plots };
}

export function view(id, { artifacts, report, plots }) {
  return html`${report ? summary(report) : ""}${report ? scores(report) : ""}${figures(report, plots)}${
    report ? candidates(report) : ""}${report ? written(report) : ""}${files(id, artifacts)}`;
}

function runs(layers) {
  const found = [];
  for (const layer of layers) {
    const last = found.at(-1);
    if (last && last[1] + 1 === layer) last[1] = layer;
    else found.push([layer, layer]);
  }
  return found.map(([a, b]) => (a === b ? `${a}` : `${a} to ${b}`)).join(", ");
}

function summary(report) {
  const { verdict, selection, profile, remarks } = report;
  return html`<section class="card"><h2>Result
      ${verdict ? html`<span class="badge ${verdict.decision}">${verdict.decision}</span>` : ""}</h2>
    <p>Of ${profile.layer_count} layers, ${selection.dropped.length} went: ${runs(selection.dropped)}
      (counted from 0), chosen by <code>${selection.strategy}</code>.</p>
    ${verdict ? html`<ul>${verdict.reasons.map((reason) => html`<li>${reason}</li>`)}</ul>` : ""}
    ${remarks.length ? html`<h3>Before you use it</h3><ul>${remarks.map((r) => html`<li>${r}</li>`)}</ul>` : ""}</section>`;
}

function scores({ eval: scored }) {
  const columns = ["base", "pruned", "healed"].filter((name) => scored[name]);
  const of = (read) => columns.map((name) => read(scored[name]));
  const rows = [
    ["Layers", of((s) => number(s.layer_count))],
    ["Parameters", of((s) => count(s.parameters))],
    ["Size of the weights", of((s) => bytes(s.size_bytes))],
    ...scored.base.perplexity.map((p, i) => [`Perplexity, ${p.corpus}`, of((s) => withError(s.perplexity[i]))]),
    ...scored.base.tasks.map((t, i) => [`Accuracy, ${t.task}`, of((s) => accuracy(s.tasks[i]))]),
    ["Broken texts", of((s) => (s.generation ? percent(s.generation.broken, 0) : "–"))],
    ["Prefill, tokens per second", of((s) => (s.speed ? number(Math.round(s.speed.prefill_tokens_per_s)) : "–"))],
    ["Decode, tokens per second", of((s) => (s.speed ? number(Math.round(s.speed.decode_tokens_per_s)) : "–"))],
    ["Peak memory", of((s) => bytes(s.peak_memory_bytes))],
  ].filter(([, values]) => values.some((value) => value !== "–"));
  return html`<section class="card"><h2>What was measured</h2><div class="scroll" tabindex="0" role="region" aria-label="Scores">
    <table class="scores"><thead><tr><th scope="col"><span class="sr">Measured</span></th>${columns.map((c) => html`<th scope="col">${c}</th>`)}</tr></thead>
    <tbody>${rows.map(([name, values]) => html`<tr><th scope="row">${name}</th>${values.map((v) => html`<td>${v}</td>`)}</tr>`)}</tbody>
    </table></div></section>`;
}

const withError = (p) => (p ? `${number(p.value)}${p.stderr ? ` ± ${number(p.stderr, 2)}` : ""}` : "–");
const accuracy = (t) => (t ? `${percent(t.acc)} ± ${percent(t.stderr)}` : "–");

function figures(report, plots) {
  if (!plots.length) return "";
  const cut = report ? ` Layers ${runs(report.selection.dropped)} were cut.` : "";
  return html`<section class="card"><h2>What each layer does to the stream</h2><div class="figures">${plots.map(
    (plot) => html`<figure><img class="paper" src=${plot.url} alt="${plot.title}.${cut}"></figure>`)}</div></section>`;
}

function candidates({ selection }) {
  const best = [...selection.candidates].sort((a, b) => a.score - b.score).slice(0, 10);
  if (!best.length) return "";
  return html`<details class="card"><summary>Where else it could have been cut</summary>
    <table><thead><tr><th scope="col">First layer</th><th scope="col">Score (less is better)</th></tr></thead>
    <tbody>${best.map((c) => html`<tr><td>${c.start}${selection.dropped.includes(c.start) ? " (cut)" : ""}</td><td>${number(c.score)}</td></tr>`)}</tbody>
    </table></details>`;
}

function written({ eval: scored }) {
  const columns = ["base", "pruned", "healed"].filter((name) => scored[name]?.generation);
  const texts = scored.base.generation?.texts.slice(0, 3) ?? [];
  if (!texts.length) return "";
  return html`<details class="card"><summary>What they write</summary>${texts.map((text, i) => html`<h3>“…${text.prompt.slice(-80)}”</h3>
    <dl>${columns.map((name) => html`<dt>${name}</dt><dd class="text">${scored[name].generation.texts[i]?.text}</dd>`)}</dl>`)}</details>`;
}

function files(id, artifacts) {
  if (!artifacts.length) return "";
  const total = artifacts.reduce((sum, a) => sum + a.size_bytes, 0);
  const fetch = (url, name) => (event) => {
    if (!key.get() && event.currentTarget.tagName === "A") return;
    event.preventDefault();
    save(url, name).catch((error) => error.name !== "AbortError" && alert(error.message));
  };
  const link = (a) => html`<tr><td><a href=${a.url} download @click=${fetch(`${a.url}?proxy=1`, a.path.split("/").pop())}>${a.path}</a></td>
    <td class="right">${bytes(a.size_bytes)}</td></tr>`;
  const bundle = `/v1/jobs/${id}/bundle.tar`;
  return html`<section class="card"><h2>Files</h2>
    <p class="row"><a class="button main" href=${bundle} download @click=${fetch(bundle, `${id}.tar`)}>Download all (${bytes(total)})</a>
      ${key.get() ? "" : html`<a class="button" href="/v1/jobs/${id}/report" target="_blank" rel="noopener">Open the report</a>`}</p>
    <details><summary>${artifacts.length} files</summary><table>${artifacts.map(link)}</table></details>
    <p class="quiet">Large ones come best by <code>secateur jobs download ${id}</code>, which resumes and checks them; transformers and
      vLLM load the result with <code>HF_ENDPOINT=${location.origin}/hf</code> and the name <code>${id}</code>.</p></section>`;
}
