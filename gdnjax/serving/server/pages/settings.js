// What is sent beside the messages. It is remembered in this browser, but for the key.

const STORED = "gdnjax-settings";
const $ = (id) => document.getElementById(id);

// Fields by the name that the request has for them.
const NUMBERS = { temperature: "temperature", top_p: "top-p", max_tokens: "max-tokens", seed: "seed" };
const TEXTS = ["system", "thinking", "tools"];
const FIELDS = [...Object.values(NUMBERS), ...TEXTS];

export class Settings {
  constructor() {
    for (const [id, value] of Object.entries(JSON.parse(localStorage.getItem(STORED) ?? "{}"))) {
      if (FIELDS.includes(id)) $(id).value = value;
    }
    const keep = () => {
      localStorage.setItem(STORED, JSON.stringify(Object.fromEntries(FIELDS.map((id) => [id, $(id).value]))));
      this.complain(null);
    };
    $("settings").addEventListener("input", keep);
    $("settings").addEventListener("change", keep);
    $("settings-toggle").addEventListener("click", () => this.open($("settings").hidden));
    $("settings-close").addEventListener("click", () => this.close());
    $("settings-reset").addEventListener("click", () => {
      localStorage.removeItem(STORED);
      for (const id of FIELDS) $(id).value = "";
      this.complain(null);
    });
  }

  open(isOpen) {
    const wasWithin = $("settings").contains(document.activeElement);
    $("settings").hidden = !isOpen;
    $("settings-toggle").setAttribute("aria-expanded", String(isOpen));
    if (isOpen) $("system").focus();
    else if (wasWithin) $("settings-toggle").focus();
  }

  close() {
    if (!$("settings").hidden) this.open(false);
  }

  setModels(names) {
    const options = names.map((name) => new Option(name));
    $("model-choice").replaceChildren(...options);
    $("model-choice").hidden = $("model-choice-label").hidden = names.length < 2;
  }

  // The settings as fields of a request, with `system`; null where one is wrong, which is then said.
  read() {
    const found = { model: $("model-choice").value || undefined, system: $("system").value.trim() };
    for (const [name, id] of Object.entries(NUMBERS)) {
      const field = $(id);
      if (!field.validity.valid) {
        const label = document.querySelector(`label[for="${id}"]`).textContent;
        return this.complain(`${label}: ${field.validationMessage}`, field);
      }
      if (field.value !== "") found[name] = field.valueAsNumber;
    }
    const thinking = $("thinking").value;
    if (thinking) found.chat_template_kwargs = { enable_thinking: thinking === "true" };
    const tools = $("tools").value.trim();
    if (tools) {
      try {
        found.tools = JSON.parse(tools);
      } catch (error) {
        return this.complain(`Tools: ${error.message}`, $("tools"));
      }
      if (!Array.isArray(found.tools)) return this.complain("Tools: a JSON list is wanted.", $("tools"));
    }
    this.complain(null);
    return found;
  }

  complain(message, field = null) {
    $("settings-wrong").hidden = message === null;
    $("settings-wrong").textContent = message ?? "";
    if (field) {
      this.open(true);
      field.focus();
    }
    return null;
  }
}
