// The token is exchanged for a cookie that scripts cannot read.

const form = document.getElementById("login");
const wrong = document.getElementById("wrong");

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  wrong.hidden = true;
  const answer = await fetch("/api/v1/session", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ token: form.elements.token.value }),
  });
  if (answer.ok) {
    location.assign(ownPath(new URLSearchParams(location.search).get("next")));
    return;
  }
  const problem = await answer.json();
  wrong.textContent =
    answer.status === 401 ? "That is not this service's token." : problem.detail;
  wrong.hidden = false;
  form.elements.token.select();
});

/** A path of this service only: a link to the login page must not lead elsewhere. */
function ownPath(next) {
  const url = new URL(next || "/", location.origin);
  return url.origin === location.origin ? url.pathname + url.search : "/";
}
