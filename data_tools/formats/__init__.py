"""Formats that `import` reads, one module each: its sources, and the samples of a source."""

from data_tools.formats import captions, frames, hf, llava, sharegpt, webdataset
from data_tools.formats.base import Format
from megatron_vita.registry import Registry

_OWN = {
    "llava": Format(llava.list_sources, llava.read),
    "sharegpt": Format(llava.list_sources, sharegpt.read),
    "hf": Format(hf.list_sources, hf.read, writes_media=True),
    "webdataset": Format(webdataset.list_sources, webdataset.read, writes_media=True),
    "captions": Format(captions.list_sources, captions.read),
    "frames": Format(captions.list_sources, frames.read),
}
FORMATS: Registry[Format] = Registry("data_format", _OWN)
