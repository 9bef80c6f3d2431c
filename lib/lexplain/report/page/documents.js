// Documents: their words by the score that a method gives them for a label.

const STRENGTHS = [0.05, 0.15, 0.3, 0.5, 0.75]; // of a document's largest score; below the first a word is left as it is
const STRONGEST = 8;

let showDocument = null;

/** A document's explanations are shown one at a time: by label, then by method. */
function labelsOf(one) {
  return [...new Set(one.explained.map((each) => each.label))];
}

/** Tell whether the model's first label is gold: null where there are no gold labels. */
function isRight(one) {
  return one.explained.length && one.gold ? one.gold.includes(one.predicted) : null;
}

function showDocuments() {
  let wanted = "", kind = "all", label = null, method = 0, marked = null, number = -1;
  let rows = [];
  const list = make("div", { role: "listbox", "aria-label": "Documents", tabindex: "0" });
  byId("document-list").append(list);
  const kinds = [["all", "all"], ["right", "predicted as gold"], ["wrong", "predicted otherwise"], ["compared", "explained by several methods"]];
  byId("document-controls").append(
    makeField("Find in documents", make("input", { type: "search", id: "document-filter" }), settle((value) => { wanted = fold(value); draw(); }, 120), "input"),
    makeField("Show", makeSelect(kinds, kind), (value) => { kind = value; draw(); }));

  function fits(one) {
    if (state.chosen !== null && !labelsOf(one).includes(report.classes[state.chosen].label)) return false;
    if (kind === "right" && isRight(one) !== true) return false;
    if (kind === "wrong" && isRight(one) !== false) return false;
    if (kind === "compared" && new Set(one.explained.map((each) => each.method)).size < 2) return false;
    return one.search.includes(wanted);
  }

  function draw() {
    rows = report.documents.map((one, place) => place).filter((place) => fits(report.documents[place]));
    byId("document-count").textContent = `${formatCount(rows.length)} of ${plural(report.documents.length, "document")}`
      + (state.chosen === null ? "" : ` with ${report.classes[state.chosen].label} among their explained labels`);
    list.replaceChildren(...rows.map(makeOption));
    if (!rows.includes(number)) {
      marked = null;
      select(rows.length ? rows[0] : -1);
    } else select(number);
  }

  function makeOption(place) {
    const one = report.documents[place];
    const right = isRight(one);
    return make("div", { role: "option", id: `option-${place}`, "aria-selected": "false", onclick: () => { marked = null; select(place); } },
      make("div", { class: "name" }, quote(one.id), make("span", { class: right === false ? "badge wrong" : "badge" }, (right === false ? "✗ " : "") + (one.predicted ?? ""))),
      make("div", { class: "start" }, quote(clean(one.text.slice(0, 110)))));
  }

  function select(place, scroll = false) {
    const [before, now] = [byId(`option-${number}`), byId(`option-${place}`)];
    if (before) before.setAttribute("aria-selected", "false");
    number = place;
    if (now) {
      now.setAttribute("aria-selected", "true");
      list.setAttribute("aria-activedescendant", now.id);
      if (scroll) byId("document-list").scrollTop = now.offsetTop - byId("document-list").offsetTop - 80;
    } else list.removeAttribute("aria-activedescendant");
    drawDocument();
  }

  list.addEventListener("keydown", (event) => {
    const at = rows.indexOf(number);
    const to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: rows.length - 1 }[event.key];
    if (to === undefined || !rows.length) return;
    event.preventDefault();
    marked = null;
    select(rows[Math.min(rows.length - 1, Math.max(0, to))], true);
  });

  function drawDocument() {
    const place = byId("document");
    const one = report.documents[number];
    if (!one) return place.replaceChildren(make("p", { class: "soft" }, report.documents.length ? "No document fits." : "No document of the run is explained."));
    const labels = labelsOf(one);
    const preferred = state.chosen === null ? label : report.classes[state.chosen].label;
    const shownLabel = labels.includes(label) ? label : labels.includes(preferred) ? preferred : one.predicted;
    const made = one.explained.filter((each) => each.label === shownLabel);
    const shown = made.find((each) => each.method === method) ?? made[0];
    const { signed, title } = report.methods[shown.method];
    const redraw = (focus) => { drawDocument(); place.querySelector(`${focus} [aria-pressed="true"]`)?.focus(); };
    const turn = (step, name) => make("button", { type: "button", class: "plain-button", "aria-label": name, disabled: rows[rows.indexOf(number) + step] === undefined,
      onclick: () => { marked = null; select(rows[rows.indexOf(number) + step], true); } }, step > 0 ? "→" : "←");
    place.replaceChildren(
      make("header", {}, make("h3", {}, quote(one.id)), make("div", { class: "turn" }, turn(-1, "Previous document"), turn(1, "Next document"))),
      make("p", { class: "meta" }, describe(one, shown)),
      make("div", { class: "controls" },
        makeSwitch("Label", labels.map((each) => nameLabel(one, each)), labels.indexOf(shownLabel), (chosen) => { label = labels[chosen]; redraw("[aria-labelledby=switch-label]"); }),
        makeSwitch("Method", made.map((each) => report.methods[each.method].title), made.indexOf(shown), (chosen) => { method = made[chosen].method; redraw("[aria-labelledby=switch-method]"); })),
      make("p", { class: "paper" }, "Label ", quote(shownLabel), `, method ${title}`),
      makeLegend(signed),
      makeText(one, shown, signed, `${one.id}, words by score for ${shownLabel}, method ${title}`, marked),
      makeStrongest(one, shown, signed));
  }

  showDocument = (place, chosen, word) => {
    [label, marked, method] = [chosen, word, 0];
    if (!rows.includes(place)) {
      [wanted, kind] = ["", "all"];
      byId("document-filter").value = "";
      byId("document-controls").querySelector("select").value = "all";
      number = place;
      if (state.chosen !== null && report.classes[state.chosen].label !== chosen) chooseClass(null);
      else draw();
    }
    select(place, true);
  };
  onChoice(draw);
}

function openDocument(place, label, word) {
  showDocument(place, label, word);
  byId("documents").scrollIntoView();
  byId("document").querySelector(".text").focus({ preventScroll: true });
}

function nameLabel(one, label) {
  const probability = one.explained.find((each) => each.label === label).probability;
  return label + (probability === null ? "" : ` ${probability.toFixed(2)}`);
}

function describe(one, shown) {
  const parts = [`predicted ${one.predicted} by the model of split ${one.split}`];
  if (one.gold) parts.push(one.gold.length ? `gold ${one.gold.join(", ")}` : "no gold label");
  if (!shown.converged) parts.push("this explanation did not meet the method’s own rule");
  if (one.cut) parts.push(`the first ${formatCount([...one.text].length)} of ${formatCount(one.characters)} characters`);
  return parts.join(" · ");
}

function makeLegend(signed) {
  const keys = signed === false ? [["size-2", "a little"], ["size-5", "much"]]
    : [["for-5", "speaks for the label"], ["for-2", "a little"], ["against-2", "a little"], ["against-5", "speaks against it"]];
  return make("p", { class: "legend" },
    signed === false ? "This method’s scores have no sign: they tell how much a word counts, not for or against." : "Solid underline: for. Dashed: against.",
    keys.map(([style, title]) => make("span", { class: `key ${style}` }, title)),
    make("span", { class: "unread" }, "Grey: not read by the model."));
}

/** Return the style of a score, by its share of the largest of the document. */
function styleOf(score, largest, signed) {
  if (score === null || !largest) return null;
  const share = Math.abs(score) / largest;
  const strength = STRENGTHS.filter((least) => share >= least).length;
  if (!strength) return null;
  return `${signed === false ? "size" : score < 0 ? "against" : "for"}-${strength}`;
}

/** Return the text: one stop of the tab key, whose words the arrow keys walk through. */
function makeText(one, shown, signed, label, marked) {
  const { scores } = shown;
  const largest = scores.reduce((most, score) => Math.max(most, Math.abs(score ?? 0)), 0);
  const text = make("div", { class: "text", tabindex: "0", role: "group", "aria-label": label, dir: "auto" });
  const parts = [];
  let end = 0;
  one.spans.forEach(([start, stop], word) => {
    if (start > end) parts.push(one.text.slice(end, start));
    const said = one.text.slice(start, stop);
    const style = [styleOf(scores[word], largest, signed), marked !== null && fold(said) === marked ? "keyword" : null].filter(Boolean).join(" ");
    parts.push(make("span", { "data-word": String(word), class: style || null }, said));
    end = stop;
  });
  if (end < one.text.length) parts.push(make("span", { class: "unread" }, one.text.slice(end)));
  if (one.cut) parts.push(make("span", { class: "unread" }, " …"));
  text.append(...parts);
  attachTip(text, (word) => `${one.text.slice(...one.spans[word])}  ${formatSigned(scores[word], signed !== false)}`);
  return text;
}

function attachTip(text, tell) {
  const tip = byId("tip");
  const words = [...text.querySelectorAll("[data-word]")];
  let at = -1;
  const spoken = make("span", { class: "hidden-text", role: "status" });
  text.after(spoken);
  const show = (span) => {
    tip.textContent = tell(Number(span.dataset.word));
    tip.hidden = false;
    const [box, size] = [span.getClientRects()[0] ?? span.getBoundingClientRect(), tip.getBoundingClientRect()];
    tip.style.left = `${Math.max(8, Math.min(box.left, innerWidth - size.width - 8))}px`;
    tip.style.top = `${box.top > size.height + 12 ? box.top - size.height - 8 : box.bottom + 8}px`;
  };
  const hide = () => { tip.hidden = true; };
  text.addEventListener("mouseover", (event) => {
    const span = event.target.closest("[data-word]");
    if (span) show(span);
    else hide();
  });
  text.addEventListener("mouseleave", hide);
  text.addEventListener("blur", () => { hide(); words[at]?.classList.remove("at"); });
  text.addEventListener("keydown", (event) => {
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: words.length - 1, Escape: -1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    words[at]?.classList.remove("at");
    if (event.key === "Escape") { at = -1; return hide(); }
    at = Math.min(words.length - 1, Math.max(0, to));
    if (!words[at]) return;
    words[at].classList.add("at");
    words[at].scrollIntoView({ block: "nearest" });
    show(words[at]);
    if (!spoken.isConnected) text.after(spoken);
    spoken.textContent = tip.textContent;
  });
}

/** Return the words with the largest scores, those for and those against the label. */
function makeStrongest(one, shown, signed) {
  const words = one.spans.map(([start, stop], word) => ({ said: one.text.slice(start, stop), score: shown.scores[word] })).filter(({ score }) => score);
  const largest = Math.max(...words.map(({ score }) => Math.abs(score)), 0);
  const sides = signed === false ? [["Strongest words", words.sort((a, b) => Math.abs(b.score) - Math.abs(a.score)), "bar-size"]]
    : [[`Words for ${shown.label}`, words.filter(({ score }) => score > 0).sort((a, b) => b.score - a.score), "bar-for"],
      [`Words against ${shown.label}`, words.filter(({ score }) => score < 0).sort((a, b) => a.score - b.score), "bar-against"]];
  return make("div", { class: "strongest" }, sides.map(([title, side, style]) => make("div", {}, make("h4", {}, quote(title)),
    make("ol", {}, side.slice(0, STRONGEST).map(({ said, score }) => {
      const bar = make("span", { class: style });
      bar.style.width = `${(100 * Math.abs(score)) / largest}%`;
      return make("li", {}, quote(said), make("span", { class: "number" }, formatSigned(score, signed !== false)), make("span", { class: "track", "aria-hidden": "true" }, bar));
    })), side.length ? null : make("p", { class: "soft" }, "none"))));
}
