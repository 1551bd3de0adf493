"""Modelling files that exports carry: transformers runs them with `trust_remote_code=True`.

They need transformers, httpx, torch, numpy, Pillow and (for video files) PyAV, and import nothing
of megatron_vita, which is not installed where an export is opened.
"""
