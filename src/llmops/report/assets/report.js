"use strict";
(() => {
  const root = document.documentElement;
  root.classList.add("js");
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];

  // One chart at a time: the one of the picked score and cost.
  const charts = all(".chart");
  const picked = name => document.querySelector(`input[name="${name}"]:checked`)?.value;
  const show = () => {
    const fits = charts.filter(chart => chart.dataset.score === picked("score") && chart.dataset.cost === picked("cost"));
    const shown = fits[0] ?? charts.find(chart => chart.dataset.score === picked("score"));
    charts.forEach(chart => chart.classList.toggle("on", chart === shown));
  };
  all(".pickers input").forEach(input => input.addEventListener("change", show));
  if (charts.length) show();

  // The table: sort by a heading (up, down, as it was), filter, walk with the arrow keys.
  const table = document.getElementById("rows");
  if (table) {
    const body = table.tBodies[0];
    const heads = all("thead th", table);
    const compare = (a, b) => {
      if (a === undefined || b === undefined) return (a === undefined) - (b === undefined);
      const [x, y] = [Number(a), Number(b)];
      return a !== "" && b !== "" && !Number.isNaN(x) && !Number.isNaN(y) ? x - y : a.localeCompare(b);
    };
    heads.forEach((head, column) => head.firstElementChild.addEventListener("click", () => {
      const next = { null: "descending", descending: "ascending", ascending: null }[head.getAttribute("aria-sort")];
      heads.forEach(each => each.removeAttribute("aria-sort"));
      if (next) head.setAttribute("aria-sort", next);
      table.classList.toggle("sorted", Boolean(next));
      const value = row => row.cells[column].dataset.v;
      const sign = next === "descending" ? -1 : 1;
      const order = (one, two) => {
        if (!next) return one.dataset.place - two.dataset.place;
        const [a, b] = [value(one), value(two)];
        return a === undefined || b === undefined ? compare(a, b) : sign * compare(a, b);
      };
      body.append(...[...body.rows].sort(order));
    }));

    const filter = document.getElementById("filter");
    filter.addEventListener("input", () => {
      const wanted = filter.value.toLowerCase();
      const rows = [...body.rows];
      rows.forEach(row => { row.hidden = !row.textContent.toLowerCase().includes(wanted); });
      const left = rows.filter(row => !row.hidden).length;
      document.getElementById("count").textContent = wanted ? `${left} of ${rows.length}` : "";
    });

    const cells = row => [...row.cells];
    all("td", body).forEach(cell => { cell.tabIndex = -1; });
    const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    body.addEventListener("keydown", event => {
      const cell = event.target.closest("td, th");
      const step = steps[event.key];
      if (!cell || !step) return;
      const rows = [...body.rows].filter(row => !row.hidden);
      const row = rows[rows.indexOf(cell.parentElement) + step[0]];
      const next = row && cells(row)[cells(cell.parentElement).indexOf(cell) + step[1]];
      if (!next) return;
      event.preventDefault();
      (next.querySelector("a") ?? next).focus();
    });
  }

  // Where a figure came from, for whoever has no mouse to hover with.
  const bubble = document.getElementById("bubble");
  const hide = () => { bubble.hidden = true; };
  document.addEventListener("focusin", event => {
    const at = event.target.closest("[title], a");
    const words = at?.getAttribute("title") ?? at?.querySelector("title")?.textContent ?? at?.closest("[title]")?.getAttribute("title");
    if (!words || !at.matches(":focus-visible")) return hide();
    bubble.textContent = words;
    bubble.hidden = false;
    const box = at.getBoundingClientRect();
    const below = box.bottom + bubble.offsetHeight + 12 < innerHeight;
    bubble.style.left = `${Math.max(8, Math.min(box.left, innerWidth - bubble.offsetWidth - 8))}px`;
    bubble.style.top = `${below ? box.bottom + 6 : box.top - bubble.offsetHeight - 6}px`;
  });
  document.addEventListener("focusout", hide);
  document.addEventListener("keydown", event => { if (event.key === "Escape") hide(); });
  addEventListener("scroll", hide, { passive: true });

  // A link to a variant opens its fold; printing opens them all.
  const open = () => { const found = document.getElementById(location.hash.slice(1)); if (found instanceof HTMLDetailsElement) found.open = true; };
  addEventListener("hashchange", open);
  document.addEventListener("click", event => { if (event.target.closest('a[href^="#v"]')) setTimeout(open); });
  open();
})();
