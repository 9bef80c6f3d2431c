// What `lexplain evaluate` told: how well keyword lists of halves agree, and what predictions lose without a method's words.

const HALVES = [["halves_of_documents", "halves of the documents"], ["halves_of_splits", "halves of the models"]];
const METRICS = {
  comprehensiveness: { title: "comprehensiveness", high: true, says: "how much the prediction falls when the method’s words are taken away" },
  sufficiency: { title: "sufficiency", high: false, says: "how much the prediction falls when only the method’s words are left" },
  log_odds: { title: "log odds", high: false, says: "change of the log probability when the method’s words are taken away" },
  accuracy_of_correct: { title: "right predictions kept", high: false, says: "share of right predictions that stay so while the words for them are taken away, over 0 to 50 words" },
  accuracy_of_mistaken_gold: { title: "mistakes mended, gold label", high: true, says: "share of wrong predictions that become right while the words against the gold label are taken away" },
  accuracy_of_mistaken_predicted: { title: "mistakes mended, predicted label", high: true, says: "share of wrong predictions that become right while the words that misled are taken away" },
  keyword_distinctiveness: { title: "distinct words", high: true, says: "share of a list’s words that stand in no other list" },
  coverage: { title: "coverage", high: true, says: "share of a class’s list that one of its documents holds" },
  cross_coverage: { title: "cross coverage", high: false, says: "share of a list that a document of another class holds" },
  coverage_distinctiveness: { title: "coverage distinctiveness", high: true, says: "coverage less cross coverage, over coverage" },
  halves_of_documents: { title: "halves of documents", high: true, says: "agreement of the lists of two halves of the documents" },
  halves_of_splits: { title: "halves of models", high: true, says: "agreement of the lists of two halves of the models" },
  deletion: { title: "deletion", high: true, says: "how much a class’s prediction falls without its list, which was made of other documents" },
  deletion_over_random: { title: "deletion over random", high: true, says: "how much more it falls so than without as frequent random words" },
  deletion_elsewhere: { title: "deletion elsewhere", high: false, says: "how much predictions of other classes fall without the list" },
};
const CONTROLS = ["random", "gradient_x_input", "tf-idf"];
const FIRST_KIND = "comprehensiveness|marc-2023"; // the leaderboard's order in the terminal, too

function makeCommand(text) {
  return make("pre", { tabindex: "0" }, text);
}

function sayNotEvaluated(what) {
  const own = report.methods[0]?.title ?? "integrated_gradients";
  const other = own === "saliency" ? "integrated_gradients" : "saliency";
  return [make("p", { class: "note" }, `The run was not evaluated, so there is ${what}. This makes it, and the next report shows it:`),
    makeCommand(`lexplain evaluate ${report.planFile} --methods ${own},${other}\nlexplain report ${report.planFile}`)];
}

function showHalves() {
  const place = byId("halves");
  const { evaluation } = report;
  if (!evaluation) return place.replaceChildren(...sayNotEvaluated("no agreement of halves"));
  const mine = evaluation.own ? evaluation.quality.filter((figure) => figure.method === evaluation.own && figure.label !== null) : [];
  const kinds = HALVES.filter(([metric]) => mine.some((figure) => figure.metric === metric));
  if (!kinds.length) {
    const why = evaluation.own ? "too few keywords, or models, to be halved" : "the latest evaluation did not hold the plan’s own method";
    return place.replaceChildren(make("p", { class: "note" }, `No agreement of halves: ${why}.`), makeCommand(`lexplain evaluate ${report.planFile} --methods ${report.methods[0]?.title ?? ""}`));
  }
  const lead = make("p", { class: "lead" }, `The evaluation’s documents, or the models, are put in two halves in up to five ways; each half makes its own keyword lists. Dots are the mean rank-biased overlap of the two lists (1: the same words in the same order), lines reach from the smallest to the largest.`);
  const tableAt = make("div");
  const parts = kinds.map(([metric, title]) => [metric, title, make("figure")]);
  place.replaceChildren(lead, make("div", { class: "pair" }, parts.map(([, , figure]) => figure)), tableAt);
  for (const [metric, title, figure] of parts) {
    const rows = mine.filter((one) => one.metric === metric).map((one) => ({ name: one.label, value: one.value, low: one.low, high: one.high }));
    placeChart(figure, `Agreement of keyword lists of two ${title}, by class`, `Two ${title}`,
      (width) => drawIntervals(width, rows, { axis: "rank-biased overlap →", domain: [0, 1], digits: 2 }));
  }
  const at = (label, metric) => mine.find((one) => one.label === label && one.metric === metric) ?? null;
  const table = makeTable(tableAt, {
    label: "Agreement of halves by class", first: { column: 0, descending: false },
    columns: [
      { title: "Class", value: (label) => label, cell: (label) => quote(label) },
      ...kinds.flatMap(([metric, title]) => [
        { title: title[0].toUpperCase() + title.slice(1), number: true, value: (label) => at(label, metric)?.value ?? null, cell: (label) => makeValue(at(label, metric), 2), help: "Rank-biased overlap, smallest and largest of up to five halvings" },
        { title: "Jaccard", number: true, value: (label) => at(label, `${metric}_jaccard`)?.value ?? null, cell: (label) => makeValue(at(label, `${metric}_jaccard`), 2), help: "Shared words of both lists" },
      ]),
    ],
  });
  table.show([...new Set(mine.filter((one) => one.metric.startsWith("halves")).map((one) => one.label))]);
}

function makeValue(figure, digits = 3) {
  if (!figure) return "–";
  const weak = figure.better === false;
  const value = make("span", { class: weak ? "mean weak" : "mean" }, figure.value.toFixed(digits), weak ? " ≈ random" : "");
  return figure.low === null ? value : [value, make("span", { class: "range" }, `${figure.low.toFixed(digits)} … ${figure.high.toFixed(digits)}`)];
}

function kindOf(figure) {
  return figure.of === null ? figure.metric : `${figure.metric}|${figure.of}`;
}

function nameKind(kind) {
  const [metric, of] = kind.split("|");
  return METRICS[metric].title + (of ? ` (${of})` : "");
}

function showMethods() {
  const place = byId("leaderboard");
  const { evaluation } = report;
  if (!evaluation) return place.replaceChildren(...sayNotEvaluated("no comparison of methods"));
  const count = Math.max(...evaluation.faithfulness.map((one) => one.documents ?? 0));
  place.replaceChildren(make("p", { class: "lead" }, `Every method explained the same ${plural(count, "document")} with the same models, measured ${evaluation.measuredAt}. `
    + "Means with 95 % intervals; hollow dots are controls. “≈ random”: no better than random scores on the same documents, beyond chance."));
  const subset = evaluation.quality.some((one) => one.of === "TP") ? "TP" : "P";
  const lists = evaluation.quality.filter((one) => one.of === null || one.of === subset).map((one) => ({ ...one, of: null }));
  place.append(...makeBoard("What predictions lose without a method’s words", evaluation.faithfulness, FIRST_KIND));
  if (lists.length) place.append(...makeBoard("What its keyword lists are worth", lists, "coverage_distinctiveness"));
}

/** Return title, controls, chart and table of figures by method; all follow the chosen class. */
function makeBoard(title, figures, firstKind) {
  const kinds = [...new Set(figures.map(kindOf))].filter((kind) => METRICS[kind.split("|")[0]]);
  let kind = kinds.includes(firstKind) ? firstKind : kinds[0];
  const figure = make("figure"), tableAt = make("div");
  const select = makeSelect(kinds.map((each) => [each, nameKind(each)]), kind);
  const said = make("p", { class: "soft", role: "status" });

  function draw() {
    const label = state.chosen === null ? null : report.classes[state.chosen].label;
    const mine = figures.filter((one) => one.label === label);
    const { high, says, title: name } = METRICS[kind.split("|")[0]];
    const rows = mine.filter((one) => kindOf(one) === kind).sort((a, b) => (high ? b.value - a.value : a.value - b.value))
      .map((one) => ({ name: one.method, value: one.value, low: one.low, high: one.high, hollow: CONTROLS.includes(one.method) }));
    const of = label === null ? "all classes" : label;
    said.textContent = `${name[0].toUpperCase()}${name.slice(1)}: ${says}; good when ${high ? "high" : "low"}. ${of[0].toUpperCase()}${of.slice(1)}.`;
    figure.hidden = !rows.length;
    if (rows.length) placeChart(figure, `${nameKind(kind)} of each method, ${of}`, `${nameKind(kind)}, ${of}; ${high ? "right" : "left"} is good`,
      (width) => drawIntervals(width, rows, { axis: `${name} →` }));
    const at = (method, each) => mine.find((one) => one.method === method && kindOf(one) === each) ?? null;
    const there = kinds.filter((each) => mine.some((one) => kindOf(one) === each));
    if (!there.length) return tableAt.replaceChildren(make("p", { class: "soft" }, `No figure for ${of}.`));
    const column = 1 + Math.max(0, there.indexOf(kind));
    makeTable(tableAt, {
      label: `${title}, ${of}`, first: { column, descending: high },
      columns: [
        { title: "Method", value: (method) => method, cell: (method) => (method === report.evaluation.own ? [quote(method), make("span", { class: "range" }, "the plan’s own")] : quote(method)) },
        ...there.map((each) => ({
          title: nameKind(each).replace(" (", "\n("), number: true, value: (method) => at(method, each)?.value ?? null, cell: (method) => makeValue(at(method, each)),
          help: `${METRICS[each.split("|")[0]].says}; good when ${METRICS[each.split("|")[0]].high ? "high" : "low"}`,
        })),
      ],
    }).show([...new Set(mine.map((one) => one.method))]);
  }

  onChoice(draw);
  return [make("h3", {}, title), make("div", { class: "controls" }, makeField("Show", select, (value) => { kind = value; draw(); })), said, figure, tableAt];
}
