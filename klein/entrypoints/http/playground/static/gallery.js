// The images of this browser, newest first: open, compare two, export, clear.

import { $, button, dialog, download, h, toast } from "./dom.js";
import { fileName, urlOf } from "./stage.js";
import * as store from "./store.js";
import { zip } from "./zip.js";

/** A label whose value, at its end, is never cut. */
function badge(label) {
  const [, name, value] = label.match(/^(.*) (\S+)$/s) || [null, label, ""];
  return h("span", { class: "badge" }, h("span", {}, name), h("b", {}, value));
}

export class Gallery {
  constructor({ open, compare }) {
    this.rows = [];
    this.open = open;
    this.compare = compare;
    this.picked = null; // the ids of images to compare, while they are picked
    this.current = null;
    this.tabs = new BroadcastChannel("klein-gallery");
    this.tabs.onmessage = () => this.load();
  }

  /** Take what is kept; images that are here already stay the same objects. */
  async load() {
    await this.keep(async () => {
      const here = new Map(this.rows.map((row) => [row.id, row]));
      this.rows = (await store.all()).map((row) => here.get(row.id) ?? row);
    });
    this.show();
  }

  async add(rows) {
    const newest = this.rows[0]?.time ?? 0; // a clock that was set back changes no order
    for (const row of rows) row.time = Math.max(row.time, newest + 1);
    const ids = new Set(rows.map((row) => row.id)); // another tab may have drawn the same job
    this.rows = [...rows, ...this.rows.filter((row) => !ids.has(row.id))];
    const gone = store.surplus(this.rows).map((row) => row.id);
    this.rows = this.rows.filter((row) => !gone.includes(row.id));
    this.show();
    await this.change(async () => {
      await store.remove(gone);
      await store.add(rows);
    });
  }

  async remove(row) {
    this.rows = this.rows.filter((kept) => kept.id !== row.id);
    this.show();
    await this.change(() => store.remove([row.id]));
  }

  async change(work) {
    if (await this.keep(work)) this.tabs.postMessage("changed");
  }

  /** Whether the browser did `work` on what it keeps; it is told once why not. */
  async keep(work) {
    try {
      await work();
      return true;
    } catch (error) {
      const full = error.name === "QuotaExceededError";
      const why = full
        ? "This browser has no room left: export the gallery and clear it."
        : "This browser keeps no gallery: images last until the page is left.";
      if (full || !this.warned) toast(why, "bad");
      this.warned = true;
      return false;
    }
  }

  mark(row) {
    this.current = row?.id;
    this.show();
  }

  show() {
    const count = this.rows.length;
    const head = h(
      "div",
      { class: "row between" },
      h("h2", { id: "gallery-title" }, "Gallery", h("span", { class: "told" }, this.told())),
      count ? h("div", { class: "row" }, ...this.tools()) : null,
    );
    const none = h("p", { class: "help" }, "What you draw is kept here, in this browser only.");
    const tiles = this.rows.map((row) => this.tile(row));
    $("gallery").replaceChildren(head, count ? h("div", { class: "tiles-of-gallery" }, ...tiles) : none);
  }

  told() {
    if (this.picked) return this.picked.length ? " choose the other one" : " choose two to compare";
    return this.rows.length ? ` ${this.rows.length}` : "";
  }

  tools() {
    const picking = { glyph: "compare", class: "small", "aria-pressed": String(Boolean(this.picked)) };
    return [
      this.rows.length > 1 ? button("Compare", () => this.pick(), { ...picking, id: "compare" }) : null,
      button("Export", () => this.export(), { glyph: "download", class: "small", id: "export" }),
      button("Clear", () => this.clear(), { glyph: "trash", class: "small" }),
    ];
  }

  tile(row) {
    const picked = this.picked?.includes(row.id);
    const pressed = this.picked ? picked : row.id === this.current;
    return h(
      "button",
      {
        type: "button", class: "tile-of-gallery", "aria-pressed": String(Boolean(pressed)), title: row.parameters.prompt,
        "aria-label": `${row.label ? `${row.label}, ` : ""}${row.parameters.prompt}, seed ${row.seed}`,
        onclick: () => (this.picked ? this.choose(row) : this.open(row)),
      },
      h("img", { src: urlOf(row), alt: "", loading: "lazy" }),
      row.label ? badge(row.label) : null,
    );
  }

  pick(first) {
    this.picked = this.picked && !first ? null : first ? [first.id] : [];
    this.show();
    if (this.picked) $("gallery").scrollIntoView({ block: "nearest" });
  }

  choose(row) {
    if (this.picked.includes(row.id)) return;
    this.picked.push(row.id);
    if (this.picked.length === 2) {
      const [a, b] = this.picked.map((id) => this.rows.find((kept) => kept.id === id));
      this.picked = null;
      this.compare(a, b);
    }
    this.show();
  }

  async export() {
    const files = this.rows.map((row) => ({ name: fileName(row), blob: row.blob, time: row.time }));
    download(await zip(files), "klein-gallery.zip");
  }

  clear() {
    const sure = async () => {
      box.close();
      this.rows = [];
      this.show();
      await this.change(store.clear);
    };
    const box = dialog(
      "Clear the gallery",
      h("p", {}, `${this.rows.length} images are deleted from this browser. klein keeps none of them for long.`),
      h("div", { class: "row" }, button("Delete them", sure, { class: "danger" }), button("Keep them", () => box.close())),
    );
  }
}
