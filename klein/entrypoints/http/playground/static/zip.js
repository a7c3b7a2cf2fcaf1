// A zip of files that are stored, not compressed: images are compressed already.

const TABLE = Uint32Array.from({ length: 256 }, (_, n) => {
  let value = n;
  for (let bit = 0; bit < 8; bit++) value = value & 1 ? (value >>> 1) ^ 0xedb88320 : value >>> 1;
  return value;
});

function crc32(bytes) {
  let crc = ~0;
  for (const byte of bytes) crc = (crc >>> 8) ^ TABLE[(crc ^ byte) & 255];
  return ~crc >>> 0;
}

/** `fields` are [bytes, value] pairs, little endian. */
function record(fields) {
  const out = new DataView(new ArrayBuffer(fields.reduce((sum, [bytes]) => sum + bytes, 0)));
  let at = 0;
  for (const [bytes, value] of fields) {
    if (bytes === 4) out.setUint32(at, value, true);
    else out.setUint16(at, value, true);
    at += bytes;
  }
  return out.buffer;
}

function stamp(time) {
  const at = new Date(time);
  const clock = (at.getHours() << 11) | (at.getMinutes() << 5) | (at.getSeconds() >> 1);
  return [clock, ((at.getFullYear() - 1980) << 9) | ((at.getMonth() + 1) << 5) | at.getDate()];
}

/** A zip of `files`: [{ name, blob, time }]. */
export async function zip(files) {
  const parts = [];
  const directory = [];
  let offset = 0;
  for (const { name, blob, time } of files) {
    const title = new TextEncoder().encode(name);
    const bytes = new Uint8Array(await blob.arrayBuffer());
    const [clock, date] = stamp(time);
    const common = [
      [2, 20], [2, 0x0800], [2, 0], [2, clock], [2, date],
      [4, crc32(bytes)], [4, bytes.length], [4, bytes.length], [2, title.length], [2, 0],
    ];
    const head = record([[4, 0x04034b50], ...common]);
    parts.push(head, title, bytes);
    const row = record([[4, 0x02014b50], [2, 20], ...common, [2, 0], [2, 0], [2, 0], [4, 0], [4, offset]]);
    directory.push(row, title);
    offset += head.byteLength + title.length + bytes.length;
  }
  const size = directory.reduce((sum, part) => sum + part.byteLength, 0);
  const count = files.length;
  const end = [[4, 0x06054b50], [2, 0], [2, 0], [2, count], [2, count], [4, size], [4, offset], [2, 0]];
  return new Blob([...parts, ...directory, record(end)], { type: "application/zip" });
}
