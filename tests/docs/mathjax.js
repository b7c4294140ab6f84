// Formulas of the notebooks are $…$ and $$…$$, those of an output too. The menu would fetch parts.
window.MathJax = {
  tex: { inlineMath: [["$", "$"], ["\\(", "\\)"]], processEscapes: true },
  options: { enableMenu: false },
};
