// The residency map: each file of the engine as a strip, a cell a layer, filled by what is in memory.

import { find, make, steer, table, tell, unfold, words } from "./words.js";

const LIVE_MS = 250;
const IDLE_MS = 10_000;
const strips = new Map();
let timer = 0;
let asked = 0;
let isBusy = false;
let lockedShare = 0;
let lockedOf = new Map();

export function watchMap(status, isWarming) {
  const lock = status.lock;
  const isWhole = status.warmth?.is_locked_outside || lock?.state === "HELD";
  lockedShare = isWhole ? 1 : lock?.state === "PARTIAL" ? (lock.locked_bytes ?? 0) / (lock.needed_bytes || 1) : 0;
  lockedOf = new Map((status.files ?? []).map((file) => [file.path.split("/").pop(), file.locked_bytes / file.size_bytes]));
  const copied = (status.files ?? []).filter((file) => file.held === "copied").map((file) => file.path.split("/").pop());
  tell(find("copied-files"), copied.length ? `Copied into the engine's own memory, so not shown: ${copied.join(", ")}.` : "");
  const was = isBusy;
  isBusy = isWarming || Boolean(status.warmth?.progress) || status.state === "LOADING";
  if (!timer || (isBusy && !was)) look();
}

async function look() {
  clearTimeout(timer);
  const mine = ++asked;
  timer = -1;
  if (!document.hidden) {
    try {
      const answer = await fetch("layers", { signal: AbortSignal.timeout(IDLE_MS) });
      if (answer.ok) draw(await answer.json());
    } catch {
      // The live view says that the daemon does not answer.
    }
  }
  if (mine === asked) timer = setTimeout(look, isBusy ? LIVE_MS : IDLE_MS);
}

function draw(seen) {
  const shown = seen.files.filter((file) => file.layers.length);
  for (const [name, strip] of strips) {
    if (!shown.some((file) => file.name === name)) {
      strip.root.remove();
      strips.delete(name);
    }
  }
  for (const file of shown) {
    if (strips.get(file.name)?.layers.length !== file.layers.length) {
      strips.get(file.name)?.root.remove();
      strips.set(file.name, newStrip(file));
    }
    fill(strips.get(file.name), file.layers);
  }
  tell(find("map-unknown"), shown.length ? "" : `No map: ${seen.unknown}.`);
  performance.mark("map");
}

const nameOf = (layer) => layer.name.replace(/^blk\.(\d+)$/, "layer $1").replaceAll("_", " ");

function newStrip(file) {
  const strip = { root: make("div.map"), row: make("div.strip"), out: make("output"), layers: file.layers, cells: [] };
  Object.assign(strip, { name: file.name, role: file.role });
  strip.title = make("span", file.role === "model" ? "The model, layer by layer" : `${file.role.replaceAll("_", " ")}: ${file.name}`);
  strip.row.setAttribute("aria-label", strip.title.textContent);
  strip.cells = file.layers.map(() => make("div.cell", make("i")));
  strip.row.append(...strip.cells);
  strip.table = unfold("As a table", () =>
    table(
      ["Layer", "In memory", "Size"],
      strip.layers.map((layer) => [nameOf(layer), words.share(layer.share), words.bytes(layer.total_bytes)]),
      [1, 2],
    ),
  );
  strip.root.append(make("div.of", strip.title, strip.out), strip.row, strip.table);
  find("maps").append(strip.root);
  const move = (at) => {
    strip.cells.forEach((cell, number) => cell.classList.toggle("at", number === at));
    strip.at = at;
    return say(strip);
  };
  const go = steer(strip.row, { count: () => strip.layers.length, move });
  const point = (event) => {
    const at = strip.cells.indexOf(event.target.closest(".cell"));
    if (at >= 0) go(at);
  };
  strip.row.addEventListener("pointermove", point);
  strip.row.addEventListener("pointerdown", point);
  strip.row.addEventListener("pointerleave", () => go(null));
  strip.row.addEventListener("blur", () => go(null));
  return strip;
}

function fill(strip, layers) {
  layers.forEach((layer, number) => {
    const cell = strip.cells[number];
    const before = strip.layers[number].share;
    const isReading = isBusy && layer.share < 1 && before != null && layer.share > before;
    const locked = isLocked(strip);
    cell.className = "cell";
    cell.classList.toggle("at", number === strip.at);
    cell.classList.toggle("unknown", layer.share == null);
    cell.classList.toggle("reading", isReading);
    cell.classList.toggle("locked", locked && !isReading);
    cell.firstChild.style.transform = `scaleY(${layer.share ?? 0})`;
    cell.style.flexGrow = String(Math.sqrt(layer.total_bytes || 1));
  });
  strip.layers = layers;
  tell(strip.out, say(strip));
  strip.row.setAttribute("aria-valuetext", say(strip));
  if (strip.table.open) strip.table.refresh();
}

// The model's lock is that of the verdict; of another file the system tells how much is locked.
const isLocked = (strip) => (strip.role === "model" ? lockedShare : (lockedOf.get(strip.name) ?? 0)) >= 0.99;

function say(strip) {
  const layer = strip.layers[strip.at ?? -1];
  if (layer) {
    const text = `${nameOf(layer)}: ${words.share(layer.share)} of ${words.bytes(layer.total_bytes)} in memory`;
    tell(strip.out, text);
    return text;
  }
  const known = strip.layers.filter((each) => each.share != null);
  const total = known.reduce((sum, each) => sum + each.total_bytes, 0);
  const here = known.reduce((sum, each) => sum + each.total_bytes * each.share, 0);
  const gone = known.filter((each) => each.share < 0.5).length;
  const text = `${words.share(total ? here / total : null)} of ${words.bytes(total)} in memory` +
    (isLocked(strip) ? ", locked" : "") + (gone ? `; ${gone} of ${known.length} layers missing` : "");
  tell(strip.out, text);
  return text;
}
