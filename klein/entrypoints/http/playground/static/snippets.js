// A request as something to run elsewhere.

import { BASE, key } from "./api.js";

const indent = (text, by) => text.replaceAll("\n", `\n${by}`);
const json = (value) => JSON.stringify(value, null, 2);

/** A value as Python writes it. */
function python(value, by = "") {
  if (value === null || value === undefined) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (typeof value !== "object") return JSON.stringify(value);
  const deeper = `${by}    `;
  const list = Array.isArray(value);
  const rows = list
    ? value.map((each) => python(each, deeper))
    : Object.entries(value).map(([name, each]) => `${JSON.stringify(name)}: ${python(each, deeper)}`);
  if (!rows.length) return list ? "[]" : "{}";
  const [open, close] = list ? "[]" : "{}";
  return `${open}\n${rows.map((row) => `${deeper}${row},\n`).join("")}${by}${close}`;
}

const server = () => BASE.href.replace(/\/$/, "");
const extension = (input) => ({ jpeg: "jpg", webp: "webp" })[input.output_format] || "png";

/** For a shell; a quoted here-document takes any text, and more of it than an argument may have. */
function curl(input) {
  const auth = key.get() ? " \\\n  -H \"authorization: Bearer $API_KEY\"" : "";
  return `curl -fsS ${server()}/generate \\
  -H 'content-type: application/json'${auth} \\
  -o image.${extension(input)} -d @- <<'JSON'
${json(input)}
JSON`;
}

function bento(input) {
  const token = key.get() ? ', token=os.environ["API_KEY"]' : "";
  return `${key.get() ? "import os\n\n" : ""}import bentoml

request = ${python(input)}

with bentoml.SyncHTTPClient("${server()}", timeout=600${token}) as client:
    client.generate(**request).save("image.${extension(input)}")
`;
}

const OPENAI = ["prompt", "width", "height", "num_images", "output_format"];

function openai(input) {
  const extra = Object.fromEntries(Object.entries(input).filter(([name]) => !OPENAI.includes(name)));
  const sized = input.width && input.height;
  const secret = key.get() ? 'os.environ["API_KEY"]' : '"none"';
  return `import base64
${key.get() ? "import os\n" : ""}
from openai import OpenAI

client = OpenAI(base_url="${server()}/v1", api_key=${secret})
answer = client.images.generate(
    prompt=${python(input.prompt)},
    size="${sized ? `${input.width}x${input.height}` : "auto"}",
    output_format="${input.output_format || "png"}",
    extra_body=${indent(python(extra), "    ")},
)
with open("image.${extension(input)}", "wb") as file:
    file.write(base64.b64decode(answer.data[0].b64_json))
`;
}

export const usesKey = () => Boolean(key.get());

/** [name, text] of every way that this server has; `routes` are the paths of its OpenAPI. */
export function snippets(input, routes) {
  const drawn = !input.images?.length && !input.init_image;
  return [
    ["curl", curl(input)],
    ["Python", bento(input)],
    ...(routes.includes("/v1/images/generations") && drawn ? [["OpenAI client", openai(input)]] : []),
    ["RunPod", json({ input })],
  ];
}

/** A text to look at: images in base64 are cut short. */
export const abridged = (text) =>
  text.replace(/(data:image\/\w+;base64,.{24})[A-Za-z0-9+/=]+/g, (all, head) => `${head}… (${Math.round(all.length / 1000)} kB)`);
