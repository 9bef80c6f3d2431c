// The page: what the data say, what is chosen, and the parts in their order.

const report = unpack(JSON.parse(byId("data").textContent));
const state = { chosen: null };
const followers = [];

/** Call `draw` now and whenever another class is chosen. */
function onChoice(draw) {
  followers.push(draw);
  draw();
}

function chooseClass(number) {
  state.chosen = number;
  for (const button of byId("class-list").children) button.setAttribute("aria-pressed", String(button.dataset.class === String(number)));
  for (const draw of followers) draw();
}

/** Rows become objects, distances between words become places in the text. */
function unpack(packed) {
  const readKeyword = ([c, word, rank, score, low, high, frequency, evidence, df, distinct]) =>
    ({ c, word, rank, score, low, high, frequency, evidence, df, distinct, places: [] });
  const readFigure = ([method, metric, of, label, value, low, high, documents, better]) =>
    ({ method, metric, of, label, value, low, high, documents, better });
  const keywords = packed.keywords.map(readKeyword);
  const classes = packed.classes.map((one) => ({ ...one, words: [] }));
  const known = new Map();
  for (const word of keywords) {
    classes[word.c].words.push(word);
    known.set(`${word.c} ${word.word}`, word);
  }
  const documents = packed.documents.map((one) => {
    const spans = [];
    let end = 0;
    for (let at = 0; at < one.spans.length; at += 2) {
      const start = end + one.spans[at];
      end = start + one.spans[at + 1];
      spans.push([start, end]);
    }
    const explained = one.explained.map(([label, method, probability, isGold, converged, scores]) => ({ label, method, probability, isGold, converged, scores }));
    explained.sort((a, b) => (b.probability ?? 0) - (a.probability ?? 0) || a.method - b.method);
    return { ...one, spans, explained, ends: new Map(spans), predicted: explained[0]?.label ?? null, search: fold(`${one.id} ${one.text}`) };
  });
  for (const [c, word, document, start, score] of packed.evidence) known.get(`${c} ${word}`)?.places.push({ document, start, score });
  const evaluation = packed.evaluation && {
    ...packed.evaluation, faithfulness: packed.evaluation.faithfulness.map(readFigure), quality: packed.evaluation.quality.map(readFigure),
  };
  return { ...packed, keywords, classes, documents, evaluation, phrases: packed.phrases.map(readKeyword) };
}

function showClassList() {
  const makeChoice = (number, name, count) => make("button", { type: "button", "aria-pressed": String(number === null), "data-class": String(number), onclick: () => chooseClass(number) },
    quote(name), make("span", { class: "n" }, formatCount(count)));
  byId("class-list").append(makeChoice(null, "All classes", report.keywords.length), ...report.classes.map((one, number) => makeChoice(number, one.label, one.words.length)));
}

function followTheme() {
  byId("theme").addEventListener("change", (event) => {
    if (event.target.value === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = event.target.value;
  });
}

function followSections() {
  const links = new Map([...document.querySelectorAll(".top nav a")].map((link) => [link.hash.slice(1), link]));
  const watcher = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      if (isIntersecting) for (const [id, link] of links) id === target.id ? link.setAttribute("aria-current", "true") : link.removeAttribute("aria-current");
    }
  }, { rootMargin: "-30% 0px -65% 0px" });
  for (const id of links.keys()) watcher.observe(byId(id));
}

function openForPaper() {
  addEventListener("beforeprint", () => {
    for (const details of document.querySelectorAll("details.note")) details.open = true;
  });
}

showClassList();
followTheme();
openForPaper();
showCards();
showKeywordTable();
showPhrases();
showScatter();
showHalves();
showMethods();
showDocuments();
followSections();
document.documentElement.dataset.ready = performance.now().toFixed(0);
