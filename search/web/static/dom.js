// Builds elements. Text is always text: nothing that a run or a person wrote is parsed as markup.

/**
 * An element with attributes, listeners (`on: {click: ...}`) and children (elements or texts).
 * `false`, `null` and `undefined` are left out, as attributes and as children.
 */
export function h(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** The same in SVG's namespace. */
export function s(tag, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

/** Replaces what is in an element. */
export function put(element, ...children) {
  element.replaceChildren(...children.flat().filter(isThere));
  return element;
}

/** Says something to screen readers, once. */
export function announce(text) {
  const live = document.getElementById("live");
  if (live.textContent !== text) live.textContent = text;
}

/** A message in place of what could not be done. */
export function complaint(error) {
  return h("p", { class: "note bad", role: "alert" }, error.message);
}

/** A table in a box that scrolls sideways, also by keyboard. */
export function scrolling(label, table) {
  return h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": `${label}, table` }, table);
}

let choices = 0;

/** A labelled select; `options` are texts or [value, text]. */
export function choice(label, options, value, change) {
  choices += 1;
  const id = `choice-${choices}`;
  const select = h(
    "select",
    { id, on: { change: () => change(select.value) } },
    ...options.map((one) => {
      const [key, text] = Array.isArray(one) ? one : [one, one];
      return h("option", { value: key, selected: key === value }, text);
    }),
  );
  return h("div", { class: "field" }, h("label", { for: id }, label), select);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "on") {
      for (const [kind, listener] of Object.entries(value)) element.addEventListener(kind, listener);
    } else if (isThere(value)) {
      element.setAttribute(name, value === true ? "" : value);
    }
  }
  element.append(...children.flat().filter(isThere));
  return element;
}

function isThere(value) {
  return value !== false && value !== null && value !== undefined;
}
