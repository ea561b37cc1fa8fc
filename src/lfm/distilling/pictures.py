"""The space of pictures that a model reads: their size, and the values that black and white have in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from lfm.core.errors import ConfigError
from lfm.core.heavy import F, np, torch
from lfm.core.interfaces import Codec
from lfm.core.model import Model

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor


class Frame(NamedTuple):
    """shape: (C, H, W). low, high: what black and white are as pixel values, (C, 1, 1)."""

    shape: tuple[int, int, int]
    low: Tensor
    high: Tensor

    def to(self, device: torch.device) -> Frame:
        return Frame(self.shape, self.low.to(device), self.high.to(device))

    def clamp(self, images: Tensor) -> Tensor:
        """Pixel values (B, C, H, W) no darker than black, no lighter than white."""
        return torch.minimum(torch.maximum(images, self.low), self.high)

    def unit(self, images: Tensor) -> Tensor:
        """Pixel values to 0 … 1."""
        return (images - self.low) / (self.high - self.low)

    def scaled(self, unit: Tensor) -> Tensor:
        """0 … 1 to pixel values."""
        return self.low + unit * (self.high - self.low)

    def shown(self, images: Tensor) -> list[NDArray[np.uint8]]:
        """Pixel values (B, C, H, W) as pictures of 256 shades: (H, W, 3), or (H, W) of one channel."""
        shades = (self.unit(images).clamp(0, 1) * 255).round().to(torch.uint8).cpu().permute(0, 2, 3, 1)
        return list((shades[..., 0] if shades.shape[-1] == 1 else shades).numpy())

    def noise(self, many: int, generator: torch.Generator | None = None) -> Tensor:
        """(many, C, H, W) normal pixel values of mean 0 and deviation 1, clamped: where optimised pictures begin."""
        return self.clamp(torch.randn(many, *self.shape, generator=generator).to(self.low.device))


def frame_of(
    model: Model, image: tuple[int, ...] = (), mean: tuple[float, ...] = (), std: tuple[float, ...] = ()
) -> Frame:
    """What the model's codec makes of a black and of a white picture; without a codec, what the settings say.

    image: (C, H, W). mean, std: of each channel, in units of white. ConfigError where neither tells, or they cannot be.
    """
    if model.can(Codec):
        side = image[-1] if image else 64
        flat = [np.full((side, side, 3), value, dtype=np.uint8) for value in (0, 255)]
        black, white = model.ask(Codec).images(flat)["pixel_values"].float()
        shape = (int(black.shape[0]), int(black.shape[1]), int(black.shape[2]))
        return Frame(shape, black.amin((1, 2))[:, None, None], white.amax((1, 2))[:, None, None])
    if len(image) != 3:
        raise ConfigError(
            f"the size of the pictures that {model.ref} reads is not known",
            why="it has no image processor",
            fix="image=[3,32,32] (channels, height, width), with mean and std of its inputs",
        )
    if {len(mean), len(std)} - {0, 1, image[0]} or min(std, default=1.0) <= 0:
        raise ConfigError(
            f"image={list(image)}, mean={list(mean)}, std={list(std)} describe no pictures",
            why="a mean and a std, above 0, of each channel, of all of them, or none",
        )
    centre = torch.tensor(mean or (0.0,)).expand(image[0])[:, None, None]
    spread = torch.tensor(std or (1.0,)).expand(image[0])[:, None, None]
    return Frame((image[0], image[1], image[2]), -centre / spread, (1 - centre) / spread)


def roughness(images: Tensor) -> Tensor:
    """Σ of the norms of a batch's differences across, down and along both diagonals: TV by DeepInversion's code."""
    across = images[..., :-1] - images[..., 1:]
    down = images[..., :-1, :] - images[..., 1:, :]
    rising = images[..., 1:, :-1] - images[..., :-1, 1:]
    falling = images[..., :-1, :-1] - images[..., 1:, 1:]
    return torch.stack([torch.linalg.vector_norm(part) for part in (across, down, rising, falling)]).sum()


def variation(images: Tensor) -> Tensor:
    """Mean |difference| between neighbours down, and the same across, added."""
    down, across = images[..., 1:, :] - images[..., :-1, :], images[..., 1:] - images[..., :-1]
    return down.abs().mean() + across.abs().mean()


def jittered(images: Tensor, most: float, flip: bool) -> Tensor:
    """The batch rolled by up to that share of its sides (a pixel at least, unless 0), and mirrored half of the time."""
    sides = images.shape[-2:]
    reach = [max(1, round(most * side)) if most else 0 for side in sides]
    moves = [int(torch.randint(-r, r + 1, ())) for r in reach]
    moved = torch.roll(images, moves, (-2, -1)) if any(moves) else images
    return moved.flip(-1) if flip and torch.rand(()) < 0.5 else moved


def descended(
    images: Tensor,
    optimizer: Callable[[list[Tensor]], torch.optim.Optimizer],
    loss: Callable[[Tensor], Tensor],
    steps: int,
    after: Callable[[Tensor], Tensor],
) -> Tensor:
    """Pictures that so many steps down a loss make of these. after: what each step's pictures become (clamped, say)."""
    made = images.clone().requires_grad_(True)
    moved = optimizer([made])
    for _ in range(steps):
        moved.zero_grad(set_to_none=True)
        loss(made).backward()
        moved.step()
        with torch.no_grad():
            made.copy_(after(made))
    return made.detach()


def leaves(frame: Frame, many: int, layers: int = 40, least: float = 0.08) -> Tensor:
    """(many, C, H, W) dead leaves (Mumford & Gidas 2001; 2106.05963): discs of random tones that hide one another.

    Radii are spread as r⁻³ between `least` and 1 of the side, so that the pictures look alike at every scale. Drawn
    from torch's own generator.
    """
    channels, height, width = frame.shape
    place = frame.low.device
    y = torch.linspace(0, 1, height)[None, :, None]
    x = torch.linspace(0, 1, width)[None, None, :]
    made = torch.rand(many, channels, 1, 1).expand(many, *frame.shape).clone()
    for _ in range(layers):
        radius = (least**-2 - torch.rand(many, 1, 1) * (least**-2 - 1)) ** -0.5
        centre = torch.rand(2, many, 1, 1)
        inside = ((y - centre[0]) ** 2 + (x - centre[1]) ** 2 < radius**2)[:, None]
        made = torch.where(inside, torch.rand(many, channels, 1, 1), made)
    return frame.scaled(made.to(place))


def same(one: Frame, other: Frame) -> bool:
    """Whether pictures of the one are pictures of the other as they are."""
    return one.shape == other.shape and torch.equal(one.low, other.low) and torch.equal(one.high, other.high)


def seen(images: Tensor, made: Frame, read: Frame) -> Tensor:
    """Pictures made in one frame as a model of another frame reads them: resized, its own black and white."""
    if same(made, read):
        return images
    unit = made.unit(images)
    if made.shape[0] != read.shape[0]:
        unit = unit.mean(1, keepdim=True).expand(-1, read.shape[0], -1, -1)
    if made.shape[1:] != read.shape[1:]:
        unit = F.interpolate(unit, read.shape[1:], mode="bilinear", align_corners=False, antialias=True)
    return read.scaled(unit)
