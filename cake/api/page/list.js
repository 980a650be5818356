// The list of conversations: opens them, and deletes them; the last deletion can be undone until something else is done.

import { begin, conversations, forget, restore, titleOf } from "./conversations.js";
import { button, element } from "./elements.js";

const list = document.querySelector("#conversations ul");
let deleted = null; // the last conversation that was, where it stood, and whether it was open

/** Show all conversations, of which `current` is open.
 *
 * `actions.open` is given one that the person chose, `actions.show` the one that is open after a deletion or its undoing.
 */
export function showConversations(current, actions) {
  const items = conversations.map((each) => itemOf(each, current, actions));
  if (deleted) items.splice(deleted.at, 0, deletedItem(current, actions));
  list.replaceChildren(...items);
}

/** What was deleted cannot be had back any more. */
export function settleDeletion() {
  deleted = null;
}

function itemOf(each, current, { open, show }) {
  const choose = button(titleOf(each), () => open(each));
  if (each === current) choose.setAttribute("aria-current", "true");
  const drop = button("×", () => {
    deleted = { conversation: each, at: forget(each), wasOpen: each === current };
    show(deleted.wasOpen ? begin() : current);
    list.querySelector(".deleted button").focus();
  }, { ariaLabel: `Delete ${titleOf(each)}` });
  return element("li", {}, choose, drop);
}

function deletedItem(current, { show }) {
  const { conversation, at, wasOpen } = deleted, title = titleOf(conversation);
  const undo = button("Undo", () => {
    settleDeletion();
    restore(conversation, at);
    show(wasOpen ? conversation : current);
    list.children[at].querySelector("button").focus();
  }, { ariaLabel: `Undo deleting ${title}` });
  return element("li", { className: "deleted" }, element("del", {}, title), undo);
}
