"use strict";

/* What scrolls sideways can be reached by the keyboard, and shows at its edge that it goes on. */
function markScrolling() {
  for (const box of document.querySelectorAll("pre, .table-wrapper, figure.diagram, figure.picture")) {
    const more = box.scrollWidth > box.clientWidth + 1;
    const end = box.scrollLeft + box.clientWidth >= box.scrollWidth - 1;
    if (more) box.tabIndex = 0;
    else box.removeAttribute("tabindex");
    box.classList.toggle("goes-on", more && !end);
  }
}
addEventListener("DOMContentLoaded", markScrolling);
addEventListener("resize", markScrolling);
addEventListener("scroll", markScrolling, { capture: true, passive: true });
addEventListener("toggle", markScrolling, true); // what was folded up had no size

/* The page of names: show the rows that hold what is typed. */
addEventListener("DOMContentLoaded", () => {
  const box = document.getElementById("name-filter");
  if (!box) return;
  box.closest("p, div").hidden = false;
  box.addEventListener("input", () => {
    const word = box.value.trim().toLowerCase();
    for (const part of document.querySelectorAll("section section")) {
      let shown = 0;
      for (const row of part.querySelectorAll("tbody tr")) {
        row.hidden = !row.textContent.toLowerCase().includes(word);
        shown += !row.hidden;
      }
      part.hidden = !shown;
    }
  });
});
