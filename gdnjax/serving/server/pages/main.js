// The page: which view is shown, which model there is, and the key, where the server wants one.

import { getJson, setKey } from "./api.js";
import { Chat } from "./chat.js";
import { EngineView } from "./engine.js";

const $ = (id) => document.getElementById(id);

const chat = new Chat({ onUnauthorised: askForKey });
const engine = new EngineView({ onUnauthorised: askForKey });

function askForKey(wasRefused) {
  $("key-hint").textContent = wasRefused ? "That key was refused." : "Kept until this tab is closed.";
  $("key-form").hidden = false;
  $("key").focus();
}

let keyWasGiven = false;

$("key-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  setKey($("key").value.trim());
  keyWasGiven = true;
  if (await findModels()) {
    $("key-form").hidden = true;
    $("key").value = "";
    show();
  }
});

// How soon a server that is not ready, or not there, is asked again.
const RETRY_MS = 2000;

// True where the server let us in.
async function findModels() {
  try {
    const { data } = await getJson("v1/models");
    const names = data.map((model) => model.id);
    $("model-name").textContent = names[0] ?? "no model";
    document.title = names[0] ? `${names[0]} · gdnjax` : "gdnjax";
    chat.setModels(data);
    return true;
  } catch (error) {
    if (error.status === 401) askForKey(keyWasGiven);
    else {
      $("model-name").textContent = error.message;
      if (error.status === 503 || error.status === 0) setTimeout(findModels, RETRY_MS);
    }
    return false;
  }
}

function show() {
  const isEngine = location.hash === "#engine";
  $("chat").hidden = isEngine;
  $("engine").hidden = !isEngine;
  for (const [link, current] of [["to-engine", isEngine], ["to-chat", !isEngine]]) {
    if (current) $(link).setAttribute("aria-current", "page");
    else $(link).removeAttribute("aria-current");
  }
  if (isEngine && !document.hidden) engine.start();
  else engine.stop();
  // On a touch screen the keyboard would cover half of the page.
  if (!isEngine && $("key-form").hidden && matchMedia("(hover: hover)").matches) $("message").focus();
}

window.addEventListener("hashchange", show);
document.addEventListener("visibilitychange", show);
findModels();
show();
