// The settings inside an image: klein's own, or those of A1111 and its kin.

const MAX_TEXT = 1e6;
const EDGE = 1e5; // bytes at either end of a file, where its XMP is
const ascii = (bytes) => String.fromCharCode(...bytes);

/**
 * What the parameters inside an image say, as of `settingsOf`; null without any that can be read.
 * { own: true } alone is an image that klein drew where settings are kept out of files.
 */
export async function settingsIn(file) {
  try {
    const bytes = new Uint8Array(await file.arrayBuffer());
    const text = await textOf(bytes);
    if (!text) return isKleins(bytes) ? { own: true } : null;
    return text.length <= MAX_TEXT ? settingsOf(text) : null;
  } catch {
    return null; // made up, or cut off
  }
}

/** Whether its XMP says that klein made it. */
const isKleins = (bytes) =>
  [bytes.subarray(0, EDGE), bytes.subarray(-EDGE)].some((part) =>
    new TextDecoder("latin1").decode(part).includes('xmp:CreatorTool="klein '),
  );

/** The text of parameters in a PNG, JPEG or WebP, or null. */
async function textOf(bytes) {
  if (ascii(bytes.subarray(1, 4)) === "PNG") return pngText(bytes);
  if (bytes[0] === 0xff && bytes[1] === 0xd8) return jpegText(bytes);
  if (ascii(bytes.subarray(0, 4)) === "RIFF") return webpText(bytes);
  return null;
}

const viewOf = (bytes) => new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);

async function pngText(bytes) {
  const view = viewOf(bytes);
  for (let at = 8; at + 12 <= bytes.length; ) {
    const size = view.getUint32(at);
    const kind = ascii(bytes.subarray(at + 4, at + 8));
    const data = bytes.subarray(at + 8, at + 8 + size);
    const end = data.subarray(0, 80).indexOf(0); // where the keyword ends
    if (/^[tiz](EXt|TXt)$/.test(kind) && ascii(data.subarray(0, Math.max(0, end))) === "parameters") {
      return chunkText(kind, data.subarray(end + 1));
    }
    at += size + 12;
  }
  return null;
}

async function chunkText(kind, rest) {
  if (kind === "tEXt") return new TextDecoder("latin1").decode(rest);
  if (kind === "zTXt") return new TextDecoder("latin1").decode(await inflate(rest.subarray(1)));
  const packed = rest[0] === 1;
  let at = rest.indexOf(0, 2) + 1; // after the language
  at = rest.indexOf(0, at) + 1; // after the translated keyword
  const text = rest.subarray(at);
  return new TextDecoder().decode(packed ? await inflate(text) : text);
}

/** Unpacked bytes, as far as they may be parameters. */
async function inflate(bytes) {
  const reader = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate")).getReader();
  const parts = [];
  for (let size = 0; size <= 4 * MAX_TEXT; ) {
    const { value, done } = await reader.read();
    if (done) break;
    parts.push(value);
    size += value.length;
  }
  await reader.cancel();
  return new Uint8Array(await new Blob(parts).arrayBuffer());
}

function jpegText(bytes) {
  const view = viewOf(bytes);
  for (let at = 2; at + 4 <= bytes.length && bytes[at] === 0xff && bytes[at + 1] !== 0xda; ) {
    const size = view.getUint16(at + 2);
    const body = bytes.subarray(at + 4, at + 2 + size);
    if (bytes[at + 1] === 0xe1 && ascii(body.subarray(0, 4)) === "Exif") return exifText(body.subarray(6));
    at += 2 + size;
  }
  return null;
}

function webpText(bytes) {
  const view = viewOf(bytes);
  for (let at = 12; at + 8 <= bytes.length; ) {
    const size = view.getUint32(at + 4, true);
    const body = bytes.subarray(at + 8, at + 8 + size);
    if (ascii(bytes.subarray(at, at + 4)) === "EXIF") {
      return exifText(ascii(body.subarray(0, 4)) === "Exif" ? body.subarray(6) : body);
    }
    at += 8 + size + (size & 1);
  }
  return null;
}

/** The user comment (0x9286) of an EXIF block. */
function exifText(tiff) {
  const view = viewOf(tiff);
  const little = tiff[0] === 0x49;
  const entry = (start, tag) => {
    const count = view.getUint16(start, little);
    for (let n = 0; n < count; n++) {
      const at = start + 2 + 12 * n;
      if (view.getUint16(at, little) === tag) return at;
    }
    return null;
  };
  const pointer = entry(view.getUint32(4, little), 0x8769);
  const comment = pointer && entry(view.getUint32(pointer + 8, little), 0x9286);
  if (!comment) return null;
  const start = view.getUint32(comment + 8, little);
  const data = tiff.subarray(start, start + view.getUint32(comment + 4, little));
  const head = ascii(data.subarray(0, 7));
  const text = data.subarray(8);
  if (head === "UNICODE") return new TextDecoder(text[0] === 0 ? "utf-16be" : "utf-16le").decode(text);
  return new TextDecoder().decode(text);
}

const NEGATIVE = "\nNegative prompt: ";
const MINIMAL = /^Steps: [^\n]*, Version: klein \S+$/;
const NOT_INPUT = ["lora_reports", "images", "init_image", "mask", "extend"];
const HELD = ["reference_megapixels", "strength", "mask_feather", "mask_padding"];

/**
 * A text as a request: { input, own, missing }. `own` is whether klein wrote it, `missing` the
 * pictures that it was made from, which no file carries. Null for a text of another kind.
 */
function settingsOf(text) {
  const own = text.match(/, klein: ("(?:[^"\\]|\\.)*")$/);
  if (own) return kleins(text, JSON.parse(JSON.parse(own[1])));
  return MINIMAL.test(text) ? { own: true } : foreign(text);
}

function kleins(text, input) {
  if (![input.prompt, input.negative_prompt].every(Number.isSafeInteger)) return null;
  const codepoints = Array.from(text); // klein counts characters, JavaScript UTF-16 units
  const start = input.prompt + NEGATIVE.length;
  const negative = codepoints.slice(start, start + input.negative_prompt).join("");
  const prompt = codepoints.slice(0, input.prompt).join("");
  const missing = [
    ...(input.images || []).map((_, n) => `reference ${n + 1}`),
    ...(input.init_image ? ["the init image"] : []),
    ...(input.mask ? ["the mask"] : []),
  ];
  const drop = missing.length ? [...NOT_INPUT, ...HELD] : NOT_INPUT;
  const kept = Object.entries(input).filter(([name, value]) => value !== null && !drop.includes(name));
  const whole = { ...Object.fromEntries(kept), prompt, negative_prompt: negative };
  if (!negative) delete whole.negative_prompt;
  return { input: whole, own: true, missing };
}

function foreign(text) {
  const lines = text.trim().split("\n");
  const last = lines.pop() || "";
  const told = Object.fromEntries(
    [...last.matchAll(/(?<=^|, )([\w ]+): ("(?:[^"\\]|\\.)*"|[^,]*)/g)].map((hit) => [hit[1].trim(), hit[2]]),
  );
  if (!("Steps" in told)) return null;
  const at = lines.findIndex((line) => line.startsWith("Negative prompt: "));
  const [prompt, loras] = withoutLoras((at < 0 ? lines : lines.slice(0, at)).join("\n"));
  const negative = at < 0 ? "" : lines.slice(at).join("\n").slice("Negative prompt: ".length);
  const [width, height] = (told.Size || "").split("x").map(Number);
  const number = (name) => (name in told ? Number(told[name]) : NaN);
  const all = {
    prompt,
    negative_prompt: negative,
    num_inference_steps: number("Steps"),
    guidance_scale: number("CFG scale"),
    seed: number("Seed"),
    width: width ?? NaN,
    height: height ?? NaN,
    loras,
  };
  const given = Object.entries(all).filter(([name, value]) => name === "prompt" || (value !== "" && !Number.isNaN(value)));
  return { input: Object.fromEntries(given), own: false, missing: [] };
}

/** A prompt without its `<lora:name:scale>`, and the LoRAs that they name. */
function withoutLoras(prompt) {
  const loras = [];
  const rest = prompt.replace(/<lora:([^:<>]{1,200})(?::([^:<>]{0,20}))?[^<>]{0,100}>/g, (_, name, scale) => {
    loras.push({ path: `${name}.safetensors`, scale: Number(scale ?? 1) });
    return "";
  });
  return [loras.length ? rest.replace(/^[\s,]+|[\s,]+$/g, "") : rest, loras];
}

// -- what a file claims, held against the schema -------------------------------------------------

const KINDS = {
  string: (value, { enum: known, maxLength = Infinity }) =>
    typeof value === "string" && value.length <= maxLength && (!known || known.includes(value)),
  number: (value, { minimum = -Infinity, maximum = Infinity }) => Number.isFinite(value) && value >= minimum && value <= maximum,
  integer: (value, shape) => Number.isInteger(value) && KINDS.number(value, shape),
  null: () => false,
};
const shapes = (schema) => (schema.anyOf ? schema.anyOf.flatMap(shapes) : [schema]);
const fits = (value, schema) => shapes(schema).some((shape) => KINDS[shape.type]?.(value, shape));

/** [what of `input` the request's schema takes, the names of the rest]. */
export function fitting(input, { properties, $defs }) {
  const taken = {};
  const refused = [];
  const take = (into, from, known, told) => {
    for (const [name, value] of Object.entries(from)) {
      if (!Object.hasOwn(known, name) || value === null) continue;
      if (fits(value, known[name])) into[name] = value;
      else refused.push(told(name));
    }
  };
  const { loras, ...plain } = input;
  take(taken, plain, properties, (name) => name.replaceAll("_", " "));
  const lora = $defs.LoraRequest.properties;
  if (Array.isArray(loras)) {
    taken.loras = [];
    for (const claimed of loras.slice(0, properties.loras.maxItems)) {
      const own = {};
      take(own, Object(claimed), lora, (name) => `a LoRA’s ${name}`);
      if (own.path) taken.loras.push(own);
    }
  }
  return [taken, [...new Set(refused)]];
}
