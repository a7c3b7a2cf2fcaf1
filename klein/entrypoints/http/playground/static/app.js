// The page: connects to klein, draws, and hands images from one part to the next.

import { ApiError, ask, follow, get, images, key, newJobId, send } from "./api.js";
import { compare } from "./compare.js";
import * as details from "./details.js";
import { $, button, dialog, download, h, say, toast } from "./dom.js";
import { Edit, dataUrl } from "./edit.js";
import { Form } from "./form.js";
import { Gallery } from "./gallery.js";
import { browser, tab } from "./kept.js";
import { Loras } from "./loras.js";
import { fitting, settingsIn } from "./metadata.js";
import * as stage from "./stage.js";
import { Sweep, strip } from "./sweep.js";

const POLL = 2000;
const JOB = "klein-job";
const DRAFT = "klein-draft";
const NOTE = 100000; // characters of a request that is noted down
const MAX_FILE = 100e6;
const DOUBLE_CLICK = 500;
const EXAMPLES = {
  nano: [
    "a smiling woman with red hair, green eyes and a blue hat, on a yellow background",
    "portrait of a man with spiky green hair, sunglasses and a purple hoodie, pink background with dots",
    "a laughing girl with a brown ponytail, freckles and a white scarf, on a blue background with rays",
  ],
  other: [
    "portrait of a woman with freckles in the light of a window, 85mm photograph",
    "a lighthouse on a cliff in a storm, wide cinematic photograph",
    "a ceramic teapot shaped like a fox on a wooden table, soft daylight",
  ],
};

let routes = [];
let capabilities = null;
let running = null; // { id, stop } of the job that is drawn; `stop` aborts its requests
let shown = null; // the image that is open
let assembled = false; // whether every part of the page exists

const changed = () => assembled && refresh();
const form = new Form(changed);
const loras = new Loras(changed);
const edit = new Edit(changed);
const gallery = new Gallery({ open: (row) => open([row], 0), compare: sideBySide });
const sweep = new Sweep({ read: checked, start: drawStrip });
assembled = true;

/** Words and offers that depend on more than one part. */
function refresh() {
  const chosen = loras.read();
  sweep.refresh({ loras: chosen, init_image: edit.init });
  const fromImage = edit.init !== null || edit.images.length > 0;
  if (form.fromImage !== fromImage) {
    form.fromImage = fromImage;
    form.tell();
  }
  const prompt = $("prompt").value.toLowerCase();
  const missing = loras.words().filter((word) => !prompt.includes(word.toLowerCase()));
  $("triggers").replaceChildren(
    ...missing.map((word) => button(word, () => useWord(word), { glyph: "plus", class: "chip", title: "Put this trigger word into the prompt" })),
  );
}

function useWord(word) {
  const prompt = $("prompt").value.trim();
  $("prompt").value = prompt ? `${word}, ${prompt}` : word;
  $("prompt").focus();
  refresh();
}

function read() {
  const chosen = loras.read();
  return { ...form.read(), ...(chosen.length ? { loras: chosen } : {}), ...edit.read() };
}

/** The request, or null after saying what it lacks. */
function checked() {
  if (!$("prompt").value.trim()) {
    toast("Say what to draw first.", "bad");
    $("prompt").focus();
    return null;
  }
  const wrong = form.fault();
  const fault = wrong || edit.fault();
  if (fault) {
    if (!wrong) $("edit").open = true;
    toast(fault, "bad");
    return null;
  }
  return read();
}

async function fill(input) {
  form.fill(input);
  loras.fill(input.loras);
  await edit.fill(input);
}

// -- drawing ------------------------------------------------------------------------------------

function sizeOf(input) {
  const { width, height } = input;
  return width && height ? [width, height] : form.presetSize();
}

/** Draw a request to its end; returns the rows of its images. Throws ApiError. */
const draw = (input, view, label) => {
  const id = newJobId();
  return finish(id, input, view, label, (signal) => send("PUT", `jobs/${id}`, { input }, { signal }));
};

async function finish(id, input, view, label, start = () => {}) {
  const stop = new AbortController();
  running = { id, stop };
  try {
    await start(stop.signal);
    tab.set(JOB, JSON.stringify({ id, input: slim(input) }));
    const job = await follow(id, view.on, stop.signal);
    if (job.status === "canceled") throw CANCELED;
    if (job.status !== "succeeded") throw new ApiError(job.error.code, job.error.message, job.error);
    return await rowsOf(job, input, label);
  } finally {
    tab.remove(JOB);
    running = null;
  }
}

const CANCELED = new ApiError("canceled", "You cancelled it.");

/** A request without its images where they are too much for a note. */
function slim(input) {
  if (JSON.stringify(input).length < NOTE) return input;
  const { images: _, init_image, mask, extend, ...rest } = input;
  return JSON.stringify(rest).length < NOTE ? rest : { prompt: "" };
}

async function rowsOf(job, input, label) {
  const { parameters, loras: reports, warnings, timings, model } = job.output;
  return (await images(job)).map(({ blob, seed, width, height, unchanged_pixels }, n) => ({
    id: `${job.id}-${n}`,
    time: Date.now(),
    blob, input, label, seed, width, height, unchanged_pixels, parameters, warnings, timings,
    loras: reports,
    model: { name: model.name, speed: model.speed },
  }));
}

function busy(on) {
  if (on) exchange($("draw"), $("cancel"), true);
  else exchange($("cancel"), $("draw"), $("cancel").disabled);
  $("hint").textContent = on ? "Esc" : "Ctrl ↵";
  sweep.go.disabled = on;
  $("stage").setAttribute("aria-busy", String(on));
  document.title = on ? "drawing … klein" : "klein";
}

/** Put one button in the other's place; where that was `clicked`, a double click's second half does nothing. */
function exchange(old, next, clicked) {
  const focused = document.activeElement === old;
  old.hidden = true;
  next.hidden = false;
  next.disabled = clicked;
  setTimeout(() => {
    next.disabled = false;
    if (focused && document.activeElement === document.body) next.focus();
  }, clicked ? DOUBLE_CLICK : 0);
}

/** Run `work` with the page busy, and show how it failed if it does. */
async function whileBusy(work, again, kept = () => "") {
  busy(true);
  gallery.mark(null);
  try {
    await work();
  } catch (error) {
    explain(error, again, kept());
  } finally {
    busy(false);
  }
}

function drawOnce() {
  const input = checked();
  if (!input || running || $("draw").hidden) return;
  whileBusy(() => show(input, (view) => draw(input, view)), drawOnce);
}

/** Bring the stage into view where it is out of it, as it is on a phone. */
function toStage() {
  const { top, bottom } = $("stage").getBoundingClientRect();
  if (bottom < innerHeight / 3 || top > innerHeight / 3) $("stage").scrollIntoView({ block: "start" });
}

async function show(input, work) {
  const view = stage.watch(...sizeOf(input));
  stage.show(view.element);
  details.show(null);
  toStage();
  const rows = await work(view);
  form.drawn(rows[0].seed);
  await gallery.add(rows);
  open(rows, 0);
  say(`Drawn in ${rows[0].timings.total.toFixed(1)} seconds, seed ${rows[0].seed}.`, true);
}

function drawStrip(runs) {
  if (running || $("draw").hidden) return;
  let drawnOf = 0;
  const kept = () => (drawnOf ? `${drawnOf} of ${runs.length} were drawn before; they are in the gallery.` : "");
  whileBusy(async () => {
    const row = strip(runs, sizeOf(runs[0].input), (each) => open([each], 0));
    details.show(null);
    toStage();
    for (const [n, { input, label }] of runs.entries()) {
      const [drawn] = await draw(input, row.views[n], label);
      row.done(n, drawn);
      form.drawn(drawn.seed);
      await gallery.add([drawn]);
      drawnOf = n + 1;
    }
    say(`The strip of ${runs.length} is drawn.`, true);
  }, () => drawStrip(runs), kept);
}

async function cancel() {
  if (!running) return;
  const { id, stop } = running;
  $("cancel").disabled = true;
  try {
    await send("POST", `jobs/${id}/cancel`, {});
  } catch (error) {
    if (error.status === 409) return; // it was over already
    if (error.status === 404) return unsend(id, stop);
    $("cancel").disabled = false;
    toast(error.message, "bad");
  }
}

/** Cancel a job that klein does not know: it is still on its way there, or klein was restarted. */
function unsend(id, stop) {
  stop.abort(CANCELED);
  setTimeout(() => send("POST", `jobs/${id}/cancel`, {}).catch(() => {}), 2000); // it may have come through
}

/** [title, what to do] of each error that has more to say than its message. */
const WAYS_OUT = {
  canceled: ["Cancelled", "Nothing was kept of it."],
  gone: ["klein no longer knows this job", "It was restarted meanwhile, or the job was too long ago. Draw it again."],
  http_413: ["That is too much for this server", "Use smaller or fewer images."],
  queue_full: ["The queue is full", "Others are drawing: try again in a moment."],
  not_ready: ["klein is not ready", "The model is still loading."],
  offline: ["klein does not answer", "Check that it runs and that you are online; your settings stay here."],
  refused_by_filter: ["Refused by this server’s filter", null],
  filter_failed: ["This server’s filter failed", null],
  unauthorized: ["This server wants a key", "Ask whoever runs it, then enter the key here."],
};

function explain(error, again, kept) {
  if (!(error instanceof ApiError)) {
    stage.failure("bad", "This page made a mistake", `${error.message}. Reload it; your gallery stays.`);
    throw error;
  }
  const [title, way] = WAYS_OUT[error.code] || ["That did not work", null];
  const canceled = error.code === "canceled";
  const retry = again ? [button(canceled ? "Draw it again" : "Try again", again, { class: "primary" })] : [];
  if (error.code === "unauthorized") askForKey(key.get() ? WRONG_KEY : "");
  if (error.code === "offline" || error.code === "not_ready") connect();
  const wait = error.retryAfter ? `klein suggests ${error.retryAfter} s.` : "";
  const told = canceled && kept ? [kept] : [way || error.message, wait, kept];
  stage.failure(canceled ? "canceled" : "bad", title, told.filter(Boolean).join(" "), ...retry);
}

// -- images -------------------------------------------------------------------------------------

function open(rows, n) {
  shown = rows[n];
  stage.result(rows, n, { select: (at) => open(rows, at), actions: actionsOf, notes: details.notes(shown) });
  details.show(shown, routes);
  gallery.mark(shown);
  toStage();
}

function actionsOf(row) {
  const settings = { ...row.input, seed: row.seed, num_images: undefined };
  const useSettings = async () => {
    if (await edit.guard(() => fill(settings).then(() => true))) toast("Its settings are in the form");
  };
  return [
    ["Download", "download", () => download(row.blob, stage.fileName(row))],
    ["Edit this", "brush", () => useAs("init", row.blob)],
    ["As reference", "image", () => useAs("reference", row.blob)],
    ["Use settings", "reuse", useSettings],
    ...(gallery.rows.length > 1 ? [["Compare with …", "compare", () => gallery.pick(row)]] : []),
    [null, "trash", () => discard(row), "Delete from the gallery"],
  ];
}

async function discard(row) {
  await gallery.remove(row);
  const [next] = gallery.rows;
  if (next) open([next], 0);
  else welcome();
}

async function useAs(kind, blob) {
  await edit.guard(async () => {
    const url = await dataUrl(blob);
    if (kind === "init") await edit.start(url);
    else edit.reference(url);
    $("edit").open = true;
    $("edit").scrollIntoView({ block: "start" });
    $("edit").querySelector("summary").focus({ preventScroll: true });
  });
}

function sideBySide(a, b) {
  details.show(null);
  compare(a, b, { back: () => open([a], 0), swap: () => sideBySide(b, a) });
  toStage();
}

/** A file that was dropped or pasted: offers its settings, or itself. */
async function take(file) {
  if (file.size > MAX_FILE) return toast(`That file is over ${MAX_FILE / 1e6} MB.`, "bad");
  const found = capabilities && (await settingsIn(file));
  const url = await dataUrl(file).catch(() => null);
  if (!url && !found) return toast("That file is not an image that this browser can read.", "bad");
  const act = (work) => () => (box.close(), work());
  const box = dialog(
    "An image",
    url ? h("img", { src: url, alt: "", class: "offered" }) : null,
    ...(found ? offer(found, act) : [h("p", {}, "It has no settings inside.")]),
    url
      ? h("div", { class: "row wrap" },
          button("Edit it", act(() => useAs("init", file)), { glyph: "brush" }),
          button("As reference", act(() => useAs("reference", file)), { glyph: "image" }))
      : null,
  );
}

/** What of a dialog says which settings a file has. */
function offer({ input: claimed, own, missing }, act) {
  if (!claimed) return [h("p", {}, "klein drew it, on a server that keeps prompts and settings out of its files: it cannot be drawn again from this one.")];
  const [input, refused] = fitting(claimed, capabilities.request);
  if (!own) for (const lora of input.loras || []) lora.path = loras.known(lora.path);
  const lack = (text, names) => (names.length ? h("p", { class: "help" }, `${text}: ${names.join(", ")}.`) : null);
  return [
    h("p", {}, own ? "klein drew it:" : "Another program drew it:"),
    h("blockquote", { dir: "auto" }, input.prompt?.slice(0, 400) || "an empty prompt"),
    lack("Not in the file", missing),
    lack("Not taken, since this server would refuse it", refused),
    h("div", { class: "row" }, button("Use its settings", act(() => fill(input)), { class: "primary", glyph: "reuse" })),
  ];
}

const imageIn = (list) => [...(list || [])].find((file) => file.type.startsWith("image/"));

function listenForImages() {
  const zone = $("dropzone");
  let depth = 0;
  const over = (by) => {
    depth = by === 0 ? 0 : Math.max(0, depth + by);
    zone.hidden = depth === 0;
  };
  addEventListener("dragenter", (event) => event.dataTransfer?.types.includes("Files") && over(1));
  addEventListener("dragleave", (event) => event.dataTransfer?.types.includes("Files") && over(-1));
  addEventListener("dragover", (event) => event.preventDefault());
  addEventListener("klein-dropped", () => over(0));
  addEventListener("drop", (event) => {
    event.preventDefault();
    over(0);
    const files = event.dataTransfer?.files;
    const file = imageIn(files) || files?.[0];
    if (file) take(file);
  });
  addEventListener("paste", (event) => {
    const file = imageIn(event.clipboardData?.files);
    if (!file) return;
    event.preventDefault();
    take(file);
  });
}

// -- the connection -----------------------------------------------------------------------------

function banner(text, ...actions) {
  $("banner").hidden = !text;
  $("banner").replaceChildren(text, ...actions);
}

const WRONG_KEY = "That key is not one of this server’s.";
/** [state, banner] while the page waits. */
const WAITS = {
  offline: ["offline", "klein does not answer. This page goes on trying."],
  not_klein: ["not klein", "What answers at this address is not klein. This page goes on trying."],
  not_ready: ["loading", "The model is loading; this page goes on by itself."],
};
let connecting = null;

/** Wait until klein is ready and take its tables; only one such wait at a time. */
function connect() {
  connecting ??= untilReady().finally(() => (connecting = null));
  return connecting;
}

async function untilReady() {
  for (;;) {
    try {
      await ask("readyz");
      await takeTables();
      return banner("");
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      if (error.code === "unauthorized") {
        $("model").textContent = "a key is needed";
        banner("This server wants a key.", button("Enter it", () => askForKey(), { class: "small" }));
        return askForKey(key.get() ? WRONG_KEY : "");
      }
      const [state, told] = WAITS[error.code] || WAITS.not_ready;
      $("model").textContent = state;
      banner(told);
      await new Promise((done) => setTimeout(done, POLL));
    }
  }
}

async function takeTables() {
  const [told, presets, found, openapi] = await Promise.all(["capabilities", "presets", "loras", "openapi.json"].map(get));
  const first = !capabilities;
  capabilities = told;
  routes = Object.keys(openapi.paths);
  form.connect(told, presets);
  loras.connect(told, found.loras);
  edit.connect(told);
  const { model } = told;
  $("model").replaceChildren(
    ...(model
      ? [h("strong", {}, model.name), ` · ${model.speed} · ${model.device}`, h("span", { class: "license" }, ` · ${model.license}`)]
      : ["ready"]),
  );
  $("model").title = model?.speed_why || "";
  refresh();
  if (!shown && !running && !$("draw").hidden) welcome();
  if (first) takeUp();
}

function welcome() {
  shown = null;
  details.show(null);
  const examples = EXAMPLES[capabilities?.model?.name] || EXAMPLES.other;
  stage.empty(examples, (text) => {
    $("prompt").value = text;
    refresh();
    drawOnce();
  });
}

function askForKey(why = "") {
  if (document.querySelector("dialog[open]")) return;
  const input = h("input", { id: "key", type: "password", autocomplete: "current-password", value: key.get() });
  const remember = h("input", { type: "checkbox", id: "remember" });
  const save = (event) => {
    event.preventDefault();
    key.set(input.value.trim(), remember.checked);
    box.close();
    connect();
  };
  const box = dialog(
    "Key",
    h("form", { onsubmit: save },
      why ? h("p", { class: "bad-text", role: "alert" }, why) : null,
      h("div", { class: "field" }, h("label", { for: "key" }, "Key of this server"), input,
        h("p", { class: "help" }, "From KLEIN_API_KEYS; it is sent to this server only.")),
      h("label", { class: "check" }, remember, "Remember it in this browser"),
      h("div", { class: "row" }, h("button", { type: "submit", class: "primary" }, "Use it"))),
  );
  input.focus();
}

/** After a reload: what was being written, and the job that was under way. */
function takeUp() {
  const draft = tab.read(DRAFT);
  if (draft && !$("prompt").value) {
    const [input] = fitting(draft.input, capabilities.request);
    form.fill(input);
    form.lock(draft.locked);
    loras.fill(input.loras);
  }
  const note = tab.read(JOB);
  if (note) whileBusy(() => show(note.input, (view) => finish(note.id, note.input, view)), drawOnce);
}

function noteDraft() {
  if (capabilities) tab.set(DRAFT, JSON.stringify({ input: slim({ ...form.read(), loras: loras.read() }), locked: form.locked }));
}

function toggleTheme() {
  const dark = getComputedStyle(document.documentElement).getPropertyValue("--is-dark").trim() === "1";
  document.documentElement.dataset.theme = dark ? "light" : "dark";
  browser.set("klein-theme", document.documentElement.dataset.theme);
}

$("controls").addEventListener("submit", (event) => {
  event.preventDefault();
  drawOnce();
});
$("cancel").addEventListener("click", cancel);
$("key-button").addEventListener("click", () => askForKey());
$("theme-button").addEventListener("click", toggleTheme);
addEventListener("keydown", (event) => {
  if (document.querySelector("dialog[open]")) return;
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    drawOnce();
  } else if (event.key === "Escape" && running) {
    cancel();
  }
});
addEventListener("online", connect);
addEventListener("offline", connect);
addEventListener("pagehide", noteDraft);
listenForImages();
await gallery.load();
await connect();
