// What the pages do beyond htmx: the stream keeps a bounded number of rows, and can be held still.
(function () {
  "use strict";
  var MOST = 200;
  var held = false;
  var passed = 0;

  document.addEventListener("htmx:sseBeforeMessage", function (event) {
    if (held && event.detail.type === "event") {
      passed += 1;
      event.preventDefault();
      tell();
    }
  });

  document.addEventListener("htmx:sseMessage", function (event) {
    var rows = event.target.closest("tbody");
    while (rows && rows.rows.length > MOST) {
      rows.deleteRow(rows.rows.length - 1);
    }
  });

  document.addEventListener("click", function (event) {
    var button = event.target.closest("[data-hold]");
    if (!button) {
      return;
    }
    if (held) {
      window.location.reload();
      return;
    }
    held = true;
    button.setAttribute("aria-pressed", "true");
    button.textContent = "Go on";
    tell();
  });

  document.addEventListener("htmx:sseOpen", function () {
    document.querySelectorAll("[data-hold]").forEach(function (button) {
      button.hidden = false;
    });
  });

  function tell() {
    var status = document.getElementById("held");
    if (status) {
      status.textContent = "Held still; " + passed + " new since.";
    }
  }
})();
