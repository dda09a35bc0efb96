"""Makes the pictures of `lopt-pp report` and `compare` in docs/images, of runs that are made up:

    python docs/site/screenshots.py [FOLDER]

Needs Debian's chromium with its driver (tests/report/install.sh), selenium and matplotlib. With a FOLDER it makes more:
both themes, narrow screens, long pages.
"""

import io
import math
import random
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers")]

from browser import browser, set_theme, set_width  # noqa: E402
from PIL import Image  # noqa: E402
from synthetic_runs import about, record, write_run  # noqa: E402

from lopt_pp import cli  # noqa: E402
from lopt_pp.metrics.state import StateFile  # noqa: E402
from lopt_pp.report.server import PageServer  # noqa: E402

STEPS = 400
FLAGS = {
    "model_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "learning_rate": 1e-4,
    "local_objective": "reconstruction",
    "local_learning_rate": 1e-5,
    "max_grad_norm": 1.0,
    "queue_depth": 2,
    "method": "lopt",
}


def records(steps: int, gain: float, seed: int) -> list[dict[str, Any]]:
    """Of two stages, with the noise that losses of single steps have."""
    draw = random.Random(seed)
    made = [
        record(0, 0, {"eval": 2.0, "wait_send": 0.2}) | {"num_tokens": 0},
        record(1, 0, {"eval": 2.1}, eval_loss=1.69) | {"num_tokens": 0},
    ]
    for step in range(1, steps + 1):
        rate, wall = 1e-4 * (1 - step / STEPS), 0.93 + 0.06 * draw.random()
        loss = 1.69 - gain * (1 - math.exp(-step / 120))
        first: dict[str, Any] = {
            "reconstruction_loss": 0.05 + 0.4 * math.exp(-step / 60) * (0.9 + 0.2 * draw.random()),
            "learning_rate": rate / 10,
            "grad_norm": 0.3 + 0.1 * draw.random(),
            "queue_length": 1.6 + 0.5 * draw.random(),
        }
        second = {"loss": loss + 0.1 * draw.gauss(0, 1), "learning_rate": rate, "grad_norm": 0.7 + 0.4 * draw.random()}
        if step % 50 == 0:
            drift = 0.08 * (1 - math.exp(-step / 100))
            first |= {"drift_norm": drift, "drift_cosine": 1 - drift**2}
            second["eval_loss"] = loss + 0.05
        busy = {"forward": 0.29, "backward": 0.55, "optimizer": 0.05}
        made.append(
            record(0, step, {"forward": 0.2, "backward": 0.4, "optimizer": 0.04, "wait_send": 0.25}, wall, **first)
        )
        made.append(record(1, step, busy, wall, **second))
    return made


def made_run(folder: Path, steps: int, gain: float, seed: int, **flags: Any) -> Path:
    facts = about([(0, 15), (15, 30)], [[0], [1]], **FLAGS | flags)
    facts |= {"name": folder.name, "num_steps": STEPS, "rows": "7473 rows of gsm8k"}
    return write_run(folder, records(steps, gain, seed), facts)


def save(driver: Any, path: Path) -> None:
    """Saves what the browser shows."""
    path.write_bytes(driver.get_screenshot_as_png())
    make_small(path)


def make_small(path: Path) -> None:
    """Lets a picture have as few colours as it needs."""
    Image.open(io.BytesIO(path.read_bytes())).convert("RGB").quantize(256).save(path, optimize=True)


def shoot(addresses: dict[str, str], folder: Path, images: Path, has_all: bool) -> None:
    """Saves each page, by name: in the light theme, or in both, on screens of several sizes."""
    with browser(folder / "browser") as driver:
        for theme in ("light", "dark"):
            set_theme(driver, theme)
            for name, address in addresses.items():
                for (width, height), size in {(1100, 1000): "", (390, 1000): "-narrow", (1100, 2600): "-long"}.items():
                    if has_all or (size == "" and (theme == "light" or name == "live")):
                        set_width(driver, width, height)
                        driver.get(address)
                        save(driver, images / f"{name}{'' if theme == 'light' else '-dark'}{size}.png")


def main() -> None:
    has_all = len(sys.argv) > 1
    images = Path(sys.argv[1]) if has_all else ROOT / "docs" / "images"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = made_run(folder / "gsm8k-lopt", 240, 0.62, 1)
        other = made_run(folder / "gsm8k-frozen", STEPS, 0.5, 2, method="frozen")
        report, compare = folder / "report.html", folder / "compare.html"
        cli.main(["report", str(run), f"--output={report}"])
        cli.main(["compare", str(run), str(other), f"--output={compare}", f"--png={images / 'figure.png'}"])
        make_small(images / "figure.png")
        (run / ".lock-1").write_text("{}")
        state = StateFile(run, 240)
        server = PageServer(run, 0)
        threading.Thread(target=server.serve, daemon=True).start()
        addresses = {"live": server.address, "compare": compare.as_uri()}
        shoot(addresses | ({"report": report.as_uri()} if has_all else {}), folder, images, has_all)
        if has_all:
            state.end("failed", 240, "stage 1 (rank 1) has died or lost its network; stage 0 (rank 0) stops")
            shoot({"live-failed": f"{server.address}?again"}, folder, images, has_all)
        server.shutdown()


if __name__ == "__main__":
    main()
