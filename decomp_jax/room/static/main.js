/** Starts the page: waits for the room, then draws it whenever the state has changed. */

import * as archive from "./archive.js";
import { telling } from "./ask.js";
import * as compare from "./compare.js";
import { at, fill, make, say } from "./dom.js";
import * as hits from "./hits.js";
import * as keys from "./keys.js";
import * as question from "./question.js";
import { about } from "./server.js";
import { change, facts, onChange, state } from "./state.js";
import * as viewer from "./viewer.js";
import { firstView } from "./viewport.js";

const WAIT = 700; // ms between looks at whether the room is ready

async function start() {
  for (;;) {
    const known = await telling(about);
    if (!known) return stop();
    if (known.ready) {
      Object.assign(facts, known);
      break;
    }
    fill(
      at("tiles"),
      make(
        "div.empty",
        {},
        make("strong", {}, "The archive is being laid out"),
        "It takes seconds, with a million slices some minutes.",
        make("progress", { max: known.steps, value: known.done, "aria-label": "Progress" }),
      ),
    );
    await new Promise((resolve) => {
      setTimeout(resolve, WAIT);
    });
  }
  at("archive-name").textContent = at("archive-name").title =
    `${facts.slices.toLocaleString("en")} slices of ${facts.patients.toLocaleString("en")} patients` +
    `${facts.at_hand ? "" : "; images not at hand: painted from their codes"}`;
  Object.assign(state.view, firstView());
  viewer.setUp();
  keys.setUp();
  compare.setUp(viewer.navigate);
  for (const part of [archive, question, hits, compare]) onChange(part.render);
  onChange(viewer.renderTools);
  onChange(viewer.render, true);
  onChange(compare.drawAll, true);
  addEventListener("resize", () => change());
  change();
  return archive.find();
}

function stop() {
  fill(at("tiles"), make("div.empty", {}, make("strong", {}, "The room can't be entered"), at("status").textContent));
}

// What no one foresaw is told, too.
addEventListener("error", (event) => say(`The page has a fault: ${event.message}`, true));
addEventListener("unhandledrejection", (event) =>
  say(`The page has a fault: ${event.reason?.message ?? event.reason}`, true),
);
start();
