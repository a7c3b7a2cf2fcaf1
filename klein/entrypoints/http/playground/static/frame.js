// An image whose edges are dragged outwards: how many pixels it grows by on each side.

import { h } from "./dom.js";

const SIDES = ["left", "right", "top", "bottom"];
const STEP = 16;
const MOST = 4096;

export class Frame {
  constructor(image, width, height, onchange) {
    Object.assign(this, { image, width, height, onchange });
    this.by = { left: 0, right: 0, top: 0, bottom: 0 };
    this.handles = Object.fromEntries(SIDES.map((side) => [side, this.handle(side)]));
    this.numbers = Object.fromEntries(SIDES.map((side) => [side, this.number(side)]));
    this.box = h("div", { class: "frame" }, image, ...Object.values(this.handles));
    const numbers = SIDES.map((side) => h("label", {}, side, this.numbers[side]));
    this.element = h("div", {}, this.box, h("div", { class: "row four" }, ...numbers));
    this.show();
  }

  read = () => ({ ...this.by });

  set(by) {
    for (const side of SIDES) this.by[side] = Math.max(0, Math.min(MOST, Math.round(by[side] || 0)));
    this.show();
    this.onchange();
  }

  grow(side, pixels) {
    this.set({ ...this.by, [side]: pixels });
  }

  number(side) {
    return h("input", {
      type: "number", min: 0, max: MOST, step: STEP, inputmode: "numeric",
      oninput: (event) => this.grow(side, Number(event.target.value)),
    });
  }

  handle(side) {
    const flat = side === "left" || side === "right";
    const outwards = side === "left" || side === "top" ? -1 : 1;
    const handle = h("button", {
      type: "button", class: `handle ${side}`, role: "slider", "aria-label": `Extend ${side}`,
      "aria-valuemin": 0, "aria-valuemax": MOST, "aria-orientation": flat ? "horizontal" : "vertical",
    });
    let from = null;
    const along = (event) => (flat ? event.clientX : event.clientY);
    handle.addEventListener("pointerdown", (event) => {
      handle.setPointerCapture(event.pointerId);
      from = { at: along(event), by: this.by[side], scale: this.total()[0] / this.box.clientWidth };
    });
    handle.addEventListener("pointermove", (event) => {
      if (!from) return;
      const moved = (along(event) - from.at) * outwards * from.scale;
      this.grow(side, Math.round((from.by + moved) / STEP) * STEP);
    });
    handle.addEventListener("lostpointercapture", () => (from = null));
    handle.addEventListener("keydown", (event) => {
      const keys = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 };
      if (!(event.key in keys)) return;
      event.preventDefault();
      this.grow(side, this.by[side] + keys[event.key] * outwards * STEP);
    });
    return handle;
  }

  total = () => [this.width + this.by.left + this.by.right, this.height + this.by.top + this.by.bottom];

  show() {
    const [width, height] = this.total();
    const percent = (part, whole) => `${(100 * part) / whole}%`;
    this.box.style.aspectRatio = `${width} / ${height}`;
    this.image.style.left = percent(this.by.left, width);
    this.image.style.top = percent(this.by.top, height);
    this.image.style.width = percent(this.width, width);
    this.image.style.height = percent(this.height, height);
    for (const side of SIDES) {
      if (document.activeElement !== this.numbers[side]) this.numbers[side].value = this.by[side];
      this.handles[side].setAttribute("aria-valuenow", this.by[side]);
      this.handles[side].setAttribute("aria-valuetext", `${this.by[side]} pixels`);
    }
  }
}
