/** Elements made without HTML: text is text, whatever it says. */

/** @typedef {Node|string|number|null|false|undefined} Child what is nothing is left out */

/**
 * @template {HTMLElement} Kind
 * @typedef {Partial<Omit<Kind, `on${string}`>> & {[attribute: `${string}-${string}`]: string|number|boolean}
 *   & {[name in keyof HTMLElementEventMap as `on${name}`]?:
 *     (event: HTMLElementEventMap[name] & {currentTarget: Kind}) => unknown}} Properties
 */

/**
 * @template {keyof HTMLElementTagNameMap} Name
 * @param {Name|`${Name}.${string}`} tag with classes: "button.main"
 * @param {Properties<HTMLElementTagNameMap[Name]>} [properties] on… are listeners, aria-… and data-… attributes
 * @param {...Child} children
 */
export function make(tag, properties = {}, ...children) {
  const [name, ...classes] = tag.split(".");
  const element = document.createElement(/** @type {Name} */ (name));
  if (classes.length) element.className = classes.join(" ");
  for (const [key, value] of Object.entries(properties)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), /** @type {EventListener} */ (value));
    else if (key.includes("-") || key === "role" || key === "for") element.setAttribute(key, String(value));
    else Object.assign(element, { [key]: value });
  }
  element.append(
    ...children
      .filter((child) => child || child === 0)
      .map((child) => (typeof child === "number" ? String(child) : /** @type {Node|string} */ (child))),
  );
  return element;
}

/**
 * @typedef {Record<"keys"|"bring", HTMLDialogElement> & Record<"file"|"session-file", HTMLInputElement>
 *   & Record<"archive-name"|"status"|"archive"|"tools"|"tiles"|"question"|"answers"|"compare"|"open-session"
 *   |"save-session"|"save-hits"|"save-sheet"|"show-keys", HTMLElement>} Page what index.html holds
 */

/** @template {keyof Page} Id @param {Id} id */
export function at(id) {
  return /** @type {Page[Id]} */ (document.getElementById(id));
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
