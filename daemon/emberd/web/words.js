// Figures in words, and elements of the page. Text from the daemon is set as text, never as HTML.

export const words = {
  bytes(value) {
    if (value == null) return "unknown";
    if (Math.abs(value) < 1e9) return `${Math.round(value / 1e6)} MB`;
    return `${(value / 1e9).toFixed(Math.abs(value) < 1e10 ? 1 : 0)} GB`;
  },
  seconds(value) {
    if (value == null) return "unknown";
    if (value >= 120) return words.duration(value);
    return value >= 10 ? `${Math.round(value)} s` : `${Number(value.toPrecision(2))} s`;
  },
  duration(value) {
    const whole = Math.max(Math.floor(value), 0);
    const [minutes, hours, days] = [Math.floor(whole / 60), Math.floor(whole / 3600), Math.floor(whole / 86400)];
    if (whole < 60) return `${whole} s`;
    if (minutes < 60) return `${minutes} min`;
    if (hours < 24) return `${hours} h ${minutes % 60} min`;
    return `${days} d ${hours % 24} h`;
  },
  share(value) {
    if (value == null) return "unknown";
    const percent = value * 100;
    return `${percent > 99.94 || percent < 0.05 ? Math.round(percent) : percent.toFixed(percent > 99 ? 1 : 0)} %`;
  },
  // A share that is mostly tiny.
  part(value) {
    return value > 0 && value < 1e-5 ? "< 0.001 %" : `${Number((value * 100).toPrecision(2))} %`;
  },
  clock(at) {
    return new Date(at * 1000).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", hourCycle: "h23" });
  },
  moment(at) {
    const day = new Date(at * 1000).toLocaleDateString([], { weekday: "short", day: "numeric", month: "short" });
    return `${day} ${words.clock(at)}`;
  },
};

export const find = (id) => document.getElementById(id);

// make("p.dim", "text", child): an element with classes, texts and children.
export function make(what, ...content) {
  const [tag, ...classes] = what.split(".");
  const element = document.createElement(tag);
  element.className = classes.join(" ");
  element.append(...content.filter((each) => each != null));
  return element;
}

// Set text only if it differs: a live region is not read again, and a selection stays.
export function tell(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

export function table(head, rows, numbers = []) {
  const cell = (tag, text, number) => {
    const made = make(numbers.includes(number) ? `${tag}.number` : tag, text);
    if (tag === "th") made.scope = "col";
    return made;
  };
  return make(
    "table",
    make("thead", make("tr", ...head.map((text, number) => cell("th", text, number)))),
    make("tbody", ...rows.map((row) => make("tr", ...row.map((text, number) => cell("td", text, number))))),
  );
}

// A box that scrolls a table.
export function box(title) {
  const scroll = make("div.scroll");
  scroll.tabIndex = 0;
  scroll.setAttribute("role", "region");
  scroll.setAttribute("aria-label", title);
  return scroll;
}

// Put a newer table into its box, in which focus and place stay.
export function put(scroll, made) {
  if (!scroll.firstChild?.isEqualNode(made)) scroll.replaceChildren(made);
}

// A table that is made when somebody opens it.
export function unfold(title, fill) {
  const details = make("details", make("summary", title));
  let scroll = null;
  details.refresh = () => {
    if (!details.open) {
      scroll?.remove();
      scroll = null;
      return;
    }
    scroll ??= details.appendChild(box(title));
    put(scroll, fill());
  };
  details.addEventListener("toggle", details.refresh);
  return details;
}

export function figures(list, entries) {
  const shown = entries.filter(([, value]) => value != null);
  if (list.children.length !== shown.length) {
    list.replaceChildren(...shown.map(() => make("div", make("dt"), make("dd"))));
  }
  shown.forEach(([name, value], number) => {
    tell(list.children[number].firstChild, name);
    tell(list.children[number].lastChild, value);
  });
}

// Left and right, first and last, on an element that says its position as a slider does.
export function steer(element, { count, move, other = () => false }) {
  element.tabIndex = 0;
  element.setAttribute("role", "slider");
  for (const each of ["aria-valuemin", "aria-valuemax", "aria-valuenow"]) element.setAttribute(each, "0");
  let at = null;
  const go = (number) => {
    at = number == null ? null : Math.min(Math.max(number, 0), count() - 1);
    const text = count() ? move(at) : null;
    element.setAttribute("aria-valuemax", String(Math.max(count() - 1, 0)));
    element.setAttribute("aria-valuenow", String(at ?? 0));
    if (text) element.setAttribute("aria-valuetext", text);
  };
  element.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const steps = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, PageDown: -10, PageUp: 10 };
    if (event.key in steps) go(at == null ? (steps[event.key] > 0 ? 0 : count() - 1) : at + steps[event.key]);
    else if (event.key === "Home") go(0);
    else if (event.key === "End") go(count() - 1);
    else if (!other(event.key, at)) return;
    event.preventDefault();
  });
  return go;
}
