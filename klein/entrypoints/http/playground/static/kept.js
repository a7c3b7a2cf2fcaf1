// What this tab and this browser remember. One that keeps nothing remembers until the page is left.

const memory = new Map();

function shelf(name) {
  const area = () => window[name]; // where storage is denied, looking at it throws already
  return {
    get(item) {
      try {
        return area().getItem(item) ?? memory.get(name + item) ?? null;
      } catch {
        return memory.get(name + item) ?? null;
      }
    },
    set(item, text) {
      try {
        area().setItem(item, text);
      } catch {
        memory.set(name + item, text); // denied or full
      }
    },
    remove(item) {
      memory.delete(name + item);
      try {
        area().removeItem(item);
      } catch {
        // it was in memory only
      }
    },
    /** What was set as JSON; null for anything else. */
    read(item) {
      try {
        return JSON.parse(this.get(item));
      } catch {
        return null;
      }
    },
  };
}

export const tab = shelf("sessionStorage");
export const browser = shelf("localStorage");
