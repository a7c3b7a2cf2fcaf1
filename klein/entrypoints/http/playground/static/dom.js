// Small helpers to build the page: elements, icons, announcements, dialogs.

/** An element with attributes, `on…` listeners and children; strings become text, never HTML. */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "value" || name === "checked" || name === "disabled") element[name] = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

export const $ = (id) => document.getElementById(id);

const SVG = "http://www.w3.org/2000/svg";

export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("class", "i");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

/** A button with an icon and a text, or with `label` as the name of the bare icon. */
export function button(text, onclick, { glyph, label, ...attributes } = {}) {
  const named = label ? { "aria-label": label, title: label } : {};
  return h(
    "button",
    { type: "button", class: text ? "" : "square", ...named, ...attributes, onclick },
    glyph ? icon(glyph) : null,
    text || null,
  );
}

let said = 0;

/** Tell a screen reader; at most every two seconds unless it is `urgent`. */
export function say(text, urgent = false) {
  if (!urgent && Date.now() - said < 2000) return;
  said = Date.now();
  $("live").textContent = text;
}

/** A short message that goes away by itself. */
export function toast(text, kind = "") {
  if ([...$("toasts").children].some((shown) => shown.textContent === text)) return;
  const box = h("div", { class: `toast ${kind}` }, text);
  $("toasts").append(box);
  setTimeout(() => box.remove(), kind === "bad" ? 9000 : 4000);
}

/** A modal dialog with a title; it is removed when it is closed. */
export function dialog(title, ...children) {
  const box = h(
    "dialog",
    { "aria-label": title, onclose: () => box.remove() },
    h(
      "div",
      { class: "row between" },
      h("h2", {}, title),
      button("", () => box.close(), { glyph: "x", label: "Close", class: "square quiet" }),
    ),
    ...children,
  );
  box.addEventListener("pointerdown", (event) => {
    const { left, right, top, bottom } = box.getBoundingClientRect();
    const inside = event.clientX >= left && event.clientX <= right && event.clientY >= top && event.clientY <= bottom;
    if (event.target === box && !inside) box.close();
  });
  document.body.append(box);
  box.showModal();
  return box;
}

/** Radio buttons as chips; `options` are [value, ...children]. Returns { set }. */
export function radios(group, name, options, onchange) {
  group.replaceChildren(
    ...options.map(([value, ...children]) =>
      h(
        "label",
        { class: "chip" },
        h("input", { type: "radio", name, value, class: "unseen", onchange: () => onchange(value) }),
        ...children,
      ),
    ),
  );
  const set = (value) => {
    for (const input of group.querySelectorAll("input")) input.checked = input.value === value;
  };
  return { set };
}

export const readAsDataUrl = (blob) =>
  new Promise((done, fail) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result);
    reader.onerror = () => fail(reader.error);
    reader.readAsDataURL(blob);
  });

export function download(blob, name) {
  const url = URL.createObjectURL(blob);
  h("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}

export const seconds = (value) => (value < 10 ? `${value.toFixed(1)} s` : `${Math.round(value)} s`);
