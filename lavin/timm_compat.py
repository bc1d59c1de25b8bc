"""`timm`, imported at its first use, and so that a torchvision built for another torch than the installed one does no
harm."""

import sys
from functools import cache
from typing import Any

import torch


@cache
def import_timm() -> Any:
    """timm imports torchvision, whose compiled part fails to load with another torch; its Python part then stops at the
    fake kernels of two operators that are not declared. Only Python parts are used here, so we declare these two.
    """
    with torch.device("cpu"):  # even where a model is being built on the meta device
        try:
            import torchvision  # noqa: F401
        except RuntimeError:
            for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
                del sys.modules[name]
            library = torch.library.Library("torchvision", "DEF")
            library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            torch.library._torchvision_declarations = library  # the declarations live as long as this object
        import timm
    return timm


class LazyTimm:
    """The module timm. Its import takes longer than torch's, and no command that refuses its flags waits for it."""

    def __getattr__(self, name: str):
        return getattr(import_timm(), name)


timm = LazyTimm()
