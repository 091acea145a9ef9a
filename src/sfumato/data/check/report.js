document.getElementById("save").onclick = () => {
  const names = new Set();
  for (const box of document.querySelectorAll(".pick input:checked")) {
    const list = box.value === "copies" ? document.getElementById("copies") : document.querySelector(`pre[data-kind="${box.value}"]`);
    for (const line of list.textContent.split("\n")) { const name = line.split("\t")[0].trim(); if (name && !name.startsWith("…")) names.add(name); }
  }
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([[...names].join("\n") + "\n"], {type: "text/plain"}));
  link.download = "exclude.txt"; link.click();
};
