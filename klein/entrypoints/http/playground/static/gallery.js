// The images of this browser, newest first: open, compare two, export, clear.

import { $, button, dialog, download, h, toast } from "./dom.js";
import { fileName, urlOf } from "./stage.js";
import * as store from "./store.js";
import { zip } from "./zip.js";

export class Gallery {
  constructor({ open, compare }) {
    this.rows = [];
    this.open = open;
    this.compare = compare;
    this.picked = null; // the ids of images to compare, while they are picked
    this.current = null;
  }

  async load() {
    try {
      this.rows = await store.all();
    } catch {
      toast("This browser keeps no gallery: images last until the page is left.", "bad");
    }
    this.show();
  }

  async add(rows) {
    this.rows.unshift(...rows);
    this.current = rows[0].id;
    this.show();
    try {
      for (const row of rows) {
        const gone = new Set(await store.add(row));
        this.rows = this.rows.filter((kept) => !gone.has(kept.id));
      }
    } catch {
      toast("This browser has no room left: export the gallery and clear it.", "bad");
    }
    this.show();
  }

  async remove(row) {
    this.rows = this.rows.filter((kept) => kept.id !== row.id);
    this.show();
    await store.remove(row.id).catch(() => {});
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
    if (this.picked) return ` choose ${2 - this.picked.length} to compare`;
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
      row.label ? h("span", { class: "badge" }, row.label) : null,
    );
  }

  pick(first) {
    this.picked = this.picked && !first ? null : first ? [first.id] : [];
    this.show();
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
      await store.clear().catch(() => {});
    };
    const box = dialog(
      "Clear the gallery",
      h("p", {}, `${this.rows.length} images are deleted from this browser. klein keeps none of them for long.`),
      h("div", { class: "row" }, button("Delete them", sure, { class: "danger" }), button("Keep them", () => box.close())),
    );
  }
}
