// Two images over each other, divided by a slider, and what differs in how they were made.

import { button, h } from "./dom.js";
import { show, urlOf } from "./stage.js";
import { label } from "./fields.js";

const COMPARED = [
  "prompt", "negative_prompt", "preset", "width", "height", "num_inference_steps", "guidance_scale", "sampler",
  "schedule", "strength",
];

const loras = (row) => row.loras.map((each) => `${each.path.split("/").pop().replace(".safetensors", "")} ${each.scale}`).join(", ") || "none";

/** [name, a, b] of everything that differs. */
function differences(a, b) {
  const rows = COMPARED.map((name) => [label(name), a.parameters[name], b.parameters[name]]);
  rows.push(["Seed", a.seed, b.seed], ["LoRAs", loras(a), loras(b)], ["Speed", a.model.speed, b.model.speed]);
  return rows.filter(([, one, other]) => String(one ?? "") !== String(other ?? ""));
}

export function compare(a, b, { back, swap }) {
  const box = h("div", { class: "compared" });
  box.style.setProperty("--ratio", a.width / a.height);
  const at = (value) => box.style.setProperty("--at", `${value}%`);
  const slider = h("input", {
    type: "range", min: 0, max: 100, step: "any", value: 50, "aria-label": "Where the images divide",
    oninput: (event) => at(event.target.value),
  });
  box.append(
    h("img", { src: urlOf(b), alt: `Right: ${b.parameters.prompt}, seed ${b.seed}` }),
    h("img", { src: urlOf(a), alt: `Left: ${a.parameters.prompt}, seed ${a.seed}`, class: "left" }),
    h("i", { class: "divide" }),
    slider,
  );
  at(50);
  const cell = (value) => h("td", {}, value === "" || value === undefined || value === null ? "none" : String(value));
  const rows = differences(a, b).map(([name, one, other]) => h("tr", {}, h("th", { scope: "row" }, name), cell(one), cell(other)));
  const table = h("table", { class: "differences" },
    h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "What differs"), h("th", { scope: "col" }, "Left"), h("th", { scope: "col" }, "Right"))),
    h("tbody", {}, ...rows));
  show(
    box,
    h("div", { class: "row center" }, button("Swap", swap, { glyph: "reuse", class: "small" }), button("Done", back, { glyph: "x", class: "small" })),
    rows.length ? table : h("p", { class: "help center" }, "Both were made by the same settings."),
  );
  slider.focus({ preventScroll: true });
}
