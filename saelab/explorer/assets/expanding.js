// Buttons in a card that Python drew: more text around a window, more windows of a group. A partner's windows, outside of
// the card's columns, are of another store.

const FIRST = 60, TIMES = 4, MOST = 2000;  // tokens on each side of the center at the first press, how they grow, and their limit
const MORE = 10;  // windows at a time

export function addExpanders(root, { window, examples, fail }) {
  for (const element of root.querySelectorAll(".cols .win[data-row]")) addWider(element, window, fail);
  for (const group of root.querySelectorAll("details[data-group]")) addMore(group, { window, examples, fail });
}

function make(text, title, act, fail) {
  const button = document.createElement("button");
  Object.assign(button, { type: "button", className: "wider", textContent: text });
  button.setAttribute("aria-label", title);
  button.onclick = async () => {
    button.disabled = true;
    await act().catch(error => fail(error.message));
    button.disabled = false;
  };
  return button;
}

function addWider(element, window, fail) {
  let shown = element, n = FIRST;
  const widen = async () => {
    const holder = document.createElement("div");
    holder.innerHTML = (await window(element.dataset.row, n, n)).html;  // escaped by Python, as the card is
    const wider = holder.querySelector(".win");
    if (n === MOST || wider.textContent === shown.textContent) button.remove();  // or the document has no more
    shown.replaceWith(wider);
    shown = wider;
    n = Math.min(n * TIMES, MOST);
  };
  const button = make("\u2194", "Show more of the text", widen, fail);
  element.previousElementSibling?.append(button);
}

function addMore(group, { window, examples, fail }) {
  const list = group.querySelector("ol");
  const more = async () => {
    const holder = document.createElement("div");
    const { group: name, side } = group.dataset;
    holder.innerHTML = (await examples(name, side, list.children.length, MORE)).html;
    const found = [...holder.querySelectorAll("li")];
    for (const item of found) {
      list.append(item);
      for (const element of item.querySelectorAll(".win[data-row]")) addWider(element, window, fail);
    }
    if (found.length < MORE) button.remove();
  };
  const button = make("More examples", `More examples of ${group.querySelector("summary").textContent}`, more, fail);
  list.after(button);
}
