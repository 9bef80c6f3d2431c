// Elements are built from text, never from markup: what a corpus says cannot become an element.

/** Return a new element; `attributes` named on... are listeners, children are elements or text. */
function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

/** Text of the corpus: in its own direction, whatever is around it. */
function quote(text) {
  return make("bdi", {}, text);
}

function byId(id) {
  return document.getElementById(id);
}

function formatScore(value) {
  return value === null ? "–" : value.toFixed(Math.abs(value) < 0.01 && value !== 0 ? 4 : 3);
}

function formatSigned(value, signed) {
  if (value === null) return "no score";
  return (signed ? (value < 0 ? "−" : "+") : "") + formatScore(Math.abs(value));
}

function formatCount(value) {
  return value.toLocaleString("en");
}

function plural(count, noun) {
  return `${formatCount(count)} ${noun}${count === 1 ? "" : "s"}`;
}

/** Return a labelled control; `change` is called with its value. */
function makeField(title, control, change, event = "change") {
  control.addEventListener(event, () => change(control.type === "checkbox" ? control.checked : control.value));
  return control.type === "checkbox"
    ? make("label", { class: "check" }, control, title)
    : make("label", {}, title, control);
}

function makeSelect(options, value) {
  const select = make("select");
  for (const [key, title] of options) select.append(make("option", { value: key, selected: key === value }, title));
  return select;
}

/** Return buttons of which one is pressed; `choose` is called with the number of the one that is. */
function makeSwitch(title, names, pressed, choose) {
  const id = `switch-${title.toLowerCase().replaceAll(" ", "-")}`;
  const buttons = names.map((name, number) =>
    make("button", { type: "button", "aria-pressed": String(number === pressed), onclick: () => choose(number) }, quote(name)),
  );
  return make("div", { class: "group" }, make("span", { id }, title),
    make("div", { class: "switch", role: "group", "aria-labelledby": id }, buttons));
}

/** Call a function when calls have ceased for a moment. */
function settle(call, milliseconds) {
  let timer = 0;
  return (...values) => {
    clearTimeout(timer);
    timer = setTimeout(() => call(...values), milliseconds);
  };
}
