// The trials as a table: filtered, sorted, a page at a time.

import { choice, h, put, scrolling } from "/static/dom.js";
import { figure, seconds, title, words } from "/static/format.js";

const PAGE = 25;
const SHOWN = ["accuracy", "accuracy_drop", "latency_ms", "speedup", "macs", "num_params", "peak_memory_mib"];

export class TrialTable {
  constructor(run, metrics) {
    this.run = run;
    this.trials = [];
    this.status = "";
    this.wanted = "";
    this.page = 0;
    this.sort = { key: "trial_id", down: false };
    const shown = SHOWN.filter((m) => metrics.includes(m)).concat(metrics.filter((m) => m.includes("@")));
    this.columns = [
      { key: "trial_id", label: "trial", of: (t) => t.trial_id },
      { key: "status", label: "status", of: (t) => t.status },
      { key: "criterion", label: "criterion", of: (t) => t.criterion },
      { key: "blocks_dropped", label: "blocks dropped", number: true, of: (t) => t.blocks_dropped },
      ...shown.map((m) => ({ key: m, label: title(m), number: true, metric: m, of: (t) => t.metrics[m] })),
      { key: "finished_s", label: "ended after", number: true, of: (t) => t.finished_s },
    ];
    this.body = h("tbody", {});
    this.heads = this.columns.map((column) => this.#head(column));
    this.pager = h("div", { class: "row pager" });
    const find = h("input", { type: "search", placeholder: "t00012 or fgp", on: { input: () => {
      this.wanted = find.value.trim().toLowerCase();
      this.page = 0;
      this.#draw();
    } } });
    const statuses = ["completed", "failed", "infeasible", "early_stopped", "duplicate"];
    this.element = h("div", { class: "chart" },
      h("div", { class: "row controls" },
        choice("status", [["", "all"], ...statuses.map((one) => [one, words(one)])], "", (value) => {
          this.status = value;
          this.page = 0;
          this.#draw();
        }),
        h("label", { class: "field" }, h("span", {}, "trial or criterion"), find)),
      scrolling("Trials", h("table", {}, h("thead", {}, h("tr", {}, ...this.heads)), this.body)),
      this.pager);
  }

  set(trials) {
    this.trials = trials;
    this.#draw();
  }

  #head(column) {
    const sort = () => {
      this.sort = { key: column.key, down: this.sort.key === column.key && !this.sort.down };
      this.#draw();
    };
    return h("th", { scope: "col", class: column.number && "number" },
      h("button", { type: "button", on: { click: sort } }, column.label));
  }

  #draw() {
    const { key, down } = this.sort;
    const column = this.columns.find((one) => one.key === key);
    this.heads.forEach((head, i) => {
      if (this.columns[i] === column) head.setAttribute("aria-sort", down ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    });
    const found = this.trials
      .filter((t) => (!this.status || t.status === this.status) && this.#matches(t))
      .sort((a, b) => compare(column.of(a), column.of(b), down) || (a.trial_id < b.trial_id ? -1 : 1));
    const pages = Math.max(1, Math.ceil(found.length / PAGE));
    this.page = Math.min(this.page, pages - 1);
    const shown = found.slice(this.page * PAGE, (this.page + 1) * PAGE);
    const focused = this.body.contains(document.activeElement) ? document.activeElement.getAttribute("href") : null;
    put(this.body, shown.map((t) => this.#line(t)));
    if (!shown.length) put(this.body, h("tr", {}, h("td", { colspan: this.columns.length }, "No trials.")));
    if (focused) this.body.querySelector(`a[href="${CSS.escape(focused)}"]`)?.focus();
    this.#drawPager(found.length, pages);
  }

  #matches(trial) {
    return !this.wanted || `${trial.trial_id} ${trial.criterion ?? ""}`.toLowerCase().includes(this.wanted);
  }

  #line(trial) {
    const path = `/runs/${encodeURIComponent(this.run)}/trials/${encodeURIComponent(trial.trial_id)}`;
    const status = h("span", { class: `badge ${trial.status}` }, words(trial.status));
    const cellOf = (column) => {
      if (column.key === "status") return h("td", {}, status);
      if (column.key === "finished_s") return h("td", { class: "number" }, seconds(trial.finished_s));
      const text = column.metric ? figure(column.metric, column.of(trial)) : `${column.of(trial) ?? ""}`;
      return h("td", { class: column.number && "number" }, text);
    };
    return h("tr", {},
      h("th", { scope: "row" }, h("a", { href: path }, trial.trial_id)),
      this.columns.slice(1).map(cellOf));
  }

  #drawPager(count, pages) {
    const go = (label, page) => {
      const isThere = page >= 0 && page < pages;
      return h("button", { type: "button", "aria-disabled": !isThere && "true", on: { click: () => {
        if (!isThere) return;
        this.page = page;
        this.#draw();
        this.pager.querySelector(`[data-way="${label}"]`)?.focus();
      } }, "data-way": label }, label);
    };
    const had = this.pager.contains(document.activeElement) ? document.activeElement.dataset.way : null;
    const first = count ? this.page * PAGE + 1 : 0;
    put(this.pager, go("Previous", this.page - 1), go("Next", this.page + 1),
      h("span", { class: "muted" }, `${first} to ${Math.min(count, (this.page + 1) * PAGE)} of ${count}`));
    if (had) this.pager.querySelector(`[data-way="${had}"]`)?.focus();
  }
}

/** Missing values come last, whichever the direction. */
function compare(a, b, down) {
  const [noA, noB] = [a === null || a === undefined, b === null || b === undefined];
  if (noA || noB) return noA - noB;
  const order = typeof a === "number" ? a - b : String(a).localeCompare(String(b));
  return down ? -order : order;
}
