// klein over HTTP: the key, errors in one shape, jobs and their events.

import { browser, tab } from "./kept.js";

export const BASE = new URL("../", import.meta.url);
const KEY = "klein-key";
const RETRIES = 6;
const SILENCE = 40000; // klein sends something every 15 s
const LONGEST = 1000;

/** Why klein did not do something; `code` is klein's own, or one of WAYS_OUT in app.js. */
export class ApiError extends Error {
  constructor(code, message, { status = 0, field = null, retryAfter = 0 } = {}) {
    super(String(message).slice(0, LONGEST));
    Object.assign(this, { code, status, field, retryAfter });
  }

  /** Whether the same may work in a moment. */
  get passes() {
    return this.code === "offline" || this.status >= 500 || this.status === 429;
  }
}

export const key = {
  get: () => tab.get(KEY) || browser.get(KEY) || "",
  set(value, remember) {
    tab.remove(KEY);
    browser.remove(KEY);
    if (value) (remember ? browser : tab).set(KEY, value);
  },
};

/** What `work` gives; whatever breaks on the way is an ApiError, but for the caller's own abort. */
async function overTheNetwork(work) {
  try {
    return await work();
  } catch (error) {
    if (error instanceof ApiError || error.name === "AbortError") throw error;
    if (error instanceof SyntaxError) throw new ApiError("not_klein", "What answers at this address is not klein.");
    throw new ApiError("offline", "klein does not answer: check that it runs and that you are online");
  }
}

/** The answer of klein to a request, if it is a good one. Throws ApiError. */
export async function ask(path, { headers = {}, ...options } = {}) {
  const url = new URL(path.replace(/^\/+/, ""), BASE);
  if (url.origin !== BASE.origin) throw new ApiError("not_klein", `${url.origin} is not this server.`);
  const bearer = key.get() ? { authorization: `Bearer ${key.get()}` } : {};
  const answer = await overTheNetwork(() => fetch(url, { ...options, headers: { ...bearer, ...headers } }));
  if (!answer.ok) throw await refusal(answer);
  return answer;
}

async function refusal(answer) {
  let detail = {};
  try {
    detail = (await answer.json()).error || {};
  } catch {
    // a proxy's page
  }
  const { code = `http_${answer.status}`, message = answer.statusText || `status ${answer.status}`, field } = detail;
  const retryAfter = Number(answer.headers.get("retry-after")) || 0;
  return new ApiError(code, message, { status: answer.status, field, retryAfter });
}

export const get = (path) => overTheNetwork(async () => (await ask(path)).json());

export const send = (method, path, body, options = {}) =>
  overTheNetwork(async () =>
    (
      await ask(path, {
        method,
        body: JSON.stringify(body),
        headers: { "content-type": "application/json" },
        ...options,
      })
    ).json(),
  );

export const newJobId = () =>
  `page-${Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16).padStart(2, "0")).join("")}`;

const pause = (failures) => new Promise((done) => setTimeout(done, 300 * 2 ** failures));
const LAST = new Set(["completed", "failed", "canceled"]);

/**
 * Follow a job to its end and return it; `heard(name, data)` gets every event, and `lost` while
 * the connection is broken: it is taken up again after the last event. `signal` ends it.
 */
export async function follow(id, heard, signal) {
  let last = "";
  for (let failures = 0; ; ) {
    try {
      for await (const event of events(id, last, signal)) {
        failures = 0;
        last = event.id ?? last;
        heard(event.name, event.data);
        if (LAST.has(event.name)) return event.data;
      }
      const job = await get(`jobs/${id}`);
      if (LAST.has(job.status) || job.status === "succeeded") return job;
    } catch (error) {
      signal.throwIfAborted();
      if (error.status === 404) throw new ApiError("gone", "klein no longer knows this job.");
      if (error instanceof ApiError && !error.passes) throw error;
      if (++failures > RETRIES) throw error instanceof ApiError ? error : new ApiError("offline", error.message);
      heard("lost", {});
    }
    await pause(failures);
  }
}

/** The events of a job from one connection, which is given up when it stays silent. */
async function* events(id, last, signal) {
  const silent = new AbortController();
  let timer;
  const heard = () => {
    clearTimeout(timer);
    timer = setTimeout(() => silent.abort(), SILENCE);
  };
  heard();
  try {
    const headers = last ? { "last-event-id": last } : {};
    const answer = await ask(`jobs/${id}/events`, { headers, signal: AbortSignal.any([signal, silent.signal]) });
    if (answer.status === 204) return;
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let text = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      heard();
      text += value.replaceAll("\r", "");
      const blocks = text.split("\n\n");
      text = blocks.pop();
      yield* blocks.map(parse).filter(Boolean);
    }
  } finally {
    clearTimeout(timer);
  }
}

function parse(block) {
  const fields = { data: [] };
  for (const line of block.split("\n")) {
    const [, name, value] = line.match(/^(\w+): ?(.*)$/s) || [];
    if (name === "data") fields.data.push(value);
    else if (name) fields[name] = value;
  }
  if (!fields.data.length) return null;
  return { id: fields.id, name: fields.event, data: JSON.parse(fields.data.join("\n")) };
}

async function blob(url) {
  for (let failures = 0; ; ) {
    try {
      return await overTheNetwork(async () => (await ask(url)).blob());
    } catch (error) {
      if (!error.passes || ++failures > RETRIES) throw error;
    }
    await pause(failures);
  }
}

/** The images of a finished job as blobs, each with what is told of it. */
export const images = (job) =>
  Promise.all(job.output.images.map(async (image) => ({ ...image, blob: await blob(image.url) })));
