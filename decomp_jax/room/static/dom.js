/** Elements made without HTML: text is text, whatever it says. */

/**
 * @param {string} tag with classes: "button.main"
 * @param {Object<string, any>} [properties] on… are listeners, aria-… and data-… attributes, the rest properties
 * @param {...(Node|string|number|null|false|undefined)} children
 * @returns {any} the element
 */
export function make(tag, properties = {}, ...children) {
  const [name, ...classes] = tag.split(".");
  const element = document.createElement(name);
  if (classes.length) element.className = classes.join(" ");
  for (const [key, value] of Object.entries(properties)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (key.includes("-") || key === "role" || key === "for") element.setAttribute(key, String(value));
    else element[key] = value;
  }
  element.append(
    ...children
      .filter((child) => child || child === 0)
      .map((child) => (typeof child === "number" ? String(child) : /** @type {Node|string} */ (child))),
  );
  return element;
}

/** @param {string} id @returns {any} */
export function at(id) {
  return document.getElementById(id);
}

/**
 * Replaces an element's children and keeps the focus on what stands where the focused one stood.
 * @param {Element} parent @param {...(Node|null|false)} children
 */
export function fill(parent, ...children) {
  const focused = document.activeElement;
  const key = parent.contains(focused) ? focused?.getAttribute("data-key") : null;
  const scrolls = [...parent.querySelectorAll("[data-scroll]")].map((one) => [
    one.getAttribute("data-scroll"),
    one.scrollTop,
    one.scrollLeft,
  ]);
  parent.replaceChildren(.../** @type {Node[]} */ (children.filter(Boolean)));
  for (const [name, top, left] of scrolls) {
    const one = parent.querySelector(`[data-scroll="${name}"]`);
    if (one) [one.scrollTop, one.scrollLeft] = [Number(top), Number(left)];
  }
  if (key) /** @type {HTMLElement|null} */ (parent.querySelector(`[data-key="${CSS.escape(key)}"]`))?.focus();
}

/** @param {string} text @param {boolean} [error] */
export function say(text, error = false) {
  const status = at("status");
  status.textContent = status.title = text.charAt(0).toUpperCase() + text.slice(1);
  status.className = error ? "error" : "";
  status.onclick = error ? () => say("") : null;
}

/** @param {string} name @param {Blob} blob */
export function download(name, blob) {
  const link = make("a", { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}
