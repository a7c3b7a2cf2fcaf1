// A mask painted over an image: brush, eraser, invert, clear, undo; mouse, pen, touch or keys.

import { button, h } from "./dom.js";

const PAINT = "#14b8a6";

export class Mask {
  constructor(image, onchange) {
    this.onchange = onchange;
    this.width = image.naturalWidth;
    this.height = image.naturalHeight;
    this.size = Math.round(Math.min(this.width, this.height) / 6);
    this.erasing = false;
    this.steps = [];
    this.cursor = [this.width / 2, this.height / 2];
    this.canvas = h("canvas", {
      width: this.width, height: this.height, tabindex: 0, role: "application",
      "aria-label": "Mask: arrow keys move, space paints",
    });
    this.context = this.canvas.getContext("2d", { willReadFrequently: true });
    this.pointer = h("i", { class: "brush", hidden: true });
    this.element = h(
      "div",
      { class: "mask" },
      this.tools(),
      h("div", { class: "over-image" }, image, this.canvas, this.pointer),
    );
    this.listen();
  }

  get empty() {
    const { data } = this.context.getImageData(0, 0, this.width, this.height);
    for (let at = 3; at < data.length; at += 4) if (data[at] > 127) return false;
    return true;
  }

  tools() {
    const mode = (erasing) => {
      this.erasing = erasing;
      brush.setAttribute("aria-pressed", String(!erasing));
      eraser.setAttribute("aria-pressed", String(erasing));
    };
    const brush = button("", () => mode(false), { glyph: "brush", label: "Brush", "aria-pressed": "true" });
    const eraser = button("", () => mode(true), { glyph: "eraser", label: "Eraser", "aria-pressed": "false" });
    const size = h("input", {
      type: "range", min: 2, max: Math.round(Math.min(this.width, this.height) / 2), value: this.size,
      "aria-label": "Brush size", oninput: (event) => (this.size = Number(event.target.value)),
    });
    return h(
      "div",
      { class: "row tools", role: "toolbar", "aria-label": "Mask tools" },
      brush,
      eraser,
      size,
      button("", () => this.do({ kind: "invert" }), { glyph: "invert", label: "Invert the mask" }),
      button("", () => this.undo(), { glyph: "undo", label: "Undo" }),
      button("", () => this.do({ kind: "clear" }), { glyph: "trash", label: "Clear the mask" }),
    );
  }

  listen() {
    const { canvas } = this;
    const at = (event) => {
      const box = canvas.getBoundingClientRect();
      return [((event.clientX - box.left) * this.width) / box.width, ((event.clientY - box.top) * this.height) / box.height];
    };
    canvas.addEventListener("pointerdown", (event) => {
      if (event.button !== 0 || this.stroke) return;
      event.preventDefault();
      canvas.focus({ preventScroll: true });
      canvas.setPointerCapture(event.pointerId);
      this.do({ kind: "stroke", size: this.size, erasing: this.erasing, points: [at(event)] });
      this.stroke = this.steps.at(-1);
    });
    canvas.addEventListener("pointermove", (event) => {
      this.show(at(event));
      if (!this.stroke) return;
      this.stroke.points.push(at(event));
      this.draw(this.stroke, this.stroke.points.length - 1);
    });
    canvas.addEventListener("lostpointercapture", () => ((this.stroke = null), this.onchange()));
    canvas.addEventListener("pointerleave", () => (this.pointer.hidden = true));
    canvas.addEventListener("blur", () => (this.pointer.hidden = true));
    canvas.addEventListener("keydown", (event) => this.onKey(event));
  }

  onKey(event) {
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    if (event.key in moves) {
      const by = Math.max(2, this.size / 3);
      const [x, y] = moves[event.key];
      this.cursor = [
        Math.min(this.width, Math.max(0, this.cursor[0] + x * by)),
        Math.min(this.height, Math.max(0, this.cursor[1] + y * by)),
      ];
      this.show(this.cursor);
    } else if (event.key === " " || (event.key === "Enter" && !event.ctrlKey && !event.metaKey)) {
      this.do({ kind: "stroke", size: this.size, erasing: this.erasing, points: [this.cursor] });
    } else if (event.key === "z" && (event.ctrlKey || event.metaKey)) {
      this.undo();
    } else {
      return;
    }
    event.preventDefault();
  }

  show([x, y]) {
    const scale = this.canvas.clientWidth / this.width;
    const { style } = this.pointer;
    this.pointer.hidden = false;
    style.width = style.height = `${this.size * scale}px`;
    style.left = `${x * scale}px`;
    style.top = `${y * scale}px`;
  }

  do(step) {
    this.steps.push(step);
    this.draw(step);
    this.onchange();
  }

  undo() {
    if (!this.steps.pop()) return;
    this.context.clearRect(0, 0, this.width, this.height);
    for (const step of this.steps) this.draw(step);
    this.onchange();
  }

  draw(step, first = 0) {
    const { context } = this;
    context.save();
    context.fillStyle = context.strokeStyle = PAINT;
    if (step.kind === "clear") context.clearRect(0, 0, this.width, this.height);
    if (step.kind === "image") context.drawImage(step.image, 0, 0);
    if (step.kind === "invert") {
      context.globalCompositeOperation = "source-out";
      context.fillRect(0, 0, this.width, this.height);
    }
    if (step.kind === "stroke") this.line(step, first);
    context.restore();
  }

  /** The stroke from point number `first` on, piece by piece, so that undo finds the same pixels. */
  line({ points, size, erasing }, first) {
    const { context } = this;
    context.globalCompositeOperation = erasing ? "destination-out" : "source-over";
    context.lineWidth = size;
    context.lineCap = "round";
    for (let n = first; n < points.length; n++) {
      context.beginPath();
      if (n === 0) context.arc(...points[0], size / 2, 0, 2 * Math.PI);
      else context.moveTo(...points[n - 1]);
      context.lineTo(...points[n]);
      if (n === 0) context.fill();
      else context.stroke();
    }
  }

  /** The mask as a data URI: white is repainted. */
  url() {
    const out = h("canvas", { width: this.width, height: this.height });
    const context = out.getContext("2d");
    context.drawImage(this.canvas, 0, 0);
    context.globalCompositeOperation = "source-in";
    context.fillStyle = "#fff";
    context.fillRect(0, 0, this.width, this.height);
    context.globalCompositeOperation = "destination-over";
    context.fillStyle = "#000";
    context.fillRect(0, 0, this.width, this.height);
    return out.toDataURL("image/png");
  }

  /** Take a mask that `url` made. */
  async load(url) {
    const image = h("img", { src: url });
    await image.decode();
    const layer = h("canvas", { width: this.width, height: this.height });
    const context = layer.getContext("2d");
    context.drawImage(image, 0, 0, this.width, this.height);
    const pixels = context.getImageData(0, 0, this.width, this.height);
    for (let at = 0; at < pixels.data.length; at += 4) {
      pixels.data.set([0x14, 0xb8, 0xa6, pixels.data[at]], at);
    }
    context.putImageData(pixels, 0, 0);
    this.do({ kind: "image", image: layer });
  }
}
