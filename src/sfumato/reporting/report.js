const slider = document.getElementById("steps");
if (slider) {
  const sheets = [...document.querySelectorAll("#sheets figure")];
  const show = () => sheets.forEach((sheet, number) => { sheet.hidden = number !== Number(slider.value); });
  slider.hidden = false;
  slider.addEventListener("input", show);
  show();
}
