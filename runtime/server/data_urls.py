"""Images and recordings as text in a request: base64, checked before anything decodes them."""

from __future__ import annotations

import base64
import binascii
import io
import re
import warnings
from typing import Any

from gemma_edge.runtime.errors import printable
from gemma_edge.runtime.server.api_error import ApiError, refused
from gemma_edge.runtime.server.request_fields import RequestFields
from gemma_edge.runtime.server.server_options import Limits

_DATA_URL = re.compile(r"data:(image/[a-z0-9.+-]{1,40});base64,", re.IGNORECASE)
AUDIO_FORMATS = ("wav", "mp3", "flac", "ogg")


def image_part(fields: RequestFields, limits: Limits) -> dict[str, Any]:
    """A part of type "image_url", whose URL is a `data:` URL; nothing is fetched.

    Returns:
        {"type": "image", "image": the file's bytes}.
    """
    image = fields.needed("image_url", fields.fields("image_url"))
    fields.end()
    url, where = image.needed("url", image.text("url")), image.name("url")
    image.only("detail", "auto")
    image.end()
    head = _DATA_URL.match(url)
    if head is None:
        raise refused(where, "must be data:image/...;base64,...: this server fetches nothing")
    data = _decoded(url[head.end() :], where)
    _check_pixels(data, where, limits.image_pixels)
    return {"type": "image", "image": data}


def audio_part(fields: RequestFields) -> dict[str, Any]:
    """A part of type "input_audio".

    Returns:
        {"type": "audio", "audio": the file's bytes}.
    """
    audio = fields.needed("input_audio", fields.fields("input_audio"))
    fields.end()
    data = audio.needed("data", audio.text("data"))
    audio.needed("format", audio.choice("format", AUDIO_FORMATS))
    audio.end()
    return {"type": "audio", "audio": _decoded(data, audio.name("data"))}


def _decoded(text: str, where: str) -> bytes:
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise refused(where, f"is no base64: {printable(error)}") from None
    if not data:
        raise refused(where, "is empty")
    return data


def _check_pixels(data: bytes, where: str, most: int) -> None:
    """Refuses a picture whose header says that it is too large. What is none, the library refuses."""
    try:
        from PIL import Image
    except ImportError:
        text = "this server reads no images: it lacks the extra images"
        raise ApiError(400, text, param=where, code="unsupported_modality") from None
    from gemma_edge.runtime.media.images import FORMATS

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                width, height = image.size
        except Exception as error:  # Pillow's readers raise what they please
            bomb = isinstance(error, Image.DecompressionBombError)
            text = "has too many pixels" if bomb else f"is no picture ({', '.join(FORMATS)})"
            raise refused(where, text, "invalid_image") from None
    if width * height > most:
        raise refused(where, f"has {width} x {height} pixels, the most are {most:,}", "image_too_large")
