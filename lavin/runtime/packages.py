"""The packages on which results depend; this file imports none of them."""

from importlib.metadata import PackageNotFoundError, version

REQUIRED = ("torch", "timm", "sentencepiece", "numpy", "pillow")
OPTIONAL = ("torchvision", "triton", "tokenizers", "transformers", "bitsandbytes", "gguf")


def installed_versions() -> dict[str, str]:
    """Returns the versions of those packages that are installed, by name."""
    found = {}
    for name in (*REQUIRED, *OPTIONAL):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
