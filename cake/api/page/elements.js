// Elements of the page. Text is always text here: nothing is ever read as HTML.

/** A new element with properties, and with elements or texts in it. */
export function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

/** A button that does something. */
export function button(label, action, properties = {}) {
  return element("button", { type: "button", textContent: label, onclick: action, ...properties });
}

/** What a model wrote, as nodes: text as it is, and blocks of code between fences with a button to copy them. */
export function written(text) {
  return text.split(/^```/m).map((part, i) => (i % 2 ? codeBlock(part) : part.replace(/^\n/, "")));
}

function codeBlock(part) {
  const [language, ...lines] = part.split("\n");
  const code = lines.join("\n").replace(/\n$/, "");
  const shown = element("code", {}, code);
  const copy = button("Copy", async () => {
    if (!navigator.clipboard) { // a browser has it for loopback and HTTPS only
      getSelection().selectAllChildren(shown);
      copy.textContent = "Press Ctrl+C";
      return;
    }
    await navigator.clipboard.writeText(code);
    copy.textContent = "Copied";
  });
  return element("div", { className: "code" },
    element("div", {}, language.trim() || "code", copy), element("pre", {}, shown));
}
