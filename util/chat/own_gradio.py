"""Gradio, set up for this page before it is imported. The page's files import it from here."""

import os
import tempfile
from pathlib import Path

from util.chat.address import without_proxy

os.environ["MPLBACKEND"] = "Agg"  # Gradio sets Matplotlib's backend after each message, and a notebook's is not there
# else /tmp/gradio, which another user of this machine may own
os.environ.setdefault("GRADIO_TEMP_DIR", str(Path(tempfile.gettempdir(), f"gradio-{os.getuid()}")))
# Kubernetes gives it the address of a service of this name, which Gradio cannot read; the page has --port
os.environ.pop("GRADIO_SERVER_PORT", None)
with without_proxy():
    import gradio

gr = gradio
