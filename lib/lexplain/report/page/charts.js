// Charts by Observable Plot: SVG of text and lines, in colours of the style sheet. Beside each stands a table.

/** Put a chart into a figure, and draw it anew when the figure's width changes. */
function placeChart(figure, label, caption, draw) {
  const holder = make("div", { role: "img", "aria-label": label });
  figure.replaceChildren(holder, make("figcaption", {}, caption));
  let width = 0;
  const redraw = () => {
    const now = Math.floor(holder.clientWidth);
    if (now === width || now === 0) return;
    width = now;
    const chart = draw(width);
    // What is drawn says the same as the table; its parts are no elements of their own for a screen reader.
    chart.setAttribute("aria-hidden", "true");
    holder.replaceChildren(chart);
  };
  new ResizeObserver(settle(redraw, 100)).observe(holder);
  redraw();
}

const CHART_STYLE = { background: "transparent", fontSize: "12px", fontFamily: "inherit" };
const TIP = { fill: "var(--panel)", stroke: "var(--line)", textPadding: 9, fontSize: 12 };
const PLOT_CLASS = "chart"; // the style element that Plot makes says this name, and the policy of the page its digest

/** Words by score and share of the models that selected them; those of the chosen class in colour. */
function drawScatter(width, words, chosen) {
  const splits = report.splits;
  // Shares of few models lie on few lines: words are spread below and above, always in the same way.
  const spread = 0.32 / splits;
  const points = words.map((word, number) => ({
    x: word.score, y: word.frequency + spread * (((number * 0.618034) % 1) * 2 - 1), word,
  }));
  const mine = points.filter(({ word }) => chosen === null || word.c === chosen);
  const others = chosen === null ? [] : points.filter(({ word }) => word.c !== chosen);
  const tell = ({ word }) => `${word.word}\n${report.classes[word.c].label}\nscore ${formatScore(word.score)}\nselected by `
    + `${Math.round(word.frequency * splits)} of ${splits}\n${plural(word.df, "document")}`;
  const least = Math.min(...words.map((word) => word.frequency));
  const counts = [];
  for (let count = Math.max(1, Math.round(least * splits)); count <= splits; count += Math.max(1, Math.ceil(splits / 10))) counts.push(count / splits);
  return Plot.plot({
    className: PLOT_CLASS, width, height: Math.min(420, 130 + counts.length * 60), marginLeft: 74, marginRight: 24, marginBottom: 42, style: CHART_STYLE,
    x: { label: "mean score →", labelAnchor: "right", labelArrow: false, grid: true, nice: true, zero: true, tickSize: 0 },
    y: {
      label: null, ticks: counts, tickFormat: (share) => `${Math.round(share * splits)} of ${splits}`, tickSize: 0,
      domain: [Math.max(0, least - 0.6 / splits), 1 + 0.6 / splits],
    },
    marks: [
      Plot.ruleY(counts, { stroke: "var(--line)" }),
      Plot.dot(others, { x: "x", y: "y", r: 2.5, fill: "var(--soft)", fillOpacity: 0.35 }),
      Plot.dot(mine, { x: "x", y: "y", r: 4, fill: "var(--accent)", fillOpacity: 0.6, stroke: "var(--panel)", strokeWidth: 0.75 }),
      Plot.text(pickNames(mine, width), { x: "x", y: "y", text: ({ word }) => shorten(word.word, 18), dy: -11, fill: "currentColor", stroke: "var(--panel)", strokeWidth: 4 }),
      Plot.tip(mine, Plot.pointer({ x: "x", y: "y", title: tell, ...TIP })),
    ],
  });
}

/** Return the strongest points whose names do not meet. */
function pickNames(points, width) {
  const most = Math.max(...points.map(({ x }) => x), 0.001);
  const named = [];
  for (const point of [...points].sort((a, b) => b.x - a.x)) {
    const room = (18 * 7 * most) / width;
    if (named.every((other) => Math.abs(other.x - point.x) > room || Math.abs(other.y - point.y) > 0.25 / report.splits)) named.push(point);
    if (named.length === 14) break;
  }
  return named;
}

function shorten(text, most) {
  const characters = [...text];
  return characters.length <= most ? text : `${characters.slice(0, most - 1).join("")}…`;
}

/**
 * Rows of a dot and an interval.
 * @param rows {name, value, low, high, hollow}, in the order to be shown
 */
function drawIntervals(width, rows, { axis, domain = undefined, digits = 3 }) {
  const left = Math.min(width * 0.4, 20 + 7.2 * Math.max(...rows.map((row) => Math.min(row.name.length, 34))));
  const tell = (row) => `${row.name}\n${row.value.toFixed(digits)}` + (row.low === null ? "" : `\n${row.low.toFixed(digits)} to ${row.high.toFixed(digits)}`);
  return Plot.plot({
    className: PLOT_CLASS, width, height: 62 + rows.length * 30, marginLeft: left, marginRight: 24, marginBottom: 42, style: CHART_STYLE,
    x: { label: axis, labelAnchor: "right", labelArrow: false, grid: true, domain, nice: domain === undefined, zero: domain === undefined, tickSize: 0 },
    y: { label: null, domain: rows.map((row) => row.name), tickSize: 0, tickFormat: (name) => shorten(name, 34) },
    marks: [
      Plot.ruleX([0], { stroke: "var(--soft)", strokeOpacity: 0.6 }),
      Plot.ruleY(rows.filter((row) => row.low !== null), { y: "name", x1: "low", x2: "high", stroke: "var(--accent)", strokeWidth: 2.5 }),
      Plot.dot(rows, { y: "name", x: "value", r: 6, fill: (row) => (row.hollow ? "var(--panel)" : "var(--accent)"), stroke: "var(--accent)", strokeWidth: 2 }),
      Plot.tip(rows, Plot.pointerY({ y: "name", x: "value", title: tell, ...TIP })),
    ],
  });
}
