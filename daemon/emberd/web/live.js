// The live view: server-sent events that come again by themselves, and what is true of their age.

import { find, tell, words } from "./words.js";

const STALE_S = 15;
const AGAIN_MS = [500, 1000, 2000, 5000];
const LOGIN = "/emberd/login?to=/emberd/";

// Calls `show` with each view, and `again` when the daemon is back after it was away.
export function follow(show, again) {
  let last = 0;
  let tries = 0;
  let isThere = false;

  const open = () => {
    const source = new EventSource("events");
    source.onopen = () => {
      back();
      tries = 0;
    };
    source.onmessage = (event) => {
      last = performance.now();
      show(JSON.parse(event.data));
      age();
    };
    source.onerror = () => {
      // The browser tries again only after some errors, and never tells which one it was.
      source.close();
      setTimeout(ask, AGAIN_MS[Math.min(tries++, AGAIN_MS.length - 1)]);
    };
  };

  // A stream cannot say why it ended. A page without a session is sent to the login, one viewer too many asks.
  const ask = async () => {
    try {
      const answer = await fetch("status", { signal: AbortSignal.timeout(10_000) });
      if (answer.status === 401) location.assign(LOGIN);
      if (answer.ok) {
        back();
        last = performance.now();
        show(await answer.json());
      }
    } catch {
      isThere = false;
    }
    age();
    open();
  };

  const back = () => {
    if (!isThere && last) again();
    isThere = true;
  };

  const age = () => {
    const seconds = last ? (performance.now() - last) / 1000 : null;
    const isStale = seconds != null && (!isThere || seconds > STALE_S);
    const link = find("link");
    link.dataset.link = isStale ? "stale" : seconds == null ? "connecting" : "live";
    document.body.classList.toggle("stale", isStale);
    const past = seconds == null ? "" : ` · as of ${words.duration(seconds)} ago`;
    tell(link, isStale ? `${isThere ? "no news" : "emberd does not answer"}${past}` : seconds == null ? "connecting" : "live");
  };

  open();
  setInterval(age, 1000);
}

export async function ask(path, options = {}) {
  const answer = await fetch(path, { ...options, headers: { "x-emberd": "page", ...options.headers } });
  if (answer.status === 401) location.assign(LOGIN);
  const content = await answer.json();
  if (!answer.ok) throw new Error([content.error, content.remedy].filter(Boolean).join(" "));
  return content;
}
