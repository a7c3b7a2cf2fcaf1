// About the image: what its LoRAs did, how it was made, and the request to take away.

import { $, button, h, icon, seconds, toast } from "./dom.js";
import { told } from "./loras.js";
import { abridged, snippets, usesKey } from "./snippets.js";

let tab = 0;

export function show(row, routes) {
  if (!row) return $("details").replaceChildren();
  $("details").replaceChildren(
    facts(row),
    take(row, routes),
  );
}

/** Under the image: warnings, and what its LoRAs did. */
export function notes(row) {
  const mark = (glyph, text, failed) =>
    h("li", { class: failed ? "failed" : "" }, icon(glyph), h("span", {}, text));
  const failures = row.loras.map((lora) => lora.error).filter(Boolean);
  const news = row.warnings.filter((text) => !failures.some((error) => text.includes(error)));
  const warnings = news.map((text) => mark("warn", text));
  const reports = row.loras.map((lora) => mark(lora.applied ? "check" : "warn", told(lora), !lora.applied));
  return h(
    "div",
    { class: "notes" },
    reports.length ? h("ul", { class: "marks", id: "report", "aria-label": "What the LoRAs did" }, ...reports) : null,
    warnings.length ? h("ul", { class: "warned", "aria-label": "Warnings" }, ...warnings) : null,
  );
}

function facts(row) {
  const { parameters: p, timings: t, model } = row;
  const unchanged = row.unchanged_pixels === undefined ? null : `${row.unchanged_pixels.toLocaleString("en")} pixels kept bit for bit`;
  const rows = [
    ["Seed", row.seed],
    ["Size", `${row.width} × ${row.height}`],
    ["Steps", `${p.num_inference_steps}, ${p.sampler}, ${p.schedule}`],
    ["Guidance", p.guidance_scale],
    ["Preset", p.preset?.replaceAll("_", " ")],
    ["Kept", unchanged],
    ["Time", `${seconds(t.total)}: queue ${seconds(t.queue)}, denoise ${seconds(t.denoise)}`],
    ["Model", `${model.name}, ${model.speed}`],
    ["File", `${row.blob.type.split("/")[1].toUpperCase()}, ${Math.ceil(row.blob.size / 1000)} kB`],
  ];
  const pairs = rows.filter(([, value]) => value !== null && value !== undefined);
  return h(
    "section",
    { class: "card", "aria-label": "How it was made" },
    h("h2", {}, row.label || "How it was made"),
    h("p", { class: "prompt-told", dir: "auto" }, p.prompt),
    p.negative_prompt ? h("p", { class: "prompt-told not", dir: "auto" }, `not: ${p.negative_prompt}`) : null,
    h("dl", {}, ...pairs.flatMap(([name, value]) => [h("dt", {}, name), h("dd", {}, String(value))])),
  );
}

function take(row, routes) {
  const input = { ...row.input, seed: row.seed };
  delete input.num_images;
  const ways = snippets(input, routes);
  tab = Math.min(tab, ways.length - 1);
  const code = h("pre", { tabindex: 0, id: "snippet", role: "tabpanel", "aria-labelledby": `way-${tab}` }, abridged(ways[tab][1]));
  const tabs = ways.map(([name], n) =>
    h("button", {
      type: "button", role: "tab", id: `way-${n}`, "aria-selected": String(n === tab), "aria-controls": "snippet",
      tabindex: n === tab ? 0 : -1,
      onclick: () => turn(n),
      onkeydown: (event) => {
        const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
        if (by) turn((n + by + ways.length) % ways.length);
      },
    }, name),
  );
  const turn = (n) => {
    tab = n;
    for (const [at, each] of tabs.entries()) {
      each.setAttribute("aria-selected", String(at === n));
      each.tabIndex = at === n ? 0 : -1;
    }
    code.textContent = abridged(ways[n][1]);
    code.setAttribute("aria-labelledby", `way-${n}`);
    tabs[n].focus();
  };
  return h(
    "section",
    { class: "card", "aria-label": "Take away" },
    h("div", { class: "row between" }, h("h2", {}, "The same elsewhere"),
      button("Copy", () => copy(ways[tab][1]), { glyph: "copy", class: "small", id: "copy" })),
    h("div", { class: "tabs", role: "tablist", "aria-label": "The request as" }, ...tabs),
    code,
    usesKey() ? h("p", { class: "help" }, "The key is read from the variable API_KEY.") : null,
  );
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    toast("Copied");
  } catch {
    const area = h("textarea", { class: "unseen", "aria-label": "To copy" });
    area.value = text;
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy"); // pages without TLS have no clipboard API
    area.remove();
    toast(done ? "Copied" : "This browser does not let pages copy", done ? "" : "bad");
  }
}
