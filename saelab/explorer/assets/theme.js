// The reader's choice of a light or dark page, put on before the first paint. It is all that is kept in the browser.
"use strict";
try {
  const theme = localStorage.getItem("saelab-theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch { /* a browser that keeps nothing shows the system's theme */ }
