"""The API of a course: PNG pictures as base64 in JSON, 1,000 images a call, a minute between calls.

COURSE_TOKEN=... python steal.py --victim python:examples/course_api.py:ask --datasetsteal folder:IMAGES --losstype mse

A start for an API with ways of its own: correct the address, the names in the request, and the width of an answer. An
exception ends the attack with one line; the answers so far are kept, and the same command with --resume goes on.
"""

import base64
import io
import json
import os
import time
import urllib.request

from PIL import Image
from torch import Tensor

URL = os.environ.get("COURSE_URL", "http://localhost:9090/query")
PAUSE = float(os.environ.get("COURSE_PAUSE", "60"))  # seconds from one call to the next
_last = -PAUSE  # when the last call ended


def as_png(image: Tensor) -> str:
    """The PNG of an image, uint8 (3, H, W), in base64."""
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def ask(images: Tensor) -> list[list[float]]:
    """The representations (B, 1024) of images, uint8 (B, 3, H, W)."""
    global _last
    time.sleep(max(0.0, _last + PAUSE - time.monotonic()))
    body = json.dumps([as_png(image) for image in images]).encode()
    headers = {"Content-Type": "application/json", "token": os.environ["COURSE_TOKEN"]}
    try:
        with urllib.request.urlopen(urllib.request.Request(URL, body, headers), timeout=600) as response:
            return json.load(response)["representations"]
    finally:
        _last = time.monotonic()


ask.dim = int(os.environ.get("COURSE_DIM", "1024"))
ask.batch_size = 1000
