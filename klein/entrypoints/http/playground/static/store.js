// The gallery of this browser: images and how they were made, in IndexedDB, bounded.

export const MAX_IMAGES = 300;
export const MAX_BYTES = 300e6;

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

/** Do `work` on the table in one transaction; its result once that is kept. Throws DOMException. */
async function transaction(mode, work) {
  const opening = await database();
  return new Promise((done, fail) => {
    const running = opening.transaction("images", mode);
    const asked = work(running.objectStore("images"));
    running.oncomplete = () => done(asked?.result);
    running.onabort = () => fail(running.error); // a full disk too
  });
}

/** Every image, the newest first. */
export const all = async () => (await transaction("readonly", (table) => table.index("time").getAll())).reverse();

export const add = (rows) => transaction("readwrite", (table) => void rows.forEach((row) => table.put(row)));

export const remove = (ids) => transaction("readwrite", (table) => void ids.forEach((id) => table.delete(id)));

export const clear = () => transaction("readwrite", (table) => table.clear());

const weights = new WeakMap();

function weight(row) {
  if (!weights.has(row)) weights.set(row, row.blob.size + JSON.stringify(row.input).length);
  return weights.get(row);
}

/** Of `rows`, the newest first, those beyond the bounds; the newest always stays. */
export function surplus(rows) {
  let bytes = 0;
  return rows.filter((row, n) => {
    bytes += weight(row);
    return n > 0 && (n >= MAX_IMAGES || bytes > MAX_BYTES);
  });
}
