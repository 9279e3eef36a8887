// The page at /emberd/: what emberd sees, and a few buttons. It shows no prompt and no reply; it is never sent one.

import { drawCharts, spanOf } from "./charts.js";
import { ask, follow } from "./live.js";
import { watchMap } from "./map.js";
import { box, figures, find, make, put, table, tell, words } from "./words.js";

const HISTORY_MS = 60_000;
const DOCTOR_MS = 120_000;
const LASTING = ["READY", "COOL", "STOPPED", "FAILED"];
const DAYS_MS = 600_000;
let isWarming = false;
let status = null;
let claim = null; // what the last answer said that a status can contradict
let brought = [];
let broughtAt = -DAYS_MS;

// --- now --------------------------------------------------------------------------------------------------------

function show(view) {
  const before = status;
  status = view.status;
  const { sentence } = view;
  document.body.dataset.tone = sentence.tone;
  tell(find("sentence"), sentence.text);
  tell(find("why"), sentence.why);
  tell(find("helps"), sentence.helps);
  document.title = `${sentence.text.split(". ")[0].replace(/\.$/, "")} · emberd`;
  tell(find("model"), status.model.split("/").pop());
  const next = status.warmth?.next_look_in_s;
  const look = next == null ? "" : `; looks again in ${words.duration(next)}`;
  tell(find("daemon"), `emberd ${status.version}, up ${words.duration(status.uptime_s)}, process ${status.pid}${look}`);
  enable();
  forgetAnswer();
  watchMap(status, isWarming);
  memory();
  requests();
  events(view.events);
  cost();
  if (before && before.state !== status.state && LASTING.includes(status.state)) doctor();
  if (before?.swap?.endurance_bytes !== status.swap?.endurance_bytes) showDays();
  if (!performance.getEntriesByName("shown").length) performance.mark("shown");
}

function memory() {
  const { residency, lock, memory: seen } = status;
  const engine = seen?.engine ?? {};
  const system = seen?.system ?? {};
  figures(find("figures"), [
    ["of the weights in memory", residency && words.share(residency.share)],
    ["lock", lock && { HELD: "held", PARTIAL: "in part", ABSENT: "none" }[lock.state]],
    ["the engine holds", engine.resident_bytes != null ? words.bytes(engine.resident_bytes) : null],
    ["of it in swap", engine.swapped_bytes != null ? words.bytes(engine.swapped_bytes) : null],
    ["available to programs", system.available_bytes != null ? words.bytes(system.available_bytes) : null],
    ["memory pressure", system.pressure && system.pressure !== "unknown" ? system.pressure : null],
  ]);
}

function requests() {
  const list = status.requests ?? [];
  const names = { waits: "waits", reads: "reads the prompt", writes: "writes" };
  const rows = list.map((each) => [
    words.duration(each.age_s),
    names[each.state] ?? each.state,
    each.tokens == null ? "–" : String(each.tokens),
  ]);
  const shown = rows.length ? table(["Age", "State", "Tokens"], rows, [2]) : make("p.dim", "None.");
  if (find("requests").textContent !== shown.textContent) find("requests").replaceChildren(shown);
}

function events(list) {
  const lines = list.toReversed().map((event) => {
    const at = Date.parse(event.at) / 1000;
    const time = make("time", words.clock(at));
    time.dateTime = event.at;
    time.title = words.moment(at);
    return make(`li.${event.level}`, time, make("span", event.text));
  });
  const shown = find("events");
  if (shown.textContent === lines.map((line) => line.textContent).join("")) return;
  shown.replaceChildren(...lines);
  shown.tabIndex = shown.scrollHeight > shown.clientHeight ? 0 : -1;
}

function cost() {
  const { warmth, swap } = status;
  const today = warmth?.cost_today;
  figures(find("cost"), [
    ["passes", today && String(today.passes)],
    ["processor time", today && words.seconds(today.cpu_s)],
    ["of the engine, for replays", today && words.seconds(today.engine_s)],
    ["read from the disk", today && words.bytes(today.read_bytes)],
    ["written to swap", swap && words.bytes(swap.written_today_bytes)],
    ["of it by the engine", swap && words.bytes(swap.engine_idle_bytes + swap.engine_busy_bytes)],
    ["of the SSD's rating", swap && words.part(swap.share_of_endurance)],
  ]);
}

// --- buttons ----------------------------------------------------------------------------------------------------

const buttons = [...document.querySelectorAll("[data-do]")];

function enable() {
  const hasEngine = status.state === "READY" && Boolean(status.warmth);
  const can = { warm: hasEngine && !isWarming, pause: hasEngine, cool: hasEngine, resume: held() !== "resume", restart: true };
  for (const button of buttons) button.disabled = !can[button.dataset.do];
}

// What was said of a pause is true until the status shows it and later does not.
function forgetAnswer() {
  if (!claim) return;
  if (held() === claim.held) claim.isSeen = true;
  else if (claim.isSeen) {
    tell(find("answer"), "");
    claim = null;
  }
}

function held() {
  if (status.state === "COOL" || status.warmth?.cool_for_s) return "cool";
  return status.warmth?.paused_for_s ? "pause" : "resume";
}

async function act(verb) {
  if (verb === "restart" && !(await isSure())) return;
  const body = verb === "pause" || verb === "cool" ? JSON.stringify({ seconds: Number(find("for").value) }) : "{}";
  claim = null;
  tell(find("answer"), verb === "warm" ? "Warming …" : "");
  isWarming = verb === "warm";
  if (isWarming) watchMap(status, true);
  enable();
  try {
    const answer = await ask(`do/${verb}`, { method: "POST", body, headers: { "content-type": "application/json" } });
    tell(find("answer"), said(verb, answer));
    if (["pause", "cool", "resume"].includes(verb)) claim = { held: verb, isSeen: false };
  } catch (error) {
    tell(find("answer"), `That did not work: ${error.message}`);
  }
  if (verb === "warm") isWarming = false;
  await ask("status").then(show, enable); // at once, not with the next event
}

function said(verb, answer) {
  const minutes = words.duration(answer.seconds ?? 0);
  if (verb === "warm") return answer.steps.length ? `Done in ${words.seconds(answer.seconds)}.` : `Nothing was done: ${answer.reason.replaceAll("_", " ")}.`;
  if (verb === "pause") return `Paused for ${minutes}.`;
  if (verb === "cool") return `Cool for ${minutes}${answer.is_put_off ? ", as soon as no request runs" : ""}.`;
  return verb === "resume" ? "It goes on." : "The engine restarts.";
}

function isSure() {
  const dialog = find("sure");
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true });
  });
}

for (const button of buttons) button.addEventListener("click", () => act(button.dataset.do));

// --- doctor and report ------------------------------------------------------------------------------------------

async function doctor() {
  try {
    const { shown } = await ask("doctor");
    find("doctor").replaceChildren(
      ...(shown.length ? shown.map(condition) : [make("p", "Nothing is wrong.")]),
    );
  } catch (error) {
    find("doctor").replaceChildren(make("p.dim", `Not examined: ${error.message}`));
  }
}

function condition(found) {
  return make(
    `div.condition.${found.severity}`,
    make("h3", `${found.title} `, make("span.dim", `(${found.severity})`)),
    make("p", found.evidence),
    found.remedy ? make("p.dim", found.remedy) : null,
  );
}

find("copy").addEventListener("click", async () => {
  const place = find("report");
  try {
    const { text } = await ask("report");
    place.textContent = text;
    place.hidden = false;
    await navigator.clipboard.writeText(text);
    tell(find("copied"), "Copied.");
  } catch {
    // A page without encryption on the network has no clipboard.
    tell(find("copied"), place.hidden ? "There is no report now." : "Here it is, to copy by hand.");
    getSelection().selectAllChildren(place);
  }
});

// --- the past ---------------------------------------------------------------------------------------------------

async function history(keepsZoom = false) {
  const range = document.querySelector("input[name=range]:checked").value;
  const [from, to] = spanOf(range);
  try {
    const past = await ask(`history?since=${Math.floor(from)}&until=${Math.ceil(to)}`);
    if (range !== document.querySelector("input[name=range]:checked").value) return;
    drawCharts(past, [from, to], { keepsZoom });
    tell(find("charts-unknown"), "");
  } catch (error) {
    tell(find("charts-unknown"), `No history: ${error.message}`);
  }
}

// What each day has brought and cost. The estimates are named as such.
async function days() {
  const until = Math.ceil(Date.now() / 1000);
  const past = await ask(`history?since=${until - 7 * 86_400}&until=${until}&step=86400`).catch(() => null);
  if (!past?.days.length) return;
  brought = past.days;
  broughtAt = performance.now();
  showDays();
}

// On a phone a cell may have two lines, cut behind a comma.
const inParts = (cells) => cells.map((text) => text.replaceAll(/([^,]) /g, "$1\u00a0"));

function showDays() {
  if (!brought.length) return;
  const rating = status?.swap?.endurance_bytes;
  const row = (day) => inParts([
    new Date(`${day.day}T12:00`).toLocaleDateString([], { weekday: "short", day: "numeric", month: "short" }),
    words.share(day.warm_share),
    day.first_tokens ? `${day.first_tokens}, ${words.seconds(day.median_s)}` : "–",
    day.spared_s == null ? "–" : `${words.duration(day.spared_s)}, ${words.bytes(day.spared_bytes)}`,
    words.bytes(day.swap_bytes) + (rating && day.swap_bytes ? `, ${words.part(day.swap_bytes / rating)}` : ""),
  ]);
  const head = ["Day", "Warm", "Late first tokens, median", "Spared, estimate", "Swap, of the SSD's rating"];
  if (!find("days").querySelector(".scroll")) find("days").replaceChildren(box("Day by day"));
  put(find("days").querySelector(".scroll"), table(head, brought.map(row).reverse(), [1, 2, 3, 4]));
  const hasCold = brought.some((day) => day.cold_s != null);
  tell(find("days-note"), hasCold ? "" : "What was spared is not known: no first token of a cold model was seen yet.");
}

find("range").addEventListener("change", () => history());
setInterval(() => document.hidden || history(true), HISTORY_MS);
setInterval(() => document.hidden || performance.now() - broughtAt < DAYS_MS || days(), HISTORY_MS);
setInterval(() => document.hidden || doctor(), DOCTOR_MS);
follow(show, () => history(true));
history().then(days).then(doctor); // one after another: the charts come first
