// The REST API.

/** Asks; an answer that is a problem becomes an Error with its message. */
export async function ask(path, method = "GET", body = undefined) {
  const options = { method, headers: { Accept: "application/json" } };
  if (method !== "GET") {
    options.headers["Content-Type"] = "application/json";
    options.body = JSON.stringify(body ?? {});
  }
  let answer;
  try {
    answer = await fetch(`/api/v1${path}`, options);
  } catch {
    throw new Error("The service does not answer. Is it still running?");
  }
  if (answer.status === 401) {
    location.assign(`/login?next=${encodeURIComponent(location.pathname + location.search)}`);
    return new Promise(() => {}); // the page is left
  }
  if (answer.status === 204) return null;
  const found = await answer.json();
  if (!answer.ok) throw new Error(found.detail ?? `${answer.status}`);
  return found;
}

/**
 * Follows a run: calls `start`, `trials`, `progress` and `gone` with the data of its events, and
 * `lost` with whether the connection is lost. Nothing is followed while the page is hidden, because a
 * browser has few connections to spare.
 */
export function follow(name, listeners) {
  let source = null;
  let cursor = "";

  const open = () => {
    if (source || document.hidden) return;
    const after = cursor ? `?after=${encodeURIComponent(cursor)}` : "";
    source = new EventSource(`/api/v1/runs/${encodeURIComponent(name)}/events${after}`);
    source.addEventListener("open", () => listeners.lost(false));
    for (const kind of ["start", "trials", "progress", "gone"]) {
      source.addEventListener(kind, (event) => {
        if (event.lastEventId) cursor = event.lastEventId;
        listeners[kind](JSON.parse(event.data));
      });
    }
    source.addEventListener("error", () => {
      listeners.lost(true);
      if (source?.readyState !== EventSource.CLOSED) return; // it tries again by itself
      close();
      setTimeout(open, 5000);
    });
  };
  const close = () => {
    source?.close();
    source = null;
  };
  document.addEventListener("visibilitychange", () => (document.hidden ? close() : open()));
  addEventListener("pagehide", close);
  open();
}
