// One setting at several values, drawn one after the other with one seed: a labelled strip.

import { $, button, h, toast } from "./dom.js";
import { show, urlOf, watch } from "./stage.js";

const MOST = 8;
const PLAIN = {
  guidance_scale: ["guidance", "1, 2.5, 4, 6"],
  num_inference_steps: ["steps", "8, 15, 28, 40"],
};
const SCALES = "0.6, 0.8, 1, 1.2";
const STRENGTHS = "0.4, 0.6, 0.8, 1";
const short = (path) => path.split("/").pop().replace(/\.safetensors$/, "");

export class Sweep {
  /** `read` gives the request, `draw(inputs, views)` draws one after the other. */
  constructor({ read, start }) {
    this.read = read;
    this.start = start;
    this.what = h("select", { id: "sweep-what", onchange: () => this.suggest() });
    this.values = h("input", { id: "sweep-values", "aria-describedby": "sweep-help" });
    this.go = button("Draw the strip", () => this.run(), { id: "sweep-go" });
    $("sweep-body").append(
      h("div", { class: "field" }, h("label", { for: "sweep-what" }, "Setting"), this.what),
      h("div", { class: "field" }, h("label", { for: "sweep-values" }, "Values"), this.values,
        h("p", { class: "help", id: "sweep-help" }, `2 to ${MOST}, with commas between; all with one seed`)),
      this.go,
    );
    this.refresh({ loras: [] });
  }

  /** Offer what this request has. */
  refresh(input) {
    const options = Object.entries(PLAIN).map(([value, [text]]) => [value, text]);
    for (const { path } of input.loras || []) options.unshift([`lora:${path}`, `scale of ${short(path)}`]);
    if (input.init_image) options.push(["strength", "strength"]);
    const offered = options.map(([value]) => value).join();
    if (offered === this.offered) return;
    this.offered = offered;
    const before = this.what.value;
    this.what.replaceChildren(...options.map(([value, text]) => h("option", { value }, text)));
    if (options.some(([value]) => value === before) && !offered.startsWith("lora:")) this.what.value = before;
    this.suggest();
  }

  suggest() {
    const { value } = this.what;
    this.values.value = value.startsWith("lora:") ? SCALES : value === "strength" ? STRENGTHS : PLAIN[value][1];
  }

  run() {
    const values = this.values.value.split(/[,;\s]+/).filter(Boolean).map(Number);
    if (values.length < 2 || values.length > MOST || values.some(Number.isNaN)) {
      toast(`Values: 2 to ${MOST} numbers with commas between`, "bad");
      return this.values.focus();
    }
    const what = this.what.value;
    const name = this.what.selectedOptions[0].textContent;
    const base = this.read();
    if (!base) return;
    base.seed ??= Math.floor(Math.random() * 2 ** 32);
    delete base.num_images;
    this.start(values.map((value) => ({ input: set(base, what, value), label: `${name.replace("scale of ", "")} ${value}` })));
  }
}

function set(input, what, value) {
  if (!what.startsWith("lora:")) return { ...input, [what]: value };
  const path = what.slice("lora:".length);
  const loras = input.loras.map((lora) => (lora.path === path ? { ...lora, scale: value } : lora));
  return { ...input, loras };
}

/** The strip on the stage: { views, done(n, row) }. */
export function strip(runs, [width, height], open) {
  const views = runs.map(({ label }) => watch(width, height, h("strong", {}, label)));
  const box = h("div", { class: "sweep", role: "group", "aria-label": "Sweep" }, ...views.map((view) => view.element));
  show(box);
  const done = (n, row) => {
    const image = h("img", { src: urlOf(row), alt: `${runs[n].label}: ${row.parameters.prompt}` });
    const link = h("button", { type: "button", class: "bare", onclick: () => open(row), "aria-label": `Open ${runs[n].label}` }, image);
    views[n].element.replaceChildren(link, h("figcaption", {}, h("strong", {}, runs[n].label)));
  };
  return { views, done };
}
