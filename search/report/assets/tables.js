"use strict";
/* Tables that sort by any column and show long lists page by page. Needs common.js. */
PruneSearch.tables = (() => {
  const PS = PruneSearch;

  /**
   * Fills `host` with a table.
   *
   * spec: caption; columns, each {label, numeric, look (a class), value(row), text(row), node(row)?}; rows;
   * first: a row of texts above all others, or null; sort: {column, down}; page: rows a page, or 0;
   * name(row): true for the row's marked state. Returns {show(rows), refresh()}.
   */
  function table(host, spec) {
    let { rows } = spec;
    let sort = spec.sort || null;
    let page = 0;
    const body = PS.html("tbody");
    const heads = spec.columns.map((column, place) => head(column, place));
    const top = spec.first ? PS.html("tbody", { class: "dense-row" }, firstRow()) : null;
    const whole = PS.html("table", {},
      PS.html("caption", { class: "visually-hidden" }, spec.caption),
      PS.html("thead", {}, PS.html("tr", {}, ...heads)), top, body);
    const frame = PS.html("div", { class: "scroll", tabindex: 0, role: "group", "aria-label": spec.caption }, whole);
    const pager = spec.page ? makePager() : null;
    host.replaceChildren(frame, ...(pager ? [pager.node] : []));
    refresh();

    function head(column, place) {
      const button = PS.html("button", { type: "button", onclick: () => by(place) }, column.label,
        PS.html("span", { class: "arrow", "aria-hidden": "true" }));
      return PS.html("th", { scope: "col", class: column.numeric ? "number" : null }, button);
    }

    function firstRow() {
      return PS.html("tr", {}, ...spec.columns.map((column, place) =>
        PS.html(place ? "td" : "th", { class: column.numeric ? "number" : null, scope: place ? null : "row" }, spec.first[place])));
    }

    function by(place) {
      const down = sort && sort.column === place ? !sort.down : false;
      sort = { column: place, down };
      page = 0;
      refresh();
    }

    function sorted() {
      if (!sort) return rows;
      const { value } = spec.columns[sort.column];
      const sign = sort.down ? -1 : 1;
      const keyed = rows.map((row) => [value(row), row]);
      keyed.sort(([a], [b]) => {
        if (a === null || b === null) return (a === null) - (b === null); // what is missing goes last
        return sign * (a < b ? -1 : a > b ? 1 : 0);
      });
      return keyed.map(([, row]) => row);
    }

    function refresh() {
      const ordered = sorted();
      const shown = spec.page ? ordered.slice(page * spec.page, (page + 1) * spec.page) : ordered;
      body.replaceChildren(...shown.map(line));
      heads.forEach((cell, place) => {
        const here = sort && sort.column === place;
        if (here) cell.setAttribute("aria-sort", sort.down ? "descending" : "ascending");
        else cell.removeAttribute("aria-sort");
      });
      if (pager) pager.update(ordered.length);
    }

    function line(row) {
      const marked = spec.marked && spec.marked(row);
      return PS.html("tr", { class: marked ? "marked" : null }, ...spec.columns.map((column, place) => {
        const content = column.node ? column.node(row) : column.text(row);
        const attributes = { class: column.numeric ? "number" : column.look, scope: place ? null : "row" };
        return PS.html(place ? "td" : "th", attributes, content);
      }));
    }

    function makePager() {
      const text = PS.html("span", { role: "status" });
      const step = (by_, label) => PS.html("button", { type: "button", onclick: () => { page += by_; refresh(); } }, label);
      const [back, on] = [step(-1, "Previous"), step(1, "Next")];
      const node = PS.html("div", { class: "pager controls" }, back, text, on);
      return {
        node,
        update(count) {
          const pages = Math.max(1, Math.ceil(count / spec.page));
          back.disabled = page === 0;
          on.disabled = page >= pages - 1;
          const from = count ? page * spec.page + 1 : 0;
          const to = Math.min(count, (page + 1) * spec.page);
          text.textContent = `${PS.decimal(from, 0)} to ${PS.decimal(to, 0)} of ${PS.decimal(count, 0)}`;
        },
      };
    }

    return {
      show(found) {
        rows = found;
        page = 0;
        refresh();
      },
      refresh,
    };
  }

  /** A table without sorting, whose last column is drawn as bars of the numbers. */
  function bars(host, caption, heads, rows) {
    const largest = Math.max(0, ...rows.map((row) => Math.max(row.value, row.high || 0))) || 1;
    const body = PS.html("tbody");
    for (const row of rows) {
      body.append(PS.html("tr", {},
        PS.html("th", { scope: "row" }, row.label),
        ...row.texts.map((text) => PS.html("td", { class: "number" }, text)),
        PS.html("td", { class: "bar" }, barOf(row, largest))));
    }
    const cells = heads.map((text, place) => PS.html("th", { scope: "col", class: place ? "number" : null }, text));
    cells.push(PS.html("td", { class: "bar" })); // the bars repeat the numbers
    host.append(PS.html("table", { class: "plain bars" },
      PS.html("caption", {}, caption),
      PS.html("thead", {}, PS.html("tr", {}, ...cells)), body));
  }

  function barOf(row, largest) {
    const at = (value) => (100 * Math.max(0, value)) / largest;
    const drawing = PS.svg("svg", { class: "bar-line", viewBox: "0 0 100 10", preserveAspectRatio: "none", "aria-hidden": "true" },
      PS.svg("rect", { x: 0, y: 1, width: at(row.value), height: 8, class: "bar-fill" }));
    if (row.high !== undefined) {
      drawing.append(PS.svg("path", { d: `M${at(row.low)} 5H${at(row.high)}`, class: "bar-range" }));
    }
    return drawing;
  }

  return { table, bars };
})();
