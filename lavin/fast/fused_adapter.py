"""AdaptedBlock with norm and adapter in one kernel where there is a single row, as in a chat's decoding steps."""

from lavin.kernels.single_row import norm_adapter, uses_gemv
from lavin.mm_adapter import AdaptedBlock


class FusedAdaptedBlock(AdaptedBlock):
    """AdaptedBlock whose norm and adapter are one kernel for a single row."""

    @classmethod
    def convert(cls, block: AdaptedBlock) -> None:
        """Converts a block in place."""
        block.__class__ = cls

    def norm_and_adapter(self, norm, name, x, routing):
        if getattr(self, name) is None or not uses_gemv(x) or routing.cache is None:
            return super().norm_and_adapter(norm, name, x, routing)
        mixtures, *projections = routing.cache[name]
        return norm_adapter(x, norm.weight, norm.eps, routing.one_hot, mixtures, *projections)
