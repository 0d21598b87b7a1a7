/** What a reader brings: files and folders, sorted into the network's modalities by their names, else by hand. */

import { at, fill, make } from "./dom.js";
import { facts } from "./state.js";

/** @typedef {{file: File, path: string}} Found */

/** @param {Iterable<File>} files @returns {Found[]} */
export function chosen(files) {
  return [...files].map((file) => ({ file, path: file.webkitRelativePath || file.name }));
}

/** All files that were dropped, those in folders too. @param {DataTransfer} transfer @returns {Promise<Found[]>} */
export async function dropped(transfer) {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry()).filter((entry) => entry !== null);
  return (await Promise.all(entries.map(filesIn))).flat();
}

/** @param {FileSystemEntry} entry @returns {Promise<Found[]>} */
async function filesIn(entry) {
  if (entry.isFile) {
    const one = /** @type {FileSystemFileEntry} */ (entry);
    /** @type {File} */
    const file = await new Promise((resolve, reject) => one.file(resolve, reject));
    return file.name.startsWith(".") ? [] : [{ file, path: entry.fullPath }];
  }
  const reader = /** @type {FileSystemDirectoryEntry} */ (entry).createReader();
  /** @type {FileSystemEntry[]} */
  const found = [];
  for (;;) {
    /** @type {FileSystemEntry[]} */
    const some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
    if (!some.length) return (await Promise.all(found.map(filesIn))).flat();
    found.push(...some);
  }
}

/** @param {File} file @returns {Promise<boolean>} */
export async function isDicom(file) {
  return (await file.slice(128, 132).text()) === "DICM";
}

/**
 * A list of files a modality; null if the reader would not say which is which.
 * @param {Found[]} found @returns {Promise<File[][]|null>}
 */
export async function sort(found) {
  const { modalities } = facts;
  if (modalities.length === 1 && (found.length === 1 || (await isDicom(found[0].file)))) {
    return [found.map(({ file }) => file)];
  }
  const groups = modalities.map((name) =>
    found.filter(({ path }) => modalityOf(path) === name).map(({ file }) => file),
  );
  return groups.every((files) => files.length) ? groups : assign(groups);
}

/** The modality that a path names last. @param {string} path @returns {string|undefined} */
function modalityOf(path) {
  for (const word of path.toLowerCase().split(/[^a-z0-9]+/).reverse()) {
    const name = facts.modalities.find((modality) => facts.aliases[modality].includes(word));
    if (name) return name;
  }
  return undefined;
}

/** Has the reader say which files are which modality. @param {File[][]} groups @returns {Promise<File[][]|null>} */
function assign(groups) {
  const dialog = at("bring");
  const may = facts.incomplete ? " What is missing may stay so." : "";
  const enough = () =>
    facts.incomplete ? groups.some((files) => files.length) : groups.every((files) => files.length);
  const show = () =>
    fill(
      dialog,
      make("h2", {}, "Which file is which?"),
      make("p.soft", {}, "Of each modality a NIfTI file, or all files of a DICOM series." + may),
      make("div.assign", {}, ...facts.modalities.flatMap((name, i) => line(name, i))),
      make(
        "div.ends",
        {},
        make("button", { "data-key": "cancel", onclick: () => dialog.close() }, "Cancel"),
        make(
          "button.main",
          { "data-key": "take", disabled: !enough(), onclick: () => dialog.close("take") },
          "Bring",
        ),
      ),
    );
  const line = (/** @type {string} */ name, /** @type {number} */ i) => {
    const files = groups[i];
    const input = make("input", {
      type: "file",
      multiple: true,
      hidden: true,
      onchange: () => {
        groups[i] = [...(input.files ?? [])];
        show();
      },
    });
    return [
      make("b", {}, name),
      make("span.soft", {}, files.length > 1 ? `${files.length} files` : (files[0]?.name ?? "none yet")),
      make("button", { "data-key": `choose-${name}`, onclick: () => input.click() }, "Choose …", input),
    ];
  };
  show();
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "take" ? groups : null), { once: true });
  });
}
