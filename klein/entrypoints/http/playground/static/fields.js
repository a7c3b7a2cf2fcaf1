// Form fields made from the request's JSON schema: label, bounds and help come from there.

import { button, h } from "./dom.js";

const LABELS = {
  num_inference_steps: "Steps",
  guidance_scale: "Guidance",
  num_images: "Images",
  max_sequence_length: "Prompt tokens",
  lora_error: "When a LoRA fails",
  output_format: "Format",
  output_quality: "Quality",
  reference_megapixels: "Megapixels of a reference",
  mask_feather: "Feather",
  mask_padding: "Padding",
};
const SLIDER_SPAN = 512;

export const label = (name) =>
  LABELS[name] || (name[0].toUpperCase() + name.slice(1)).replaceAll("_", " ");

/** The part of `anyOf` that is not null; a field of two kinds is an enum that also takes text. */
function plain(schema) {
  const kinds = (schema.anyOf || [schema]).filter((each) => each.type !== "null");
  const flat = kinds.flatMap((each) => each.anyOf || [each]);
  const named = flat.find((each) => each.enum) || flat[0];
  return { ...schema, ...named, open: flat.length > 1 };
}

/**
 * A field: { element, get(), set(value), suggest(value) }. `get` is undefined while it is left
 * open; `suggest` shows what the preset would fill in. Null for a schema that is no plain value.
 */
export function field(name, schema, docs = {}, onchange = () => {}) {
  const shape = plain(schema);
  const { make } = KINDS.find((kind) => kind.fits(shape)) || {};
  if (!make) return null;
  const id = `field-${name}`;
  const made = make(id, shape, docs, onchange);
  const help = schema.description
    ? h("p", { class: "help", id: `${id}-help` }, schema.description.replaceAll("`", ""))
    : null;
  if (help) made.input.setAttribute("aria-describedby", help.id);
  const title = h("label", { for: id }, label(name));
  made.element = h("div", { class: "field" }, title, made.row, help);
  return made;
}

const KINDS = [
  { fits: (shape) => shape.enum && !shape.open, make: choice },
  { fits: (shape) => shape.enum, make: text },
  { fits: (shape) => shape.type === "integer" || shape.type === "number", make: number },
];

function choice(id, shape, docs, onchange) {
  const open = shape.default === undefined || shape.default === null;
  const unset = open ? [h("option", { value: "" }, "the preset's")] : [];
  const options = shape.enum.map((value) =>
    h("option", { value }, docs[value] ? `${value}: ${docs[value]}` : value),
  );
  const input = h("select", { id, onchange }, ...unset, ...options);
  const set = (value) => (input.value = value ?? shape.default ?? "");
  set();
  return {
    input,
    row: input,
    set,
    get: () => (input.value === (shape.default ?? "") ? undefined : input.value),
    suggest: (value) => open && (unset[0].textContent = value ? `the preset's (${value})` : "the preset's"),
  };
}

function text(id, shape, docs, onchange) {
  const list = h(
    "datalist",
    { id: `${id}-list` },
    ...shape.enum.map((value) => h("option", { value }, docs[value] || "")),
  );
  const input = h("input", { id, list: list.id, onchange });
  const value = () => (input.value.trim() === "" ? undefined : input.value.trim());
  return {
    input,
    row: h("div", {}, input, list),
    set: (given) => (input.value = given ?? ""),
    get: () => (value() !== undefined && Number.isFinite(Number(value())) ? Number(value()) : value()),
    suggest: (given) => (input.placeholder = given ?? ""),
  };
}

function number(id, shape, docs, onchange) {
  const min = shape.minimum ?? shape.ge ?? shape.exclusiveMinimum ?? shape.gt;
  const max = shape.maximum ?? shape.le;
  const step = shape.type === "integer" ? 1 : max - min > 5 ? 0.1 : 0.05;
  const low = shape.minimum ?? shape.ge ?? step;
  const input = h("input", {
    id, type: "number", min: low, max, step: shape.type === "integer" ? 1 : "any", inputmode: "decimal",
  });
  const slider = max - min <= SLIDER_SPAN
    ? h("input", { type: "range", min: low, max, step, tabindex: -1, "aria-label": `${shape.title || id}, as a slider` })
    : null;
  const reset = button("", () => (set(), onchange()), { glyph: "x", label: `${shape.title || id}: leave it open` });
  const standard = shape.default ?? shape.description?.match(/([\d.]+) if left out/)?.[1] ?? null;
  let suggested = standard;
  const shown = () => {
    reset.hidden = input.value === "";
    if (slider) slider.value = input.value || suggested || low;
  };
  const set = (value) => {
    input.value = value === undefined || value === null || value === shape.default ? "" : value;
    shown();
  };
  const suggest = (value) => {
    suggested = value ?? standard;
    input.placeholder = suggested ?? "";
    shown();
  };
  input.addEventListener("input", () => (shown(), onchange()));
  slider?.addEventListener("input", () => ((input.value = slider.value), shown(), onchange()));
  suggest();
  return {
    input,
    row: h("div", { class: "row number" }, slider, input, reset),
    set,
    get: () => (input.value === "" ? undefined : Number(input.value)),
    suggest,
  };
}
