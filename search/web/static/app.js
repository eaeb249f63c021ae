// Which page is shown, and what all pages share: keys and logging out.

import { ask } from "/static/api.js";
import { complaint, put } from "/static/dom.js";
import { showCompare } from "/static/compare.js";
import { showNew } from "/static/new.js";
import { showRun } from "/static/run.js";
import { showRuns } from "/static/runs.js";
import { showTrial } from "/static/trial.js";

const PAGES = [
  [/^\/$/, "runs", showRuns],
  [/^\/compare$/, "compare", showCompare],
  [/^\/new$/, "new", showNew],
  [/^\/runs\/([^/]+)$/, "runs", showRun],
  [/^\/runs\/([^/]+)\/trials\/([^/]+)$/, "runs", showTrial],
];
const KEYS = { r: "/", c: "/compare", n: "/new" };
const TARGETS = { f: ".plot a", t: "#trials button, #trials a" };
const main = document.getElementById("main");

async function show() {
  for (const [form, page, view] of PAGES) {
    const match = form.exec(location.pathname);
    if (!match) continue;
    document.querySelector(`nav [data-page="${page}"]`)?.setAttribute("aria-current", "page");
    try {
      await view(main, ...match.slice(1).map(decodeURIComponent));
    } catch (error) {
      put(main, complaint(error));
    }
    main.dataset.ready = "yes";
    return;
  }
}

function useKeys() {
  const dialog = document.getElementById("keys");
  const box = document.getElementById("use-keys");
  box.checked = localStorage.getItem("keys") !== "off";
  box.addEventListener("change", () => localStorage.setItem("keys", box.checked ? "on" : "off"));
  document.getElementById("show-keys").addEventListener("click", () => dialog.showModal());
  addEventListener("keydown", (event) => {
    const typing = event.target.closest?.("input, select, textarea, dialog");
    if (typing || event.ctrlKey || event.metaKey || event.altKey || !box.checked) return;
    if (event.key === "?") dialog.showModal();
    else if (KEYS[event.key]) location.assign(KEYS[event.key]);
    else if (TARGETS[event.key]) document.querySelector(TARGETS[event.key])?.focus();
    else return;
    event.preventDefault();
  });
}

async function offerLogOut() {
  const button = document.getElementById("log-out");
  button.addEventListener("click", async () => {
    await ask("/session", "DELETE");
    location.assign("/login");
  });
  const { asks_token: asks } = await ask("/health");
  button.hidden = !asks;
}

useKeys();
show();
offerLogOut().catch(() => {}); // the page itself says what is wrong
