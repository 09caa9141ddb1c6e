// Pictures and clips from files, the camera, the clipboard and drops.

const TOO_LARGE_BYTES = 25_000_000;
const NO_PICTURE = "That is neither a picture nor a clip. Choose a PNG, JPEG, WEBP, GIF, BMP, TIFF, MP4, MOV or WebM file.";
const isMedia = (file) => file.type.startsWith("image/") || file.type.startsWith("video/");

/** Let a person choose pictures and clips, or take a photo. Resolves to files; never if the person cancels. */
export function choose(useCamera) {
  const input = document.getElementById(useCamera ? "photo-input" : "file-input");
  return new Promise((resolve) => {
    input.value = "";
    input.onchange = () => resolve([...input.files]);
    input.click();
  });
}

/** Return the pictures and clips of a drop or of the clipboard. */
export function picturesOf(transfer) {
  return [...(transfer?.files ?? [])].filter(isMedia);
}

/** Return why a file cannot be sent, or "". */
export function objection(file) {
  if (file.type && !isMedia(file)) return NO_PICTURE;
  if (file.size > TOO_LARGE_BYTES) return "The file is larger than 25 MB. Make it smaller and try again.";
  return file.size === 0 ? "The file is empty." : "";
}

/** Call `onFiles` for pictures and clips that are dropped on an element, and `onProblem` for anything else. */
export function acceptDrops(element, onFiles, onProblem) {
  let depth = 0;
  const mark = (change) => {
    depth = Math.max(depth + change, 0);
    element.classList.toggle("dropping", depth > 0);
  };
  element.addEventListener("dragenter", (event) => {
    event.preventDefault();
    mark(1);
  });
  element.addEventListener("dragleave", () => mark(-1));
  element.addEventListener("dragover", (event) => event.preventDefault());
  element.addEventListener("drop", (event) => {
    event.preventDefault();
    event.stopPropagation();
    depth = 0;
    mark(0);
    const files = picturesOf(event.dataTransfer);
    if (files.length) onFiles(files);
    else onProblem(NO_PICTURE);
  });
}
