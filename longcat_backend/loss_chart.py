"""The losses of a training run as a picture: raw, smoothed, and of the held-out pictures."""

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

SIZE = (768, 384)
Points = Sequence[tuple[int, float]]

_BACKGROUND, _GRID, _INK = (24, 24, 24), (60, 60, 60), (200, 200, 200)
_RAW, _SMOOTH, _HELD_OUT = (70, 90, 130), (90, 170, 255), (255, 170, 60)
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 28, 32
_FONT = 13


def smoothed(losses: Points) -> list[tuple[int, float]]:
    """The running mean of the losses, over about the last twentieth of the run, without a bias at the start."""
    decay = 1 - 1 / max(10.0, len(losses) / 20)
    mean, weight, found = 0.0, 0.0, []
    for step, loss in losses:
        mean, weight = decay * mean + (1 - decay) * loss, decay * weight + (1 - decay)
        found.append((step, mean / weight))
    return found


def draw(losses: Points, held_out: Points, steps: int) -> Image.Image:
    """A chart over the steps of the whole run; what is not a number is left out.

    Single outliers of the raw losses may leave the chart, so that one of them does not flatten the rest.

    Args:
        losses, held_out: (step, loss) in order of the steps; either may be empty.
    """
    raw, kept = _finite(losses), _finite(held_out)
    smooth = smoothed(raw)
    canvas = Image.new("RGB", SIZE, _BACKGROUND)
    paper = _Paper(ImageDraw.Draw(canvas), max(steps, 1), *_range(raw, [*smooth, *kept]))
    paper.axes()
    for points, colour, width in ((raw, _RAW, 1), (smooth, _SMOOTH, 2), (kept, _HELD_OUT, 2)):
        paper.line(points, colour, width)
    paper.dots(kept, _HELD_OUT)
    paper.key((("loss", _RAW), ("smoothed", _SMOOTH), ("held out", _HELD_OUT)))
    return canvas


def _finite(points: Points) -> list[tuple[int, float]]:
    return [(step, loss) for step, loss in points if math.isfinite(loss)]


def _range(raw: Points, always: Points) -> tuple[float, float]:
    """Lowest and highest loss of the chart: all that is smooth, and the raw losses but for their outer 2 %."""
    ordered = sorted(loss for _, loss in raw)
    cut = len(ordered) // 50
    values = [*ordered[cut : len(ordered) - cut], *(loss for _, loss in always)] or [0.0, 1.0]
    low, high = min(values), max(values)
    margin = 0.05 * (high - low) or max(0.05 * abs(high), 1e-6)
    return low - margin, high + margin


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers between two, about ``count`` of them."""
    rough = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
    first = math.ceil(low / step)
    return [step * (first + index) for index in range(int(high / step - first) + 1)]


class _Paper:
    """Where steps and losses lie on the picture."""

    def __init__(self, pen: ImageDraw.ImageDraw, steps: int, low: float, high: float) -> None:
        self.pen, self.steps, self.low, self.high = pen, steps, low, high
        self.font = ImageFont.load_default(_FONT)

    def x(self, step: float) -> float:
        """Pixels from the left."""
        return _LEFT + step / self.steps * (SIZE[0] - _LEFT - _RIGHT)

    def y(self, loss: float) -> float:
        """Pixels from the top."""
        inside = min(max(loss, self.low), self.high)
        return SIZE[1] - _BOTTOM - (inside - self.low) / (self.high - self.low) * (SIZE[1] - _TOP - _BOTTOM)

    def axes(self) -> None:
        """Lines and numbers."""
        for loss in _ticks(self.low, self.high, 5):
            self.pen.line([(_LEFT, self.y(loss)), (SIZE[0] - _RIGHT, self.y(loss))], fill=_GRID)
            self.pen.text((_LEFT - 6, self.y(loss)), f"{loss:.3g}", fill=_INK, font=self.font, anchor="rm")
        for step in _ticks(0, self.steps, 6):
            self.pen.line([(self.x(step), _TOP), (self.x(step), SIZE[1] - _BOTTOM)], fill=_GRID)
            self.pen.text((self.x(step), SIZE[1] - _BOTTOM + 6), f"{step:g}", fill=_INK, font=self.font, anchor="mt")

    def line(self, points: Points, colour: tuple[int, int, int], width: int) -> None:
        """Straight lines from point to point."""
        if len(points) > 1:
            self.pen.line([(self.x(step), self.y(loss)) for step, loss in points], fill=colour, width=width)

    def dots(self, points: Points, colour: tuple[int, int, int]) -> None:
        """A dot at each point."""
        for step, loss in points:
            x, y = self.x(step), self.y(loss)
            self.pen.ellipse([x - 3, y - 3, x + 3, y + 3], fill=colour)

    def key(self, names: Sequence[tuple[str, tuple[int, int, int]]]) -> None:
        """What the colours mean."""
        left: float = _LEFT
        for name, colour in names:
            self.pen.text((left, 8), name, fill=colour, font=self.font)
            left += self.font.getlength(name) + 24
