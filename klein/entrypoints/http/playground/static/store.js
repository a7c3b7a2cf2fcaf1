// The gallery of this browser: images and how they were made, in IndexedDB, bounded.

export const MAX_IMAGES = 300;
export const MAX_BYTES = 300e6;

const request = (asked) =>
  new Promise((done, fail) => {
    asked.onsuccess = () => done(asked.result);
    asked.onerror = () => fail(asked.error);
  });

let opened;

function database() {
  opened ??= new Promise((done, fail) => {
    const asked = indexedDB.open("klein", 1);
    asked.onupgradeneeded = () => {
      asked.result.createObjectStore("images", { keyPath: "id" }).createIndex("time", "time");
    };
    asked.onsuccess = () => done(asked.result);
    asked.onerror = () => fail(asked.error);
  });
  return opened;
}

async function table(mode) {
  return (await database()).transaction("images", mode).objectStore("images");
}

/** Every image, the newest first. */
export async function all() {
  const rows = await request((await table("readonly")).index("time").getAll());
  return rows.reverse();
}

export const weight = (row) => row.blob.size + JSON.stringify(row.input).length;

/** Keep an image; returns the ids of those that had to make room. */
export async function add(row) {
  await request((await table("readwrite")).put(row));
  let bytes = 0;
  const rows = await all();
  const gone = rows.filter((kept, n) => {
    bytes += weight(kept);
    return n > 0 && (n >= MAX_IMAGES || bytes > MAX_BYTES);
  });
  for (const old of gone) await remove(old.id);
  return gone.map((old) => old.id);
}

export async function remove(id) {
  await request((await table("readwrite")).delete(id));
}

export async function clear() {
  await request((await table("readwrite")).clear());
}
