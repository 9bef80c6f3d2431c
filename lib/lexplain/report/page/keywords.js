// Keywords: cards of the classes side by side, one table of all, and the places that a score comes from.

const CARD_WORDS = 10;
const PLACES = 8;
const CONTEXT = 60;

function showCards() {
  let count = CARD_WORDS, order = "score", wanted = "";
  const orders = {
    score: (a, b) => a.rank - b.rank,
    frequency: (a, b) => b.frequency - a.frequency || a.rank - b.rank,
    documents: (a, b) => b.df - a.df,
    distinct: (a, b) => (b.distinct ?? -Infinity) - (a.distinct ?? -Infinity),
    word: (a, b) => collator.compare(a.word, b.word),
  };
  byId("card-controls").append(
    makeField("Find a word in all classes", make("input", { type: "search", id: "card-filter" }), (value) => { wanted = fold(value); draw(); }, "input"),
    makeField("Sort words by", makeSelect([["score", "mean score"], ["frequency", "models that selected it"], ["documents", "documents"], ["distinct", "distinctiveness"], ["word", "alphabet"]], order), (value) => { order = value; draw(); }),
    makeField("Words a class", makeSelect([["5", "5"], ["10", "10"], ["25", "25"], ["1000", "all"]], String(count)), (value) => { count = Number(value); draw(); }));
  const largest = Math.max(...report.keywords.map((word) => word.score), 0);

  function draw() {
    byId("cards").replaceChildren(...report.classes.map((one, c) => {
      const words = one.words.filter((word) => fold(word.word).includes(wanted)).sort(orders[order]).slice(0, count);
      const said = [plural(one.keywords, "keyword"), one.f1 === null ? null : `F1 ${one.f1.toFixed(2)}`].filter(Boolean).join(" · ");
      return make("article", { class: `card${c === state.chosen ? " current" : ""}`, "data-class": c },
        make("h3", {}, quote(one.label)), make("p", {}, said),
        words.length ? make("ol", {}, words.map((word) => makeBar(word, largest))) : make("p", {}, sayWhyNone(one, wanted)));
    }));
  }

  onChoice(draw);
}

function sayWhyNone(one, wanted) {
  if (one.words.length) return `No keyword with “${wanted}”.`;
  const dropped = one.dropped.map(([reason, count]) => `${formatCount(count)} by ${reason}`).join(", ");
  return dropped ? `No keyword: words were dropped, ${dropped}.` : "No keyword: no document counts as evidence.";
}

function makeBar(word, largest) {
  const fill = make("span", { class: "fill", "aria-hidden": "true" });
  fill.style.width = `${Math.max(0, (100 * word.score) / (largest || 1))}%`;
  return make("li", {}, make("button", { type: "button", onclick: () => openKeyword(word) },
    fill, quote(word.word), make("span", { class: "value" }, formatScore(word.score))));
}

function fold(text) {
  return text.normalize("NFKC").toLowerCase().trim();
}

let keywordTable = null;
let resetFilters = null;

function showKeywordTable() {
  let wanted = "", least = 0, sure = false;
  const splits = report.splits;
  const ends = report.keywords.flatMap((word) => [word.low, word.high, word.score]).filter((end) => end !== null);
  const scale = [Math.min(0, ...ends), Math.max(0.001, ...ends)];
  const columns = [
    { title: "Word", value: (word) => word.word, cell: (word, toggle) => make("button", { class: "word", type: "button", "aria-expanded": "false", onclick: toggle }, quote(word.word)) },
    { title: "Class", value: (word) => report.classes[word.c].label, cell: (word) => quote(report.classes[word.c].label) },
    { title: "Rank", number: true, ascends: true, value: (word) => word.rank, cell: (word) => String(word.rank), help: "Place in its class by mean score" },
    { title: "Mean score", number: true, value: (word) => word.score, cell: (word) => formatScore(word.score) },
    { title: "95 % interval", value: (word) => (word.low === null ? null : word.high - word.low), cell: (word) => drawInterval(word, scale), help: "Jackknife over 20 groups of documents; sorts by width. None where the evidence fell into one group" },
    { title: "Selected", number: true, value: (word) => word.frequency, cell: (word) => `${Math.round(word.frequency * splits)} of ${splits}`, help: "Models that selected the word" },
    { title: "Evidence", number: true, value: (word) => word.evidence, cell: (word) => formatCount(word.evidence), help: "(model, document) pairs that the score is the mean of" },
    { title: "Documents", number: true, value: (word) => word.df, cell: (word) => formatCount(word.df), help: "Documents of the class that hold the word" },
    { title: "Distinct", number: true, value: (word) => word.distinct, cell: (word) => (word.distinct === null ? "–" : word.distinct.toFixed(2)), help: "1: only this class's documents hold the word; 0: as many of others" },
  ];
  keywordTable = makeTable(byId("keyword-table"), { label: "Keywords", columns, details: makePlaces, first: { column: 3, descending: true } });
  const search = make("input", { type: "search", id: "keyword-filter" });
  const selected = makeSelect([["0", "any number"], ...Array.from({ length: splits }, (_, n) => [String((n + 1) / splits), `${n + 1} or more of ${splits}`])].filter((_, n) => splits <= 12 || n % Math.ceil(splits / 10) === 0), "0");
  const box = make("input", { type: "checkbox", id: "keyword-sure" });
  byId("keyword-controls").append(
    makeField("Find a word", search, (value) => { wanted = fold(value); draw(); }, "input"),
    makeField("Selected by", selected, (value) => { least = Number(value) - 1e-6; draw(); }),
    makeField("Interval above 0", box, (value) => { sure = value; draw(); }));

  function draw() {
    const mine = report.keywords.filter((word) => state.chosen === null || word.c === state.chosen);
    const rows = mine.filter((word) => fold(word.word).includes(wanted) && word.frequency >= least && (!sure || (word.low !== null && word.low > 0)));
    byId("keyword-count").textContent = `${formatCount(rows.length)} of ${plural(mine.length, "keyword")}`
      + (state.chosen === null ? "" : ` of ${report.classes[state.chosen].label}`);
    keywordTable.show(rows);
  }

  resetFilters = () => {
    [search.value, selected.value, box.checked] = ["", "0", false];
    [wanted, least, sure] = ["", 0, false];
    draw();
  };
  onChoice(draw);
}

/** Show a keyword with its places in the table. */
function openKeyword(word) {
  if (state.chosen !== null && state.chosen !== word.c) chooseClass(null);
  if (!keywordTable.open(word)) {
    resetFilters();
    keywordTable.open(word);
  }
}

const SVG = "http://www.w3.org/2000/svg";

/** Return a line of the interval with a dot at the mean, on one scale for the whole table. */
function drawInterval(word, [least, most]) {
  if (word.low === null) return make("span", { class: "soft" }, "–");
  const at = (value) => (118 * (value - least)) / (most - least) + 1;
  const svg = document.createElementNS(SVG, "svg");
  const said = `${formatScore(word.low)} to ${formatScore(word.high)}`;
  for (const [key, value] of Object.entries({ class: "interval", viewBox: "0 0 120 14", role: "img", "aria-label": said })) svg.setAttribute(key, value);
  const title = document.createElementNS(SVG, "title");
  title.textContent = said;
  const add = (name, attributes) => {
    const part = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) part.setAttribute(key, value);
    svg.append(part);
  };
  svg.append(title);
  add("line", { class: "zero", x1: at(0), x2: at(0), y1: 0, y2: 14 });
  add("line", { x1: at(word.low), x2: at(word.high), y1: 7, y2: 7 });
  add("circle", { cx: at(word.score), cy: 7, r: 3.5 });
  return svg;
}

/** Return the documents of the report that a keyword's score comes from, the word in its context. */
function makePlaces(word) {
  const places = word.places.slice(0, PLACES);
  const documents = new Set(word.places.map((place) => place.document)).size;
  const said = `The score is the mean over ${plural(word.evidence, "(model, document) pair")}; this file holds ${plural(documents, "document")} of them.`;
  return make("div", { class: "places" }, make("p", { class: "soft" }, said),
    make("ul", {}, places.map(({ document: number, start, score }) => {
      const source = report.documents[number];
      const end = source.ends.get(start) ?? start + word.word.length;
      const [from, to] = [Math.max(0, start - CONTEXT), Math.min(source.text.length, end + CONTEXT)];
      const line = make("span", {}, from > 0 ? "…" : "", clean(source.text.slice(from, start)), make("mark", {}, source.text.slice(start, end)), clean(source.text.slice(end, to)), to < source.text.length ? "…" : "");
      line.dir = "auto";
      return make("li", {}, line, make("button", { type: "button", class: "plain-button", onclick: () => openDocument(number, report.classes[word.c].label, word.word) },
        make("span", { class: "hidden-text" }, "Open document "), quote(source.id), ` ${formatScore(score)}`));
    })));
}

function clean(text) {
  return text.replace(/\s+/g, " ");
}

function showPhrases() {
  if (!report.phrases.length) return;
  const place = make("div");
  byId("phrases").append(make("h3", {}, "Keyphrases"), make("p", { class: "lead" }, "Runs of words that the method’s masks keep together."), place);
  const table = makeTable(place, {
    label: "Keyphrases", first: { column: 2, descending: true },
    columns: [
      { title: "Phrase", value: (one) => one.word, cell: (one) => quote(one.word) },
      { title: "Class", value: (one) => report.classes[one.c].label, cell: (one) => quote(report.classes[one.c].label) },
      { title: "Mean score", number: true, value: (one) => one.score, cell: (one) => formatScore(one.score) },
      { title: "Selected", number: true, value: (one) => one.frequency, cell: (one) => `${Math.round(one.frequency * report.splits)} of ${report.splits}` },
      { title: "Documents", number: true, value: (one) => one.df, cell: (one) => formatCount(one.df) },
    ],
  });
  onChoice(() => table.show(report.phrases.filter((one) => state.chosen === null || one.c === state.chosen)));
}

function showScatter() {
  onChoice(() => {
    const figure = byId("scatter");
    figure.hidden = !report.keywords.length;
    if (figure.hidden) return;
    const name = state.chosen === null ? "all classes" : report.classes[state.chosen].label;
    const caption = `Keywords of ${name}. Within a line words are spread up and down, so that they do not cover each other.`;
    placeChart(figure, `Keywords of ${name} by mean score and models that selected them`, caption, (width) => drawScatter(width, report.keywords, state.chosen));
  });
}
