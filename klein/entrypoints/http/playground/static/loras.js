// The LoRAs of the next image: a picker over those at hand, scales and trigger words.

import { ask, get } from "./api.js";
import { $, button, dialog, h, icon, toast } from "./dom.js";

const RANGE = { min: -2, max: 2, step: 0.05 };
const short = (path) => path.split("/").pop().replace(/\.safetensors$/, "");
const megabytes = (bytes) => (bytes >= 1e6 ? `${(bytes / 1e6).toFixed(0)} MB` : `${Math.ceil(bytes / 1e3)} kB`);

export class Loras {
  constructor(onchange) {
    this.onchange = onchange;
    this.chosen = [];
    this.entries = [];
    $("lora-add").addEventListener("click", () => this.pick());
    this.show();
  }

  connect({ limits, lora_uploads }, entries) {
    this.most = limits.loras;
    this.uploads = lora_uploads;
    this.entries = entries;
  }

  read = () => this.chosen.map(({ path, scale, ...rest }) => ({ path, scale, ...rest }));

  fill(loras) {
    this.chosen = (loras || []).map((lora) => ({ ...lora, scale: lora.scale ?? 1 }));
    this.show();
  }

  /** The name here of a file that another program names. */
  known = (path) => this.entries.find((row) => short(row.name) === short(path))?.name ?? path;

  entry = (path) => this.entries.find((row) => row.name === path);

  /** Trigger words of the chosen ones. */
  words = () => this.chosen.flatMap(({ path }) => this.entry(path)?.trigger_words || []);

  add(path) {
    if (this.chosen.some((lora) => lora.path === path)) return;
    if (this.chosen.length >= this.most) return toast(`${this.most} LoRAs are the most`, "bad");
    this.chosen.push({ path, scale: this.entry(path)?.defaults?.scale ?? 1 });
    this.show();
  }

  remove(path) {
    this.chosen = this.chosen.filter((lora) => lora.path !== path);
    this.show();
    $("lora-add").focus();
  }

  show() {
    const rows = this.chosen.map((lora) => this.row(lora));
    const none = h("p", { class: "help" }, "None: the model as it is.");
    $("loras").replaceChildren(...(rows.length ? rows : [none]));
    this.onchange();
  }

  row(lora) {
    const name = short(lora.path);
    const scale = (value) => {
      lora.scale = Number(value);
      slider.value = number.value = value;
      this.onchange();
    };
    const common = { ...RANGE, value: lora.scale, oninput: (event) => scale(event.target.value) };
    const slider = h("input", { ...common, type: "range", "aria-label": `Scale of ${name}` });
    const number = h("input", {
      ...common, min: -4, max: 4, type: "number", inputmode: "decimal", "aria-label": `Scale of ${name} as a number`,
    });
    return h(
      "div",
      { class: "lora" },
      h("span", { class: "name", title: lora.path }, name),
      button("", () => this.remove(lora.path), { glyph: "x", label: `Remove ${name}` }),
      h("div", { class: "row number" }, slider, number),
    );
  }

  pick() {
    const list = h("ul", { class: "picks", "aria-label": "LoRAs at hand" });
    const show = (text) => list.replaceChildren(...this.picks(text, () => box.close()));
    const search = h("input", {
      type: "search", placeholder: "name or trigger word", "aria-label": "Search LoRAs",
      oninput: (event) => show(event.target.value),
    });
    show("");
    const box = dialog(
      "Add a LoRA",
      h("div", { class: "row search" }, icon("search"), search),
      list,
      this.elsewhere(() => box.close()),
      this.uploads ? this.upload(() => box.close()) : null,
    );
    search.focus();
  }

  picks(text, done) {
    const sought = text.trim().toLowerCase();
    const rows = this.entries.filter((row) =>
      [row.name, ...row.trigger_words].some((word) => word.toLowerCase().includes(sought)),
    );
    if (!rows.length) {
      return [h("li", { class: "help" }, sought ? "None of that name." : "This server has none yet.")];
    }
    return rows.map((row) => h("li", {}, this.pickButton(row, done)));
  }

  pickButton(row, done) {
    const facts = row.error ? [row.error] : [row.base, row.rank && `rank ${row.rank}`, megabytes(row.bytes)];
    return h(
      "button",
      { type: "button", class: "pick", onclick: () => (this.add(row.name), done()) },
      h("strong", {}, short(row.name)),
      h("span", { class: "help" }, facts.filter(Boolean).join(" · ")),
      row.trigger_words.length ? h("span", { class: "words" }, row.trigger_words.join(", ")) : null,
    );
  }

  elsewhere(done) {
    const input = h("input", {
      id: "lora-path", maxlength: 2000, placeholder: "owner/repo or https://…",
      onkeydown: (event) => event.key === "Enter" && (event.preventDefault(), use()),
    });
    const use = () => input.value.trim() && (this.add(input.value.trim()), done());
    return h(
      "div",
      { class: "field" },
      h("label", { for: input.id }, "From the Hub, Civitai or an address"),
      h("div", { class: "row" }, input, button("Use", use)),
      h("p", { class: "help" }, "klein fetches it when it draws."),
    );
  }

  upload(done) {
    const input = h("input", { id: "lora-file", type: "file", accept: ".safetensors" });
    const told = h("p", { class: "help", role: "status" });
    input.addEventListener("change", async () => {
      const [file] = input.files;
      if (!file) return;
      input.disabled = true;
      told.textContent = `Sending ${megabytes(file.size)} …`;
      try {
        const added = await ask(`loras?name=${encodeURIComponent(file.name)}`, {
          method: "POST", body: file, headers: { "content-type": "application/octet-stream" },
        });
        const { name } = await added.json();
        this.entries = (await get("loras")).loras;
        this.add(name);
        done();
      } catch (error) {
        toast(error.message, "bad");
      } finally {
        input.disabled = false;
        told.textContent = "";
      }
    });
    return h(
      "div",
      { class: "field" },
      h("label", { for: input.id }, "Upload a .safetensors to this server"),
      input,
      told,
    );
  }
}

/** A report of klein's in plain words. */
export function told(report) {
  const name = short(report.path);
  if (!report.applied) return `${name} was left out: ${report.error}`;
  const change = (report.relative_change * 100).toPrecision(2);
  return (
    `${name} at ${report.scale}: ${report.layers_matched} of ${report.layers_in_file} layers, ` +
    `changes the weights by ${Number(change)} %`
  );
}
