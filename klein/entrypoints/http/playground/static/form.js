// The request as a form: prompt, preset, size, seed and the fields of the schema.

import { $, h, radios } from "./dom.js";
import { field } from "./fields.js";

/** Fields of the schema that have a place of their own on the page, or none. */
const PLACED = new Set([
  "prompt", "negative_prompt", "preset", "width", "height", "seed", "loras", "images", "init_image",
  "mask", "extend", "reference_megapixels", "strength", "mask_feather", "mask_padding",
  "return_type", "lora_path", "lora_scale",
]);
const RATIOS = ["1:1", "4:5", "2:3", "9:16", "5:4", "3:2", "16:9"];
const PRESETS_NATIVE = 1024;
const WRONG = ["badInput", "rangeOverflow", "rangeUnderflow"]; // klein rounds what lies between steps

const words = (name) => (name[0].toUpperCase() + name.slice(1)).replaceAll("_", " ").replace(/\bhd\b/, "HD").replace(/\blora\b/, "LoRA");

export class Form {
  constructor(onchange) {
    this.onchange = onchange;
    this.fields = {};
    this.ratio = "auto";
    this.lastSeed = null;
    $("seed-dice").addEventListener("click", () => this.seed(Math.floor(Math.random() * 2 ** 32)));
    $("seed-reuse").addEventListener("click", () => (this.seed(this.lastSeed), this.lock(true)));
    $("seed-lock").addEventListener("click", () => this.lock(!this.locked));
    for (const id of ["prompt", "negative_prompt", "width", "height", "seed"]) {
      $(id).addEventListener("input", () => (this.tell(), this.onchange()));
    }
  }

  /** Take the tables of /capabilities and /presets; what is filled in stays. */
  connect(capabilities, presets) {
    const before = this.schema ? this.read() : null;
    this.schema = capabilities.request.properties;
    this.limits = capabilities.limits;
    this.model = capabilities.model?.spec || {};
    this.native = this.model.native_size || PRESETS_NATIVE;
    this.presets = Object.fromEntries(presets.presets.map((row) => [row.name, row]));
    this.makePresets(presets.default);
    this.makeRatios();
    this.makeFields({ sampler: capabilities.samplers, schedule: capabilities.schedules });
    if (before) this.fill(before);
  }

  makePresets(standard) {
    this.standard = standard;
    const options = Object.values(this.presets).map((row) => [
      row.name,
      h("img", {
        src: `ui/presets/${row.name}.webp`, alt: "", width: 56, height: 56,
        onerror: (event) => event.target.remove(),
      }),
      h("span", {}, words(row.name)),
    ]);
    this.presetRadios = radios($("presets"), "preset", options, (name) => this.choose(name));
    this.choose(standard);
  }

  choose(name) {
    this.preset = this.presets[Object.hasOwn(this.presets, name) ? name : this.standard];
    this.presetRadios.set(this.preset.name);
    this.tell();
    this.onchange();
  }

  makeRatios() {
    const options = ["auto", ...RATIOS, "custom"].map((ratio) => {
      const [w, h_] = ratio.includes(":") ? ratio.split(":").map(Number) : [0, 0];
      const shape = w ? h("i", { class: "shape" }) : null;
      if (shape) {
        shape.style.width = `${Math.round((14 * w) / Math.max(w, h_))}px`;
        shape.style.height = `${Math.round((14 * h_) / Math.max(w, h_))}px`;
      }
      const text = { auto: "Preset’s", custom: "Custom" }[ratio] || ratio;
      return [ratio, shape, h("span", {}, text)];
    });
    this.ratioRadios = radios($("ratios"), "ratio", options, (ratio) => this.shape(ratio));
    this.shape("auto");
  }

  shape(ratio) {
    const [width, height] = this.size() || this.presetSize();
    this.ratio = ratio;
    this.ratioRadios.set(ratio);
    $("custom-size").hidden = ratio !== "custom";
    if (ratio === "custom") [$("width").value, $("height").value] = [width, height];
    this.tell();
    this.onchange();
  }

  makeFields(docs) {
    this.fields = {};
    $("fields").replaceChildren();
    for (const [name, schema] of Object.entries(this.schema)) {
      const made = PLACED.has(name) ? null : field(name, schema, docs[name], () => this.tell());
      if (!made) continue;
      this.fields[name] = made;
      $("fields").append(made.element);
    }
    this.tell();
  }

  /** [width, height] as asked for, or null where the preset or an image decides. */
  size() {
    if (this.ratio === "auto") return null;
    if (this.ratio === "custom") return [Number($("width").value), Number($("height").value)];
    const [w, h_] = this.ratio.split(":").map(Number);
    const scale = this.native / Math.sqrt(w * h_);
    return [this.round(w * scale), this.round(h_ * scale)];
  }

  presetSize() {
    const scale = this.native / PRESETS_NATIVE;
    return [this.round(this.preset.width * scale), this.round(this.preset.height * scale)];
  }

  round(pixels) {
    const by = this.limits.multiple_of;
    return Math.max(this.limits.smallest_side, Math.round(pixels / by) * by);
  }

  /** Say what the choices come to. */
  tell() {
    if (!this.schema) return;
    const { preset } = this;
    const image = this.ratio === "auto" && this.fromImage;
    const [width, height] = this.size() || this.presetSize();
    $("preset-purpose").textContent =
      `${preset.purpose}: ${this.suggested("num_inference_steps")}\u00a0steps, guidance\u00a0${this.suggested("guidance_scale")}`;
    $("size-told").textContent = image ? "as the image that you edit" : `${width} × ${height} pixels`;
    for (const [name, made] of Object.entries(this.fields)) made.suggest(this.suggested(name));
    const changed = Object.values(this.fields).filter((made) => made.get() !== undefined).length;
    $("advanced-told").textContent = changed ? `${changed} changed` : "";
  }

  /** What klein takes for a field that is left open. */
  suggested(name) {
    const [value, most] = [this.preset[name], this.model[name]];
    return name === "max_sequence_length" && most ? Math.min(value, most) : (most ?? value);
  }

  get locked() {
    return $("seed-lock").getAttribute("aria-pressed") === "true";
  }

  lock(on) {
    $("seed-lock").setAttribute("aria-pressed", String(on));
    if (on && $("seed").value === "") this.seed(this.lastSeed ?? Math.floor(Math.random() * 2 ** 32));
  }

  seed(value) {
    $("seed").value = value ?? "";
  }

  /** After a draw: a seed that is not locked was for once. */
  drawn(seed) {
    this.lastSeed = seed;
    $("seed-reuse").disabled = false;
    if (!this.locked) this.seed("");
  }

  /** The field whose value is out of its bounds or no number, opened and focused; null if all are fine. */
  fault() {
    const wrong = [...$("controls").querySelectorAll("input[type=number]")].find(
      (input) => !input.closest("[hidden]") && WRONG.some((way) => input.validity[way]),
    );
    if (!wrong) return null;
    if (wrong.closest("details")) wrong.closest("details").open = true;
    wrong.focus();
    const name = wrong.labels[0]?.textContent.trim() || wrong.getAttribute("aria-label");
    return `${name}: a number from ${wrong.min} to ${wrong.max}`;
  }

  read() {
    const [width, height] = this.size() || [];
    const input = {
      prompt: $("prompt").value,
      negative_prompt: $("negative_prompt").value || undefined,
      preset: this.preset.name,
      width,
      height,
      seed: $("seed").value === "" ? undefined : Number($("seed").value),
    };
    for (const [name, made] of Object.entries(this.fields)) input[name] = made.get();
    return Object.fromEntries(Object.entries(input).filter(([, value]) => value !== undefined));
  }

  fill(input) {
    $("prompt").value = input.prompt || "";
    $("negative_prompt").value = input.negative_prompt || "";
    this.choose(input.preset || this.standard);
    this.shape("auto");
    if (input.width && input.height) this.fit(input.width, input.height);
    this.seed(input.seed);
    for (const [name, made] of Object.entries(this.fields)) {
      made.set(input[name] === this.suggested(name) ? undefined : input[name]);
    }
    this.tell();
    this.onchange();
  }

  /** Choose the chip whose size this is, or type it in. */
  fit(width, height) {
    if (this.presetSize().join() === `${width},${height}`) return;
    for (const ratio of RATIOS) {
      this.ratio = ratio;
      if (this.size().join() === `${width},${height}`) return this.shape(ratio);
    }
    this.shape("custom");
    [$("width").value, $("height").value] = [width, height];
  }
}
