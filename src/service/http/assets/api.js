// The public API, called as any other client would. A key, if the service wants one, lives in this tab only.

const KEY = "secateur.key";

export class Refused extends Error {
  constructor(status, problem) {
    super(problem.detail || problem.title || `The service answered ${status}.`);
    this.status = status;
    this.problem = problem;
  }
}

export const key = {
  get: () => sessionStorage.getItem(KEY),
  set: (value) => sessionStorage.setItem(KEY, value),
  drop: () => sessionStorage.removeItem(KEY),
};

function headers(more) {
  const all = new Headers(more);
  if (key.get()) all.set("Authorization", `Bearer ${key.get()}`);
  return all;
}

// Any call; throws what the service refuses.
export async function call(path, options = {}) {
  const response = await fetch(path, { ...options, headers: headers(options.headers), credentials: "omit" });
  if (response.ok || response.status === 304) return response;
  const text = await response.text();
  let problem = { detail: text.slice(0, 300) };
  try {
    problem = JSON.parse(text);
  } catch {
    // Something between us and the service answered; its words must do.
  }
  throw new Refused(response.status, problem);
}

export const get = async (path, options) => (await call(path, options)).json();

export async function post(path, body, more = {}) {
  const options = { method: "POST", headers: { ...more } };
  if (body !== undefined) {
    options.body = typeof body === "string" ? body : JSON.stringify(body);
    options.headers["Content-Type"] = "application/json";
  }
  const response = await call(path, options);
  return response.status === 204 ? null : response.json();
}

export const remove = (path) => call(path, { method: "DELETE" });

// Server-sent events by fetch, for EventSource cannot send a key. Goes on where it broke off until `signal` or the
// event `end`.
export async function follow(path, after, signal, tell) {
  let last = after;
  let wait = 1000;
  while (!signal.aborted) {
    try {
      const response = await call(`${path}?after=${last}`, { headers: { Accept: "text/event-stream" }, signal });
      const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
      let rest = "";
      for (;;) {
        const { done, value } = await reader.read();
        if (done) break;
        wait = 1000;
        const blocks = (rest + value).split("\n\n");
        rest = blocks.pop();
        for (const block of blocks) {
          const event = read(block);
          if (!event) continue;
          if (event.id) last = event.id;
          if (event.name === "end") return tell("end", {});
          tell(event.name, JSON.parse(event.data));
        }
      }
    } catch (error) {
      if (signal.aborted) return;
      if (error instanceof Refused && error.status < 500) throw error;
    }
    await new Promise((again) => setTimeout(again, wait));
    wait = Math.min(wait * 2, 15000);
  }
}

function read(block) {
  const event = { name: "message", data: "" };
  for (const line of block.split("\n")) {
    const at = line.indexOf(":");
    if (at < 1) continue;
    const value = line.slice(at + 1).replace(/^ /, "");
    if (line.startsWith("event:")) event.name = value;
    else if (line.startsWith("data:")) event.data += value;
    else if (line.startsWith("id:")) event.id = value;
  }
  return event.data ? event : null;
}

// Saves a file. Without a key the browser fetches it itself; with one it comes through here, straight to the disk
// where the browser can do that.
export async function save(path, name) {
  if (!key.get()) return saveAs(path, name);
  if (window.showSaveFilePicker) {
    const file = await window.showSaveFilePicker({ suggestedName: name });
    const response = await call(path);
    return response.body.pipeTo(await file.createWritable());
  }
  const url = URL.createObjectURL(await (await call(path)).blob());
  saveAs(url, name);
  setTimeout(() => URL.revokeObjectURL(url), 60000);
}

function saveAs(url, name) {
  const link = document.createElement("a");
  link.href = url;
  link.download = name;
  link.click();
}

// Brings a file of this computer to the service, in parts that prove themselves.
export async function upload(file, tell) {
  if (!crypto.subtle) throw new Error("Browsers compute digests on https and localhost only; name a path instead.");
  tell("reading the file");
  const bytes = await file.arrayBuffer();
  const digest = async (part) => hex(await crypto.subtle.digest("SHA-256", part));
  const begun = await post("/v1/uploads", { name: file.name, size_bytes: file.size, sha256: await digest(bytes) });
  for (let number = 1; number <= begun.part_count; number++) {
    tell(`part ${number} of ${begun.part_count}`);
    const part = bytes.slice((number - 1) * begun.part_size_bytes, number * begun.part_size_bytes);
    const sum = btoa(String.fromCharCode(...new Uint8Array(await crypto.subtle.digest("SHA-256", part))));
    await call(`/v1/uploads/${begun.id}/parts/${number}`, {
      method: "PUT",
      headers: { "Content-Digest": `sha-256=:${sum}:` },
      body: part,
    });
  }
  return post(`/v1/uploads/${begun.id}/complete`);
}

const hex = (buffer) => [...new Uint8Array(buffer)].map((b) => b.toString(16).padStart(2, "0")).join("");
