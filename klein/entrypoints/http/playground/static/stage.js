// The middle of the page: what is being drawn, then the image.

import { $, button, h, icon, say, seconds } from "./dom.js";

const urls = new WeakMap();

/** An address for a kept image, made once. */
export function urlOf(row) {
  if (!urls.has(row.blob)) urls.set(row.blob, URL.createObjectURL(row.blob));
  return urls.get(row.blob);
}

export function show(...children) {
  $("stage").replaceChildren(...children);
}

export function empty(examples, choose) {
  show(
    h(
      "div",
      { class: "empty" },
      icon("image"),
      h("h2", {}, "Say what to draw"),
      h("p", {}, "Write a prompt and press Draw", h("span", { class: "hint" }, " or Ctrl-Enter"), ", or begin with one of these.",
        h("span", { class: "hint" }, " An image dropped anywhere on the page gives its settings back.")),
      h("div", { class: "chips" }, ...examples.map((text) => button(text, () => choose(text), { class: "chip example" }))),
    ),
  );
}

/** A sentence with a capital, unless it begins with the name of a field or of klein. */
const sentence = (text) => text.replace(/^(?!klein\b)[a-z]+(?= |[’'])/, (word) => word[0].toUpperCase() + word.slice(1));

/** Why there is no image, and what to do about it; `kind` is `bad` or `canceled`. */
export function failure(kind, title, message, ...actions) {
  show(
    h(
      "div",
      { class: `empty ${kind}` },
      icon(kind === "bad" ? "warn" : "x"),
      h("h2", {}, title),
      h("p", { dir: "auto" }, sentence(message)),
      h("div", { class: "row center" }, ...actions),
    ),
  );
  say(`${title}. ${message}`, true);
}

const ordinal = (n) => (n === 1 ? "next" : `number ${n}`);

/** A figure that follows a job: { element, on(event, data), done(row) }. */
export function watch(width, height, caption) {
  const image = h("img", { alt: "Preview", hidden: true });
  const frame = h("div", { class: "frame-of-image waiting" }, image);
  frame.style.aspectRatio = `${width} / ${height}`;
  frame.style.setProperty("--ratio", width / height);
  const bar = h("progress", { max: 1, "aria-label": "Steps drawn" });
  const text = h("p", { class: "state" }, "asking klein …");
  const element = h("figure", { class: "watched" }, frame, h("figcaption", {}, caption || null, bar, text));
  const left = (data) => (data.seconds_left === null || data.seconds_left === undefined ? "" : `, ${seconds(data.seconds_left)} left`);
  const tell = (words) => {
    text.textContent = words;
    say(words);
  };
  const on = (name, data) => {
    if (name === "status" && data.status === "starting") {
      tell(data.queue_position ? `in the queue: ${ordinal(data.queue_position)}${left(data)}` : "getting ready …");
    } else if (name === "status" && data.status === "processing") {
      tell(`drawing${left(data)}`);
    } else if (name === "lost") {
      tell("the connection broke off; trying again …");
    } else if (name === "progress") {
      const of = data.images > 1 ? `image ${data.image} of ${data.images}, ` : "";
      bar.value = data.steps ? data.step / data.steps : 0;
      tell(data.stage === "fetch" ? `fetching a LoRA, ${Math.round((100 * data.step) / (data.steps || 1))} %` : `${of}step ${data.step} of ${data.steps}${left(data)}`);
    } else if (name === "preview") {
      image.src = data.url;
      image.hidden = false;
      frame.classList.remove("waiting");
    }
  };
  return { element, on, frame, image };
}

const extension = (row) => row.blob.type.split("/")[1].replace("jpeg", "jpg");
export const fileName = (row) => `klein-${row.id}-seed-${row.seed}.${extension(row)}`;

/** Images that were drawn together, one of them large, with what can be done next. */
export function result(rows, n, { select, actions, notes }) {
  const row = rows[n];
  const large = h("img", { src: urlOf(row), alt: row.parameters.prompt, class: "drawn" });
  large.style.setProperty("--ratio", row.width / row.height);
  const others = rows.length > 1
    ? h("div", { class: "strip", role: "group", "aria-label": "Images of this draw" },
        ...rows.map((each, at) =>
          h("button", { type: "button", "aria-pressed": String(at === n), onclick: () => select(at), "aria-label": `Image ${at + 1}, seed ${each.seed}` },
            h("img", { src: urlOf(each), alt: "" }))))
    : null;
  show(
    h("figure", { class: "result" }, large),
    ...(others ? [others] : []),
    h("div", { class: "row center tools-of-result", role: "toolbar", "aria-label": "With this image" },
      ...actions(row).map(([text, glyph, act, label]) => button(text, act, { glyph, class: "small", ...(label ? { label } : {}) }))),
    notes,
  );
}
