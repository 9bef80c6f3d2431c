// A table that sorts by its columns' buttons and shows its first rows until more are asked for.

const FIRST_ROWS = 50;

/**
 * @param place element that holds the table
 * @param options.label what the table is, for those who do not see it
 * @param options.columns {title, value(row), cell(row, toggle), number, ascends, help}: `value` is what is sorted by, large numbers first unless it `ascends`
 * @param options.details(row) what opens below a row; null for a table whose rows do not open
 * @param options.first {column, descending} how it is sorted at the start
 */
function makeTable(place, { label, columns, details = null, first, limit = FIRST_ROWS }) {
  let rows = [], order = { ...first }, shown = limit;
  const body = make("tbody");
  const heads = columns.map((column, number) => make("th", { scope: "col", class: column.number ? "number" : null },
    make("button", { type: "button", title: column.help, onclick: () => sortBy(number) }, column.title)));
  const more = make("button", { type: "button", class: "plain-button", onclick: () => { shown = rows.length; draw(); } });
  const moreLine = make("p", { class: "more" }, more);
  place.replaceChildren(
    make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": `Table: ${label}` },
      make("table", {}, make("caption", { class: "hidden-text" }, label), make("thead", {}, make("tr", {}, heads)), body)),
    moreLine);

  function sortBy(number) {
    const descending = order.column === number ? !order.descending : Boolean(columns[number].number && !columns[number].ascends);
    order = { column: number, descending };
    draw();
  }

  function compare(one, other) {
    const { value } = columns[order.column];
    const [a, b] = [value(one), value(other)];
    if (a === null || b === null) return (a === null) - (b === null); // what is unknown stands last, both ways
    const sign = order.descending ? -1 : 1;
    return sign * (typeof a === "string" ? collator.compare(a, b) : a - b);
  }

  function draw() {
    heads.forEach((head, number) => {
      const sorted = number === order.column ? (order.descending ? "descending" : "ascending") : "none";
      head.setAttribute("aria-sort", sorted);
    });
    const sorted = [...rows].sort(compare);
    body.replaceChildren(...sorted.slice(0, shown).map(makeRow));
    moreLine.hidden = rows.length <= shown;
    more.textContent = `Show all ${formatCount(rows.length)} rows`;
  }

  function makeRow(row) {
    const line = make("tr");
    columns.forEach((column, number) => line.append(make(number === 0 ? "th" : "td",
      { scope: number === 0 ? "row" : null, class: column.number ? "number" : null }, column.cell(row, () => toggle(row, line)))));
    return line;
  }

  function toggle(row, line) {
    const button = line.querySelector("button");
    const open = button.getAttribute("aria-expanded") === "true";
    button.setAttribute("aria-expanded", String(!open));
    if (open) line.nextElementSibling.remove();
    else line.after(make("tr", { class: "places" }, make("td", { colspan: columns.length }, details(row))));
  }

  return {
    show(newRows) {
      rows = newRows;
      shown = limit;
      draw();
    },
    /** Open the details of a row and move there; false where it is not among the rows. */
    open(row) {
      const place = [...rows].sort(compare).indexOf(row);
      if (place < 0) return false;
      if (place >= shown) {
        shown = rows.length;
        draw();
      }
      const lines = [...body.children].filter((line) => !line.classList.contains("places"));
      const button = lines[place].querySelector("button");
      if (button.getAttribute("aria-expanded") !== "true") button.click();
      button.focus({ preventScroll: true });
      lines[place].scrollIntoView({ block: "center" });
      return true;
    },
  };
}

const collator = new Intl.Collator(undefined, { numeric: true, sensitivity: "base" });
