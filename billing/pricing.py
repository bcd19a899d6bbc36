"""What work costs: today one exact rate per frame."""

from dataclasses import dataclass

from billing.money import Mils


@dataclass(frozen=True, slots=True)
class Price:
    mils_per_frame: Mils

    def cost(self, frames: int) -> Mils:
        """Exact: both factors are whole, so nothing is ever rounded."""
        return Mils(frames * self.mils_per_frame)
