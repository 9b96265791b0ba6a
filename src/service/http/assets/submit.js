// A form for a new job, checked as it is filled in.

import { html } from "./vendor/lit-html.js";
import { live } from "./vendor/directives/live.js";
import { Refused, get, post, upload } from "./api.js";
import { say } from "./page.js";
import { bytes, count, duration } from "./words.js";

const STRATEGIES = [
  ["auto", "auto: weigh several cuts, take the least damage"],
  ["block_endpoint", "block_endpoint: the block that turns the stream least"],
  ["block_influence", "block_influence: single layers of least influence"],
  ["greedy_damage", "greedy_damage: layer by layer, the least damage each time"],
  ["deepest", "deepest: the last layers but the very last"],
];
const HEALS = [
  ["qlora", "qlora: train low-rank adapters, merge them"],
  ["rescale", "rescale: make up for the stream's size, no training"],
  ["least_squares", "least_squares: a linear map for the layers that went"],
  ["", "none"],
];
const SOURCES = {
  path: ["a directory of the service's machine", [["path", "Directory", "/models/SmolLM2-135M-Instruct"]]],
  hub: ["the Hugging Face Hub", [["repo", "Repository", "HuggingFaceTB/SmolLM2-135M-Instruct"], ["revision", "Revision", "main"]]],
  job: ["the result of another job", [["job_id", "Id of the job", "019ab7c2-1f2e-7c3a-9d5e-0123456789ab"]]],
};
const TEXTS = {
  model: ["written by the model itself", []],
  path: ["a file of the service's machine", [["path", "File (.txt, .jsonl, .parquet)", "/corpora/text.txt"]]],
  hub: ["the Hugging Face Hub", [["repo", "Data set", "allenai/c4"], ["file", "File", "en/c4-train.00000-of-01024.json.gz"]]],
  upload: ["a file of this computer", []],
};
const START = {
  name: "", "model.from": "path", amount: "fraction", fraction: "0.2", layers: "2", strategy: "auto",
  "calibration.from": "model", samples: "", seq_len: "", heal: "qlora", "heal.from": "model", steps: "",
  "eval.from": "model", seed: "0",
};

// What the values of the form ask for.
export function specOf(v) {
  const source = (prefix, kinds) => {
    const from = v[`${prefix}.from`];
    if (from === "upload") return { from, upload_id: v[`${prefix}.upload_id`] ?? "" };
    const given = kinds[from][1].map(([field]) => [field, v[`${prefix}.${field}`]?.trim()]);
    return { from, ...Object.fromEntries(given.filter(([, value]) => value)) };
  };
  const whole = (name, key = name) => (v[name] ? { [key]: Number(v[name]) } : {});
  const spec = {
    ...(v.name.trim() ? { name: v.name.trim() } : {}),
    model: source("model", SOURCES),
    calibration: { corpus: source("calibration", TEXTS), ...whole("samples"), ...whole("seq_len") },
    prune: { amount: { [v.amount]: Number(v[v.amount]) }, strategy: v.strategy },
    heal: v.heal ? [{ method: v.heal, corpus: source("heal", TEXTS), ...(v.heal === "qlora" ? whole("steps") : {}) }] : [],
    ...whole("seed"),
  };
  if (v["eval.from"] !== "model") spec.eval = { perplexity: [source("eval", TEXTS)] };
  return spec;
}

// Which field of the form a JSON pointer speaks of.
const SOURCE = /^\/(model|calibration\/corpus|heal\/0\/corpus|eval\/perplexity\/0)(?:\/(\w+))?$/;
const PREFIXES = { model: "model", "calibration/corpus": "calibration", "heal/0/corpus": "heal", "eval/perplexity/0": "eval" };
const PLACES = [
  [/^\/calibration\/samples/, "samples"], [/^\/calibration\/seq_len/, "seq_len"], [/^\/prune\/strategy/, "strategy"],
  [/^\/prune/, "amount"], [/^\/heal\/0\/steps/, "steps"], [/^\/heal/, "heal"], [/^\/name/, "name"], [/^\/seed/, "seed"],
];

function placeOf(pointer) {
  const found = SOURCE.exec(pointer);
  if (found) return `${PREFIXES[found[1]]}.${{ undefined: "from", upload_id: "file" }[found[2]] ?? found[2]}`;
  return PLACES.find(([at]) => at.test(pointer))?.[1];
}

class Form {
  constructor(place) {
    this.place = place;
    this.values = { ...START };
    this.text = null; // JSON, once it is edited as such
    this.errors = [];
    this.plan = null;
    this.plans = true; // the service can check without creating
    this.note = "";
    this.sent = false;
  }

  spec() {
    return this.text === null ? specOf(this.values) : JSON.parse(this.text);
  }

  set(name, value) {
    this.values[name] = value;
    this.changed();
  }

  changed() {
    this.draw();
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.check(), 500);
  }

  // Asks for the plan: what is wrong, or what it will come to.
  async check() {
    if (!this.plans || this.place.signal.aborted) return;
    let spec;
    try {
      spec = this.spec();
    } catch (error) {
      this.refuse([{ pointer: "", message: `is no JSON: ${error.message}` }]);
      return;
    }
    this.asking?.abort();
    this.asking = new AbortController();
    try {
      const plan = await post("/v1/plans", spec);
      this.plan = plan;
      this.refuse([]);
    } catch (error) {
      if (error instanceof Refused && [404, 405].includes(error.status) && error.problem.code !== "job-not-found") this.plans = false;
      else if (error instanceof Refused && error.status === 422) this.refuse(error.problem.errors ?? [{ pointer: "", message: error.message }]);
    }
  }

  refuse(errors) {
    this.errors = errors;
    if (errors.length) this.plan = null;
    this.draw();
  }

  async submit(event) {
    event.preventDefault();
    if (this.sent) return;
    this.sent = true;
    this.draw();
    try {
      const job = await post("/v1/jobs", this.spec(), { "Idempotency-Key": crypto.randomUUID?.() ?? `${Date.now()}-${Math.random()}` });
      location.hash = `#/jobs/${job.id}`;
    } catch (error) {
      this.sent = false;
      if (error instanceof SyntaxError) this.refuse([{ pointer: "", message: `is no JSON: ${error.message}` }]);
      else if (error instanceof Refused && error.status !== 401) {
        this.refuse(error.problem.errors?.length ? error.problem.errors : [{ pointer: "", message: error.message }]);
        say(`The job was refused: ${this.errors.length} problems.`);
        document.getElementById("problems")?.focus();
      } else this.place.fail(error);
    }
  }

  async bring(prefix, file) {
    if (!file) return;
    try {
      const done = await upload(file, (word) => {
        this.note = `${file.name}: ${word}`;
        this.draw();
      });
      this.note = `${file.name}, ${bytes(file.size)}, is here.`;
      this.set(`${prefix}.upload_id`, done.id);
    } catch (error) {
      this.note = `${file.name}: ${error.message}`;
      this.draw();
    }
  }

  draw() {
    this.place.draw(view(this));
  }
}

const errorsAt = (form, field) => form.errors.filter((e) => placeOf(e.pointer) === field);

// A labelled input and what is wrong with it.
function field(form, name, label, input, hint = "") {
  const wrong = form.text === null ? errorsAt(form, name) : [];
  return html`<div class="field"><label for=${name}>${label}</label>${input}
    ${hint ? html`<span class="quiet">${hint}</span>` : ""}
    <span class="bad" id="${name}-wrong">${wrong.map((e) => html`${e.message}<br>`)}</span></div>`;
}

function input(form, name, { type = "text", placeholder = "", min, max, step, required } = {}) {
  const wrong = errorsAt(form, name).length > 0;
  return html`<input id=${name} type=${type} placeholder=${placeholder} min=${min ?? ""} max=${max ?? ""} step=${step ?? "any"}
    ?required=${required} .value=${live(form.values[name] ?? "")} aria-invalid=${wrong} aria-describedby="${name}-wrong"
    @input=${(e) => form.set(name, e.target.value)}>`;
}

function select(form, name, options) {
  return html`<select id=${name} aria-describedby="${name}-wrong" @change=${(e) => form.set(name, e.target.value)}>
    ${options.map(([value, text]) => html`<option value=${value} ?selected=${form.values[name] === value}>${text}</option>`)}</select>`;
}

// Where a model or a text comes from.
function source(form, prefix, label, kinds, { own = "", more = "" } = {}) {
  const from = `${prefix}.from`;
  const options = Object.entries(kinds).map(([value, [text]]) => [value, value === "model" && own ? own : text]);
  const [, fields] = kinds[form.values[from]];
  const extra = form.values[from] === "upload"
    ? field(form, `${prefix}.file`, "File (.txt, .jsonl, .parquet)",
        html`<input id="${prefix}.file" type="file" @change=${(e) => form.bring(prefix, e.target.files[0])}>`)
    : fields.map(([name, text, example]) => field(form, `${prefix}.${name}`, text,
        input(form, `${prefix}.${name}`, { placeholder: example, required: name !== "revision" })));
  return html`<fieldset><legend>${label}</legend>${field(form, from, "From", select(form, from, options))}${extra}${more}</fieldset>`;
}

function fields(form) {
  const amount = form.values.amount === "fraction"
    ? input(form, "fraction", { type: "number", min: 0.01, max: 0.9, step: 0.01 })
    : input(form, "layers", { type: "number", min: 1, step: 1 });
  const windows = html`<div class="pair">
    ${field(form, "samples", "Windows", input(form, "samples", { type: "number", min: 1, step: 1, placeholder: "128" }))}
    ${field(form, "seq_len", "Tokens per window", input(form, "seq_len", { type: "number", min: 8, step: 1, placeholder: "512" }))}</div>`;
  return html`${field(form, "name", "Name (for people)", input(form, "name", { placeholder: "smol, a fifth less" }))}
    ${source(form, "model", "Model", SOURCES)}
    <fieldset><legend>Cut</legend><div class="pair">${field(form, "amount", "How much", html`${select(form, "amount", [["fraction", "share of the layers"], ["layers", "number of layers"]])}`)}
      <div class="field"><label for=${form.values.amount}>${form.values.amount === "fraction" ? "Share, 0 to 1" : "Layers"}</label>${amount}</div></div>
      ${field(form, "strategy", "Which layers", select(form, "strategy", STRATEGIES))}</fieldset>
    ${source(form, "calibration", "Text to measure layers on", TEXTS, { more: windows })}
    <fieldset><legend>Heal</legend>${field(form, "heal", "Method", select(form, "heal", HEALS))}
      ${form.values.heal === "qlora" ? field(form, "steps", "Optimizer steps", input(form, "steps", { type: "number", min: 1, step: 1, placeholder: "from the preset" })) : ""}</fieldset>
    ${form.values.heal ? source(form, "heal", "Text to heal on", TEXTS) : ""}
    ${source(form, "eval", "Text to judge by", TEXTS, { own: "none of mine" })}
    ${field(form, "seed", "Seed", input(form, "seed", { type: "number", min: 0, step: 1 }), "Same seed, same bytes.")}`;
}

const json = (form) => html`<div class="field"><label for="spec">Spec</label>
  <textarea id="spec" rows="24" spellcheck="false" .value=${live(form.text)} aria-describedby="problems"
    @input=${(e) => { form.text = e.target.value; form.changed(); }}></textarea>
  <span class="quiet">Every field is in the <a href="/docs/">API documentation</a>.</span></div>`;

function problems(form) {
  if (!form.errors.length) return html`<div id="problems" tabindex="-1"></div>`;
  return html`<div id="problems" class="notice bad" tabindex="-1" role="alert"><strong>${form.errors.length === 1 ? "One thing is wrong" : `${form.errors.length} things are wrong`}</strong>
    <ul>${form.errors.map((e) => html`<li><code>${e.pointer || "/"}</code> ${e.message}</li>`)}</ul></div>`;
}

// What the job would come to, where the service could reckon it.
function plan({ plan: said }) {
  if (!said) return "";
  const p = said.plan;
  const fastest = said.workers.map((w) => w.seconds).filter((s) => s !== null && s !== undefined).sort((a, b) => a - b)[0];
  const cut = p && (p.least_layers === p.most_layers ? p.most_layers : `${p.least_layers} to ${p.most_layers}`);
  const change = (of) => `${of(p.base)} → ${of(p.pruned)}`;
  const facts = [
    ...(p ? [
      ["Layers cut", cut],
      ["Layers", change((c) => c.layer_count)],
      ["Parameters", change((c) => count(c.parameters))],
      ["Size", change((c) => bytes(c.size_bytes))],
      ["Memory", bytes(p.memory_bytes)],
      ["Disk", bytes(p.disk_bytes)],
    ] : []),
    ["Takes about", fastest === undefined ? "not known" : duration(fastest * 1000)],
    ["Begins", said.begins_in_s === null ? "when a worker is there" : said.begins_in_s < 1 ? "at once" : `in about ${duration(said.begins_in_s * 1000)}`],
    ["Reused", said.reusable.map((r) => r.stage).join(", ") || "nothing"],
  ];
  return html`<section class="notice good" role="status"><strong>This can be run.</strong>
    <dl class="facts">${facts.map(([name, value]) => html`<div><dt>${name}</dt><dd>${value}</dd></div>`)}</dl>
    ${p?.notes.length ? html`<ul>${p.notes.map((note) => html`<li>${note}</li>`)}</ul>` : ""}</section>`;
}

function view(form) {
  const asJson = () => {
    form.text = JSON.stringify(specOf(form.values), null, 2);
    form.changed();
  };
  const asForm = () => {
    form.text = null;
    form.changed();
  };
  return html`<div class="row spread"><h1>New job</h1>
      ${form.text === null ? html`<button @click=${asJson}>Edit as JSON</button>` : html`<button @click=${asForm}>Back to the form</button>`}</div>
    <form class="card" @submit=${(event) => form.submit(event)}>${form.text === null ? fields(form) : json(form)}
      ${form.note ? html`<p class="notice" role="status">${form.note}</p>` : ""}${problems(form)}${plan(form)}
      <p class="row"><button class="main" ?disabled=${form.sent}>${form.sent ? "Submitting…" : "Submit the job"}</button>
      <span class="quiet">Everything is checked before anything is made.</span></p></form>`;
}

export async function show(place, like) {
  const form = new Form(place);
  if (like) form.text = JSON.stringify((await get(`/v1/jobs/${encodeURIComponent(like)}`, { signal: place.signal })).spec, null, 2);
  else await get("/v1/workers", { signal: place.signal });
  form.draw();
}
