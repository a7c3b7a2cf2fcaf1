// klein over HTTP: the key, errors in one shape, jobs and their events.

export const BASE = new URL("../", import.meta.url);
const KEY = "klein-key";
const RETRIES = 6;

/** Why klein did not do something; `code` is klein's own, or `offline`. */
export class ApiError extends Error {
  constructor(code, message, { status = 0, field = null, retryAfter = 0 } = {}) {
    super(message);
    Object.assign(this, { code, status, field, retryAfter });
  }
}

export const key = {
  get: () => sessionStorage.getItem(KEY) || localStorage.getItem(KEY) || "",
  set(value, remember) {
    key.forget();
    if (value) (remember ? localStorage : sessionStorage).setItem(KEY, value);
  },
  forget() {
    sessionStorage.removeItem(KEY);
    localStorage.removeItem(KEY);
  },
};

/** The answer of klein to a request, if it is a good one. Throws ApiError. */
export async function ask(path, { headers = {}, ...options } = {}) {
  const bearer = key.get() ? { authorization: `Bearer ${key.get()}` } : {};
  let answer;
  try {
    const url = new URL(path.replace(/^\//, ""), BASE);
    answer = await fetch(url, { ...options, headers: { ...bearer, ...headers } });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("offline", "klein does not answer: check that it runs and that you are online");
  }
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
  const { code = `http_${answer.status}`, message = answer.statusText, field } = detail;
  const retryAfter = Number(answer.headers.get("retry-after")) || 0;
  return new ApiError(code, message, { status: answer.status, field, retryAfter });
}

export const get = async (path) => (await ask(path)).json();

export const post = async (path, body, options = {}) =>
  (
    await ask(path, {
      method: "POST",
      body: JSON.stringify(body),
      headers: { "content-type": "application/json" },
      ...options,
    })
  ).json();

const LAST = new Set(["completed", "failed", "canceled"]);

/**
 * Follow a job to its end and return it; `heard(name, data)` gets every event. A stream that
 * breaks off is taken up again after the last event.
 */
export async function follow(id, heard) {
  let last = "";
  for (let failures = 0; ; ) {
    try {
      const answer = await ask(`jobs/${id}/events`, {
        headers: last ? { "last-event-id": last } : {},
      });
      if (answer.status === 204) return await get(`jobs/${id}`);
      for await (const event of events(answer.body)) {
        failures = 0;
        last = event.id;
        heard(event.name, event.data);
        if (LAST.has(event.name)) return event.data;
      }
    } catch (error) {
      if (error instanceof ApiError && error.code !== "offline" && error.status < 500) throw error;
      if (++failures > RETRIES) throw error;
    }
    await new Promise((done) => setTimeout(done, 300 * 2 ** failures));
  }
}

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value.replaceAll("\r", "");
    const blocks = text.split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const event = parse(block);
      if (event) yield event;
    }
  }
}

function parse(block) {
  const fields = { data: [] };
  for (const line of block.split("\n")) {
    const [, name, value] = line.match(/^(\w+): ?(.*)$/) || [];
    if (name === "data") fields.data.push(value);
    else if (name) fields[name] = value;
  }
  if (!fields.data.length) return null;
  return { id: fields.id, name: fields.event, data: JSON.parse(fields.data.join("\n")) };
}

/** The images of a finished job as blobs, each with what is told of it. */
export const images = (job) =>
  Promise.all(
    job.output.images.map(async (image) => ({
      ...image,
      blob: await (await ask(image.url)).blob(),
    })),
  );
