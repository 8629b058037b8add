"use strict";
(() => {
  const root = document.documentElement;
  root.classList.add("js");
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];

  // One chart at a time: the one of the picked score, cost and batch size; where there is none, the nearest, and the
  // buttons then say which.
  const charts = all(".chart");
  const button = name => document.querySelector(`input[name="${name}"]:checked`);
  const sizes = document.querySelector('input[name="batch"]')?.closest("fieldset");
  const show = () => {
    const asked = ["score", "cost", "batch"].map(name => [name, button(name)?.value]);
    const near = chart => asked.findIndex(([name, value]) => chart.dataset[name] && chart.dataset[name] !== value);
    const rank = chart => near(chart) < 0 ? asked.length : near(chart);
    const shown = charts.reduce((best, chart) => rank(chart) > rank(best) ? chart : best);
    charts.forEach(chart => chart.classList.toggle("on", chart === shown));
    asked.forEach(([name]) => all(`input[name="${name}"]`).forEach(each => {
      if (each.value === shown.dataset[name]) each.checked = true;
    }));
    if (sizes) sizes.disabled = !shown.dataset.batch;
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
    heads.forEach((head, column) => head.querySelector("button")?.addEventListener("click", () => {
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
    const [run, state, won] = ["by-run", "by-state", "won"].map(id => document.getElementById(id));
    const fits = row => row.textContent.toLowerCase().includes(filter.value.toLowerCase())
      && (!run?.value || row.dataset.run === run.value) && (!state?.value || row.dataset.state === state.value)
      && (!won?.checked || row.dataset.won === "1");
    [filter, run, state, won].forEach(each => each?.addEventListener("input", () => {
      const rows = [...body.rows];
      rows.forEach(row => { row.hidden = !fits(row); });
      const left = rows.filter(row => !row.hidden).length;
      document.getElementById("count").textContent = left < rows.length ? `${left} of ${rows.length}` : "";
    }));
  }

  // The arrow keys walk any table: from the link in its first column, or from wherever a cell was left.
  const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
  document.addEventListener("keydown", event => {
    const step = steps[event.key];
    const cell = step && event.target.closest?.("tbody td, tbody th");
    if (!cell) return;
    const rows = [...cell.closest("tbody").rows].filter(row => !row.hidden);
    const row = rows[rows.indexOf(cell.parentElement) + step[0]];
    const next = row?.cells[cell.cellIndex + step[1]];
    if (!next) return;
    event.preventDefault();
    const target = next.querySelector("a") ?? next;
    if (target === next) next.tabIndex = -1;
    target.focus();
  });
  // A table whose cells say where they came from can be entered by Tab, also where no link stands in it.
  all("table.figures tbody, table.plain tbody").forEach(body => {
    const first = !body.querySelector("a") && body.querySelector("[title]");
    if (first) first.tabIndex = 0;
  });

  // Where a figure came from, for whoever has no mouse to hover with.
  const bubble = document.getElementById("bubble");
  let told = null;
  const hide = () => { bubble.hidden = true; told = null; };
  const say = at => {
    const words = at?.getAttribute("title") ?? at?.querySelector("title")?.textContent ?? at?.closest("[title]")?.getAttribute("title");
    if (!words) return hide();
    told = at;
    bubble.textContent = words;
    bubble.hidden = false;
    const box = at.getBoundingClientRect();
    const below = box.bottom + bubble.offsetHeight + 12 < innerHeight;
    bubble.style.left = `${Math.max(8, Math.min(box.left, innerWidth - bubble.offsetWidth - 8))}px`;
    bubble.style.top = `${below ? box.bottom + 6 : box.top - bubble.offsetHeight - 6}px`;
  };
  document.addEventListener("focusin", event => {
    const at = event.target.closest("[title], a");
    if (at?.matches(":focus-visible")) say(at); else hide();
  });
  // A finger has nothing to hover with: a tap on a figure says the same.
  document.addEventListener("click", event => {
    const at = event.target.closest("td[title], dd [title], .badge[title], span[title]");
    if (at && !event.target.closest("a, button")) say(at); else hide();
  });
  document.addEventListener("focusout", hide);
  document.addEventListener("keydown", event => { if (event.key === "Escape") hide(); });
  addEventListener("scroll", () => { if (told) say(told); }, { passive: true, capture: true });

  // Printing opens the folds, unless they would be a book; what was closed is closed again.
  const MOST_PRINTED = 24;
  const MOST_LINES = 600;
  let opened = [];
  addEventListener("beforeprint", () => {
    const folds = all("details:not([open])");
    let left = MOST_LINES;
    opened = folds.length > MOST_PRINTED ? [] : folds.filter(fold => (left -= all("tr", fold).length) >= 0);
    opened.forEach(fold => { fold.open = true; });
  });
  addEventListener("afterprint", () => { opened.forEach(fold => { fold.open = false; }); opened = []; });

  // A link to a variant opens its fold.
  const open = () => { const found = document.getElementById(location.hash.slice(1)); if (found instanceof HTMLDetailsElement) found.open = true; };
  addEventListener("hashchange", open);
  document.addEventListener("click", event => { if (event.target.closest('a[href^="#v"]')) setTimeout(open); });
  open();
})();
