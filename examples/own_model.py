"""A model of your own, distilled to one step: any torch module in a small pipeline of diffusers, here on points of the plane.

    python examples/own_model.py

trains a flow on eight Gaussians in a ring, distils it with reflow, and prints how far one step of each is from the data.
"""

import tempfile

import torch
from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Generator, Tensor, nn

import flowkit
from flowkit import distill, rng


class Net(ModelMixin, ConfigMixin):
    """A velocity of points; its two parents save and load it."""

    @register_to_config
    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(3, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2)
        )

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """Velocity at model times in [0, 1000]."""
        s = torch.as_tensor(timestep, dtype=sample.dtype).expand(len(sample)) / 1000
        return self.layers(torch.cat([sample, s[:, None]], dim=1))


class Points(DiffusionPipeline):
    """Points of the plane from noise."""

    def __init__(self, unet: nn.Module, scheduler: flowkit.RectifiedFlowScheduler) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        num_inference_steps: int = 16,
        generator: Generator | list[Generator] | None = None,
        latents: Tensor | None = None,
    ) -> tuple[Tensor]:
        """Draws points; each depends on its own seed alone."""
        x = latents if latents is not None else rng.normal((2,), *rng.keys(generator, batch_size), tag=rng.INITIAL)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            x = self.scheduler.step(self.unet(x, t), t, x, return_dict=False)[0]
        return (x,)


def data(count: int) -> Tensor:
    """Eight Gaussians in a ring of radius 4."""
    angles = torch.randint(8, (count,)) * torch.pi / 4
    return 4 * torch.stack([angles.cos(), angles.sin()], 1) + 0.3 * torch.randn(count, 2)


def distance(x: Tensor, y: Tensor) -> float:
    """Squared energy distance of two samples: 0 for one distribution."""
    return float(2 * torch.cdist(x, y).mean() - torch.cdist(x, x).mean() - torch.cdist(y, y).mean())


torch.manual_seed(0)
torch.set_num_threads(1)
teacher = Points(Net(), flowkit.RectifiedFlowScheduler(solver="euler"))
optimizer = torch.optim.Adam(teacher.unet.parameters(), 2e-3)
for _ in range(2000):
    x0, noise, s = data(512), torch.randn(512, 2), torch.rand(512, 1)
    loss = (teacher.unet((1 - s) * x0 + s * noise, 1000 * s[:, 0]) - (noise - x0)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

with tempfile.TemporaryDirectory() as folder:
    student = distill.run(
        distill.Reflow(evaluations=16), teacher, output=f"{folder}/student", samples=5_000, steps=1_000, batch_size=256
    )
for name, pipe, steps in (("teacher", teacher, 1), ("student", student, 1), ("teacher", teacher, 32)):
    points = pipe(2000, num_inference_steps=steps, generator=torch.Generator().manual_seed(1))[0]
    print(f"{name}, {steps} step{'s' * (steps > 1)}: distance to the data {distance(points, data(2000)):.3f}")
