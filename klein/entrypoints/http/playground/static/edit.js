// Images to edit: references, and an init image that is varied, repainted or extended.

import { $, button, dialog, h, icon, radios, readAsDataUrl, toast } from "./dom.js";
import { field } from "./fields.js";
import { Mask } from "./mask.js";
import { Frame } from "./frame.js";

const TYPES = ["image/png", "image/jpeg", "image/webp"];
const MAX_BYTES = 20e6;
const MAX_PIXELS = 16e6;
const READABLE_PIXELS = 120e6; // of what is made smaller here; more may take all memory
const MODES = [["vary", "Vary"], ["repaint", "Repaint"], ["extend", "Extend"]];
const HELP = {
  vary: "Starts from the image; strength says how far it goes.",
  repaint: "Paint over what is to be drawn anew.",
  extend: "Drag an edge outwards, or type pixels.",
};
const FIELDS = {
  vary: ["strength"],
  repaint: ["strength", "mask_feather", "mask_padding"],
  extend: ["mask_feather"],
};

/** An image that is certain to be readable. Throws for any other, before its pixels take memory. */
async function decoded(url) {
  const image = h("img", { src: url });
  await new Promise((done, fail) => ((image.onload = done), (image.onerror = fail)));
  if (image.naturalWidth * image.naturalHeight > READABLE_PIXELS) throw new Error("too many pixels");
  await image.decode();
  return image;
}

/** A file as klein takes it, a data URI; other kinds and huge ones are drawn anew. Throws like `decoded`. */
export async function dataUrl(file) {
  const address = URL.createObjectURL(file);
  try {
    const image = await decoded(address);
    const [width, height] = [image.naturalWidth, image.naturalHeight];
    const scale = Math.min(1, Math.sqrt(MAX_PIXELS / (width * height)));
    if (TYPES.includes(file.type) && file.size <= MAX_BYTES && scale === 1) return await readAsDataUrl(file);
    const canvas = h("canvas", { width: Math.max(1, Math.round(width * scale)), height: Math.max(1, Math.round(height * scale)) });
    const context = canvas.getContext("2d");
    context.fillStyle = "#fff"; // JPEG has no transparency
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.drawImage(image, 0, 0, canvas.width, canvas.height);
    return canvas.toDataURL("image/jpeg", 0.95);
  } finally {
    URL.revokeObjectURL(address);
  }
}

export class Edit {
  constructor(onchange) {
    this.onchange = onchange;
    this.images = [];
    this.init = null;
    this.mode = "repaint";
    this.fields = {};
    this.most = 4;
  }

  connect({ request }) {
    this.most = request.properties.images.maxItems;
    for (const name of ["reference_megapixels", "strength", "mask_feather", "mask_padding"]) {
      const kept = this.fields[name]?.get();
      this.fields[name] = field(name, request.properties[name]);
      this.fields[name].set(kept);
    }
    this.show();
  }

  read() {
    const input = {};
    if (this.images.length) input.images = [...this.images];
    const names = this.images.length || (this.init && this.mode !== "vary") ? ["reference_megapixels"] : [];
    if (this.init) {
      input.init_image = this.init;
      Object.assign(input, this.change());
      names.push(...FIELDS[this.mode]);
    }
    for (const name of names) {
      const value = this.fields[name].get();
      if (value !== undefined) input[name] = value;
    }
    return input;
  }

  change() {
    if (this.mode === "repaint") return { mask: this.mask.url() };
    return this.mode === "extend" ? { extend: this.frame.read() } : {};
  }

  /** What keeps this from being sent, in words, or null. */
  fault() {
    if (!this.init) return null;
    if (this.mode === "repaint" && this.mask.empty) return "Paint over what is to be repainted, or choose Vary.";
    const grows = this.mode !== "extend" || Object.values(this.frame.read()).some(Boolean);
    return grows ? null : "Drag an edge of the image outwards, or choose Vary.";
  }

  async fill(input) {
    this.images = [...(input.images || [])];
    for (const [name, made] of Object.entries(this.fields)) made.set(input[name]);
    const mode = input.mask ? "repaint" : input.extend ? "extend" : "vary";
    await this.start(input.init_image || null, input.init_image ? mode : this.mode);
    if (input.mask) await this.mask.load(input.mask);
    if (input.extend) this.frame.set(input.extend);
  }

  async addFiles(files) {
    for (const file of files) {
      const taken = await this.guard(async () => this.reference(await dataUrl(file)));
      if (!taken) return;
    }
  }

  /** What `work` gives; null after telling that its file is no image. */
  async guard(work) {
    try {
      return await work();
    } catch {
      toast("That file is not an image that this browser can read.", "bad");
      return null;
    }
  }

  reference(url) {
    if (this.images.length >= this.most) return void toast(`${this.most} references are the most`, "bad");
    this.images.push(url);
    this.show();
    return true;
  }

  /** Edit `url`, a data URI; null puts it away. */
  async start(url, mode = this.mode) {
    const image = url && (await decoded(url));
    this.init = url;
    this.mode = mode;
    this.mask = this.frame = null;
    if (image) {
      image.alt = "The image that is edited";
      this.mask = new Mask(image, () => this.onchange());
      this.frame = new Frame(image.cloneNode(), image.naturalWidth, image.naturalHeight, () => this.onchange());
    }
    this.show();
  }

  show() {
    if (this.images.length || this.init) $("edit").open = true;
    $("references").replaceChildren(...this.referenceParts());
    $("editor").replaceChildren(...(this.init ? this.editorParts() : [this.initZone()]));
    const parts = [
      this.images.length ? `${this.images.length} reference${this.images.length > 1 ? "s" : ""}` : "",
      this.init ? this.mode : "",
    ];
    $("edit-told").textContent = parts.filter(Boolean).join(", ");
    this.onchange();
  }

  zone(title, help, multiple, take) {
    const input = h("input", {
      type: "file", accept: "image/*", multiple, class: "unseen", "aria-label": title,
      onchange: (event) => take([...event.target.files]),
    });
    const zone = h("label", { class: "zone" }, icon("image"), h("span", {}, title, h("small", {}, help)), input);
    zone.addEventListener("dragover", (event) => (event.preventDefault(), zone.classList.add("over")));
    zone.addEventListener("dragleave", () => zone.classList.remove("over"));
    zone.addEventListener("drop", (event) => {
      event.preventDefault();
      event.stopPropagation();
      zone.classList.remove("over");
      take([...event.dataTransfer.files]);
      dispatchEvent(new Event("klein-dropped"));
    });
    return zone;
  }

  referenceParts() {
    const tiles = this.images.map((url, n) =>
      h(
        "figure",
        { class: "tile" },
        h("img", { src: url, alt: `Reference ${n + 1}` }),
        h("figcaption", {}, `image ${n + 1}`),
        button("", () => (this.images.splice(n, 1), this.show()), { glyph: "x", label: `Remove reference ${n + 1}` }),
      ),
    );
    const more = this.images.length < this.most
      ? this.zone("References", `up to ${this.most}, in the prompt image\u00a01, image\u00a02\u00a0…`, true, (files) => this.addFiles(files))
      : null;
    const size = this.images.length ? this.fields.reference_megapixels?.element : null;
    return [h("div", { class: "tiles" }, ...tiles), more, size].filter(Boolean);
  }

  initZone() {
    return this.zone("Image to change", "vary it, repaint a part, or extend it", false, ([file]) =>
      file && this.guard(async () => this.start(await dataUrl(file))),
    );
  }

  editorParts() {
    this.fields.strength.suggest(this.mode === "repaint" ? 1 : undefined);
    const modes = h("div", { class: "ratios", role: "radiogroup", "aria-label": "What to do with the image" });
    radios(modes, "edit-mode", MODES.map(([value, text]) => [value, h("span", {}, text)]), (mode) => {
      this.mode = mode;
      this.show();
      modes.ownerDocument.querySelector(`input[name=edit-mode][value=${mode}]`).focus();
    }).set(this.mode);
    const surface = h("div", {}, this.surface());
    const larger = button("Larger", () => this.enlarge(surface), { glyph: "expand", class: "small" });
    const away = button("Remove", () => this.start(null), { glyph: "x", class: "small", "aria-label": "Remove the image" });
    return [
      modes,
      h("p", { class: "help" }, HELP[this.mode]),
      surface,
      h("div", { class: "row" }, this.mode === "vary" ? null : larger, away),
      ...FIELDS[this.mode].map((name) => this.fields[name].element),
    ];
  }

  surface() {
    if (this.mode === "repaint") return this.mask.element;
    if (this.mode === "extend") return this.frame.element;
    return h("img", { src: this.init, alt: "The image that is varied", class: "varied" });
  }

  enlarge(surface) {
    const content = surface.firstElementChild;
    const box = dialog(this.mode === "repaint" ? "Paint what to repaint" : "Extend the image", content);
    box.classList.add("large");
    box.style.setProperty("--ratio", this.mask.width / this.mask.height);
    box.addEventListener("close", () => surface.append(content));
  }
}
