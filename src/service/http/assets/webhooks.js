// Receivers of webhooks: who hears of jobs, what was sent them, and what became of it.

import { html } from "./vendor/lit-html.js";
import { Refused, get, post, remove } from "./api.js";
import { confirm, say, watch } from "./page.js";
import { ago, duration, moment } from "./words.js";

const STATES = ["queued", "running", "paused", "succeeded", "failed", "cancelled"];
const AT = "/v1/webhook_endpoints";

const time = (at) => html`<time datetime=${at} title=${moment(at)}>${ago(at)}</time>`;
const wanted = (endpoint) => (endpoint.events.length ? endpoint.events.join(", ") : "every state");

// A secret that has just been made. It is in this page only, and gone with it.
const secret = (text) => html`<section class="notice" role="status"><h2>The secret</h2>
  <p>Messages are signed with it. It is shown now and never again: copy it to the receiver.</p>
  <p class="row"><code id="secret">${text}</code> <button @click=${() => copy(text)}>Copy</button></p></section>`;

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    say("The secret is copied.");
  } catch {
    say("The browser does not allow to copy; select the secret instead.");
  }
}

class Form {
  constructor(place) {
    this.place = place;
    this.wrong = {};
    this.problem = null;
  }

  async send(event) {
    event.preventDefault();
    const form = event.target;
    const given = new FormData(form);
    const words = (name) => given.get(name).trim() || undefined;
    const asked = { url: words("url") ?? "", events: given.getAll("events"), description: words("description"), format: given.get("format") };
    this.wrong = {};
    this.problem = null;
    try {
      const made = await post(AT, asked);
      fresh.set(made.id, made.secret);
      location.hash = `#/webhooks/${made.id}`;
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      for (const { pointer, message } of error.problem.errors ?? []) this.wrong[pointer.split("/")[1]] = message;
      this.problem = Object.keys(this.wrong).length ? null : error;
      this.draw();
      form.querySelector("[aria-invalid=true]")?.focus();
    }
  }

  field(name, label, input) {
    const wrong = this.wrong[name];
    return html`<div class="field"><label for=${name}>${label}</label>${input(wrong ? "true" : "false", `${name}-wrong`)}
      <span class="bad" id=${`${name}-wrong`}>${wrong ?? ""}</span></div>`;
  }

  draw() {
    const box = (state) => html`<label class="box"><input type="checkbox" name="events" value=${`job.${state}`}> ${state}</label>`;
    this.place.draw(html`<h1>Webhooks</h1>
      <p>Receivers hear of each state a job comes to, signed by <a href="https://www.standardwebhooks.com">Standard Webhooks</a>.</p>
      ${this.endpoints.length ? list(this.endpoints) : html`<p class="notice">There is no receiver yet.</p>`}
      <form class="card" @submit=${(event) => this.send(event).catch(this.place.fail)}><h2>Add a receiver</h2>
        ${this.problem ? html`<p class="bad" role="alert">${this.problem.message}</p>` : ""}
        ${this.field("url", "URL", (wrong, by) => html`<input id="url" name="url" type="url" required placeholder="https://example.com/hooks/secateur"
          aria-invalid=${wrong} aria-describedby=${by}>`)}
        <fieldset><legend>Tell of these states; of all when none is chosen</legend><div class="row">${STATES.map(box)}</div></fieldset>
        <div class="pair">
          ${this.field("format", "Form of the messages", (wrong, by) => html`<select id="format" name="format" aria-invalid=${wrong} aria-describedby=${by}>
            <option value="standard">Standard Webhooks</option><option value="cloudevents">CloudEvents 1.0</option></select>`)}
          ${this.field("description", "Description", (wrong, by) => html`<input id="description" name="description" aria-invalid=${wrong} aria-describedby=${by}>`)}
        </div>
        <p><button class="main">Add it</button></p></form>`);
  }
}

// Secrets that the next page shows, by endpoint.
const fresh = new Map();

const list = (endpoints) => html`<table class="list"><thead><tr>
  ${["Receiver", "Hears of", "Form", "Since"].map((name) => html`<th scope="col">${name}</th>`)}</tr></thead><tbody>
  ${endpoints.map((endpoint) => html`<tr>
    <td data-name="Receiver"><a href=${`#/webhooks/${endpoint.id}`}>${endpoint.url}</a> <span class="quiet">${endpoint.description ?? ""}</span></td>
    <td data-name="Hears of">${wanted(endpoint)}</td><td data-name="Form">${endpoint.format}</td>
    <td data-name="Since">${time(endpoint.created_at)}</td></tr>`)}</tbody></table>`;

export async function all(place) {
  const form = new Form(place);
  form.endpoints = (await get(AT, { signal: place.signal })).data;
  form.draw();
}

const COLOURS = { delivered: "succeeded", waiting: "queued", given_up: "failed" };

class Shown {
  constructor(place, id) {
    this.place = place;
    this.id = id;
    this.at = `${AT}/${id}`;
    this.secret = fresh.get(id);
    this.problem = null;
    fresh.delete(id);
  }

  async look() {
    const { signal } = this.place;
    [this.endpoint, this.sent] = await Promise.all([get(this.at, { signal }), get(`${this.at}/deliveries?limit=50`, { signal })]);
    this.draw();
  }

  act(path, said) {
    return async () => {
      this.problem = null;
      try {
        const answer = await post(`${this.at}/${path}`);
        this.secret = answer.secret ?? this.secret;
        say(said);
        await this.look();
      } catch (error) {
        this.problem = error;
        this.draw();
      }
    };
  }

  async rotate() {
    const text = "Messages are signed with the old and the new secret for a day; then the old one is gone.";
    if (await confirm("Make a new secret?", text, "Make a new one")) await this.act("rotate", "There is a new secret.")();
  }

  async delete() {
    const text = "The receiver hears nothing more, and what was sent it is forgotten.";
    if (!(await confirm("Delete this receiver?", text, "Delete it"))) return;
    try {
      await remove(this.at);
      location.hash = "#/webhooks";
    } catch (error) {
      this.problem = error;
      this.draw();
    }
  }

  row(message) {
    const last = message.tries.at(-1);
    const answer = last ? html`${last.error ?? `answered ${last.status}`} <span class="quiet">in ${duration(last.duration_ms)}</span>` : "";
    const next = message.next_try_at && new Date(message.next_try_at) > Date.now() ? html`, again ${moment(message.next_try_at)}` : "";
    return html`<tr>
      <td data-name="State"><span class="badge ${COLOURS[message.state]}">${message.state.replace("_", " ")}</span></td>
      <td data-name="Message">${message.job_id ? html`<a href=${`#/jobs/${message.job_id}`}>${message.type}</a>` : message.type}</td>
      <td data-name="When">${time(message.created_at)}</td>
      <td data-name="Tries">${message.tries.length}${next}</td>
      <td data-name="Last answer" class="answer">${answer}</td>
      <td><details><summary>Body</summary><pre tabindex="0">${message.body}</pre></details></td>
      <td><button @click=${this.act(`deliveries/${message.id}/redeliver`, "It is sent again.")}>Send again</button></td></tr>`;
  }

  draw() {
    const { endpoint, sent } = this;
    const names = ["State", "Message", "When", "Tries", "Last answer", "Body"];
    const table = html`<div class="scroll"><table class="list"><thead><tr>${names.map((name) => html`<th scope="col">${name}</th>`)}
      <th scope="col"><span class="sr">Send again</span></th></tr></thead><tbody>${sent.data.map((message) => this.row(message))}</tbody></table></div>`;
    this.place.draw(html`<p class="back"><a href="#/webhooks">All receivers</a></p>
      <div class="row spread"><h1 class="url">${endpoint.url}</h1><p class="row">
        <button class="main" @click=${this.act("ping", "A ping is on its way.")}>Ping</button>
        <button @click=${() => this.rotate()}>New secret</button>
        <button class="danger" @click=${() => this.delete()}>Delete</button></p></div>
      ${this.problem ? html`<p class="notice bad" role="alert">${this.problem.message}</p>` : ""}
      ${this.secret ? secret(this.secret) : ""}
      <dl class="facts">${[
        ["Hears of", wanted(endpoint)], ["Form", endpoint.format], ["Since", time(endpoint.created_at)],
        ...(endpoint.description ? [["Description", endpoint.description]] : []),
        ...(endpoint.rotating ? [["Secrets", "two, for a day"]] : []),
      ].map(([name, value]) => html`<div><dt>${name}</dt><dd>${value}</dd></div>`)}</dl>
      <h2>Deliveries</h2>${sent.data.length ? table : html`<p class="notice">Nothing was sent yet.</p>`}`);
  }
}

export async function show(place, id) {
  const shown = new Shown(place, encodeURIComponent(id));
  await watch(place, 2000, () => shown.look());
}
