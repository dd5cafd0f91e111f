"""Take the pictures of the server's page that the documentation shows, of a run under way.

    python docs/make_screenshots.py        # needs ".[local,browser,plots]", and chromium

It trains two adapters on a small book with the embedded server, for some minutes, and writes
``docs/images/page.png`` and ``docs/images/page-phone.png`` in between.
"""

from __future__ import annotations

import argparse
import io
import itertools
import random
import shutil
import threading
from pathlib import Path
from typing import Any, Iterator, List

import requests
from PIL import Image
from playwright.sync_api import sync_playwright

import tinkex
from tinkex import types
from tinkex.local import LocalServer, load_engine

ROOT = Path(__file__).resolve().parents[1]
TEXT = ROOT / "examples" / "data" / "devils_dictionary_train.txt"
IMAGES = ROOT / "docs" / "images"
MOST_BYTES = 150_000
PROMPTS = ("COFFEE, n.", "PROGRAMMER, n.", "TELEPHONE, n.", "PATIENCE, n.")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run")
DESKTOP = {"viewport": {"width": 1280, "height": 800}, "color_scheme": "light"}
PHONE = {
    "viewport": {"width": 390, "height": 844},
    "color_scheme": "dark",
    "device_scale_factor": 2,
    "is_mobile": True,
    "has_touch": True,
}


def datums(tokenizer: Any, batch_size: int) -> Iterator[List[types.Datum]]:
    """Yield batches of short paragraphs, without end."""
    paragraphs = TEXT.read_text(encoding="utf-8").split("\n\n")
    random.Random(0).shuffle(paragraphs)
    batch: List[types.Datum] = []
    for paragraph in itertools.cycle(paragraphs):
        tokens = tokenizer.encode(paragraph)[:48]
        if len(tokens) < 8:
            continue
        batch.append(
            types.Datum(types.ModelInput.from_ints(tokens[:-1]), {"target_tokens": tokens[1:]})
        )
        if len(batch) == batch_size:
            yield batch
            batch = []


class Work:
    """Two runs that are trained in turns, with samples and checkpoints, until they are stopped."""

    def __init__(self, service: tinkex.ServiceClient, model: str, steps: int) -> None:
        self.ready = threading.Event()  # after *steps* steps of each
        self.stop = threading.Event()
        self.model = model
        self._service = service
        self._steps = steps
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._work()
        finally:
            self.ready.set()  # a failure is seen, and not waited for

    def _work(self) -> None:
        rates = (1e-3, 3e-4)
        trainers = [
            self._service.create_lora_training_client(
                self.model, rank=16, user_metadata={"name": f"dictionary, lr {rate:g}"}
            )
            for rate in rates
        ]
        tokenizer = trainers[0].get_tokenizer()
        batches = datums(tokenizer, 1)
        for step in itertools.count(1):
            batch = next(batches)
            for trainer, rate in zip(trainers, rates):
                if self.stop.is_set():
                    return
                trainer.train_step(batch, "cross_entropy", types.AdamParams(learning_rate=rate))
            if step % 20 == 0:
                trainers[0].save_state(f"step-{step}").result()
                trainers[0].save_weights_for_sampler(f"step-{step}").result()
                sampler = trainers[0].save_weights_and_get_sampling_client()
                for prompt in PROMPTS[:2] if step % 40 else PROMPTS[2:]:
                    asked = types.ModelInput.from_ints(tokenizer.encode(prompt))
                    params = types.SamplingParams(max_tokens=28, temperature=0.7, seed=step)
                    sampler.sample(asked, 1, params).result()
            if step == self._steps:
                self.ready.set()

    def join(self) -> None:
        """Stop, and wait for the step under way."""
        self.stop.set()
        self._thread.join()


def take(browser: Any, url: str, name: str, full_page: bool, **options: Any) -> None:
    """Open the page, try a prompt, and write what it looks like then."""
    context = browser.new_context(**options)
    page = context.new_page()
    page.set_default_timeout(300_000)
    page.goto(url)
    page.wait_for_selector("#samples li")
    page.fill("#smoothing", "0.88")
    if full_page:
        page.select_option("#try-model", index=1)
        page.fill("#try-prompt", "OPTIMIST, n.")
        page.fill("#try-tokens", "32")
        page.click("#try-run")
        page.wait_for_function("() => document.getElementById('try-status').textContent")
    page.evaluate("() => { document.activeElement.blur(); scrollTo(0, 0); }")
    if full_page:
        page.hover("#chart", position={"x": 440, "y": 120})
        page.wait_for_selector("#readout", state="visible")
    page.wait_for_timeout(500)
    image = Image.open(io.BytesIO(page.screenshot(full_page=full_page)))
    context.close()
    IMAGES.mkdir(exist_ok=True)
    with_palette(image.convert("RGB")).save(IMAGES / name, optimize=True)
    size = (IMAGES / name).stat().st_size
    if size > MOST_BYTES:
        raise SystemExit(f"{name} has {size} bytes; at most {MOST_BYTES}: show less of the page")


def with_palette(image: Any) -> Any:
    """Return *image* in 256 colours: the most frequent ones as they are, the others approximated.

    The few pixels of a green dot would otherwise lose their colour, or large areas change theirs.
    """
    colours = sorted(image.getcolors(1 << 24), reverse=True)[:128]
    frequent = [part for _, colour in colours for part in colour]
    others = image.quantize(256 - len(colours), Image.Quantize.MAXCOVERAGE).getpalette()
    palette = Image.new("P", (1, 1))
    palette.putpalette((frequent + others)[: 3 * 256])
    return image.quantize(palette=palette, dither=Image.Dither.NONE)


def main() -> None:
    """Train, take the pictures, and stop."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", help="base model")
    parser.add_argument("--steps", type=int, default=60, help="steps of each run before the first")
    arguments = parser.parse_args()
    with LocalServer(load_engine(arguments.model)) as server:
        # One session that nothing keeps alive, and one that ends as it should.
        abandoned = {"tags": [], "sdk_version": "0.38.0", "display_name": "evaluation"}
        requests.post(f"{server.url}/api/v1/create_session", json=abandoned, timeout=60)
        tinkex.ServiceClient(base_url=server.url).close()
        with tinkex.ServiceClient(base_url=server.url) as service:
            work = Work(service, arguments.model, arguments.steps)
            work.ready.wait()
            with sync_playwright() as playwright:
                chromium = shutil.which("chromium")
                browser = playwright.chromium.launch(executable_path=chromium, args=list(FLAGS))
                take(browser, server.url, "page.png", True, **DESKTOP)
                take(browser, server.url, "page-phone.png", False, **PHONE)
                browser.close()
            work.join()


if __name__ == "__main__":
    main()
